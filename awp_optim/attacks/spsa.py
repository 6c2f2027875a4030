"""SPSA: an attack that sees the logits alone, and guesses their gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from awp_optim._utils.checks import check_int, check_real

from .ascent import BallAttack
from .balls import Projection, round_toward
from .base import ModelOracle, uncached_autocast
from .losses import LOSSES

BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8  # of Adam, as its authors set them
BATCH_SIZE = {"cpu": 32}
"""Images a forward pass where none are given: what a processor's caches hold, or 512 elsewhere."""


@dataclass(frozen=True)
class SPSA(BallAttack):
    """Gradient-free: differences of the loss along random directions, and Adam to climb them.

    Uesato et al., "Adversarial risk and the dangers of evaluating against weak attacks"
    (ICML 2018, https://arxiv.org/abs/1802.05666), Algorithm 1, which starts at the input and in
    every step estimates the gradient from ``samples`` directions v of independent signs,

        g = mean_v (f(x + delta * v) - f(x - delta * v)) / (2 * delta) * v,

    moves by Adam's step and projects. Nothing is asked of the model but logits, so its forward pass
    may be quantised, stochastic or under ``no_grad``; if PGD fails where this succeeds, gradients
    are masked. The points it asks about lie up to ``delta`` outside ball and box, as the authors'
    do; its iterates lie inside. The defaults are those of Wu et al. (NeurIPS 2020, Section 5.2).
    How to call it: see :meth:`Attack.__call__`.

    It costs ``2 * samples + 1`` forward passes a step and example, and one before. Each example
    keeps its worst iterate: misclassified before not, then the higher loss. Random directions
    belong to an example: neither its batch nor ``batch_size`` changes them.

    Args:
        eps: radius of the ball, at least 0, in the units of the input. At 0 the input is returned
            as it is and the model is not called.
        steps: at least 0.
        delta: half the distance between the two points of a difference, in each element, above 0.
            A half-precision input must hold such a difference, so it needs ``delta`` of 0.001
            (float16) or 0.0079 (bfloat16) at least; in float32 it is the rounding of the model, if
            it is in half precision or under autocast, that weakens the estimate.
        lr: Adam's learning rate, above 0: about how far an element moves in a step, in either norm.
        samples: directions of an estimate, at least 1; each takes two forward passes.
        norm: "linf" or "l2".
        loss: what is climbed: "cw", "ce" or "dlr". Not "kl": it is least at the input, where both
            sides of a difference are alike.
        clip: the box (lo, hi) of valid inputs, or None for no box.
        model_mode: "eval" or "train", the mode in which the model is attacked. In train mode
            BatchNorm mixes what shares a forward pass.
        batch_size: images a forward pass, at least 2: what bounds the memory, whatever the size of
            the batch and ``samples``. It changes results by rounding alone. None for 32 on the CPU,
            which its caches like best, and 512 elsewhere.
        drop_fooled: leave an example at the first iterate that is misclassified, as the authors do.
            On the CPU it then costs no more passes; elsewhere, where looking would wait for the
            device, the others' passes are made for it, too. False climbs on for a larger loss; who
            is fooled is the same.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range; when called, ``delta`` is lost in the dtype of x.

    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    >>> SPSA(eps=0.1, steps=20)(lambda x: x * 3, x, y)
    tensor([[0.4900, 0.5100]])
    """

    uses_gradients: ClassVar[bool] = False
    losses: ClassVar[tuple[str, ...]] = ("cw", "ce", "dlr")

    eps: float = 8 / 255
    steps: int = 100
    delta: float = 0.001
    lr: float = 0.01
    samples: int = 256
    norm: str = "linf"
    loss: str = "cw"
    clip: tuple[float, float] | None = (0, 1)
    model_mode: str = "eval"
    batch_size: int | None = None
    drop_fooled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("delta", "lr"):
            self._set(name, check_real(name, getattr(self, name)))
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        self._set("steps", check_int("steps", self.steps, least=0))
        self._set("samples", check_int("samples", self.samples, least=1))
        if self.batch_size is not None:
            self._set("batch_size", check_int("batch_size", self.batch_size, least=2))
        if not isinstance(self.drop_fooled, bool):
            raise TypeError(f"drop_fooled must be True or False, got {self.drop_fooled!r}")

    def _check(self, x: Tensor, y: Tensor | None) -> None:
        super()._check(x, y)
        finest = torch.finfo(x.dtype).eps
        if self.delta < finest:
            raise ValueError(
                f"delta={self.delta:g} is lost in x of {x.dtype}, whose numbers near 1 are up to"
                f" {finest:.2g} apart: pass x.float() and the model in float32, or set delta="
                f"{finest:.2g} or more"
            )

    def _search(
        self, oracle: ModelOracle, x: Tensor, y: Tensor | None, project: Projection
    ) -> Tensor:
        assert y is not None  # _check saw to it
        looking_is_free = x.device.type == "cpu"
        queries = _Queries(self, oracle, x)
        worst = x.clone()
        live = torch.arange(len(x), device=x.device)  # which examples x and all below are of
        keys = torch.randint(2**63 - 1, (len(x),), device=x.device)
        x_adv, m, v = x, torch.zeros_like(x), torch.zeros_like(x)
        fooled, loss = queries.outcome(x_adv, x, y)
        for i in range(self.steps):
            if self.drop_fooled and looking_is_free and bool(fooled.any()):
                kept = live, keys, x, y, x_adv, m, v, loss, fooled
                live, keys, x, y, x_adv, m, v, loss, fooled = (t[~fooled] for t in kept)
                if not len(x):
                    break
                project = self._ball.projection(x, self.eps, self.clip)
            g = queries.gradient(x_adv, y, keys + i * self.samples)
            m.lerp_(g, 1 - BETA1)
            v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            scale = v.div(1 - BETA2 ** (i + 1)).sqrt_().add_(ADAM_EPS)
            x_adv = project(x_adv.addcdiv(m, scale, value=self.lr / (1 - BETA1 ** (i + 1))))
            now_fooled, now_loss = queries.outcome(x_adv, x, y)
            worse = (now_fooled & ~fooled) | ((now_fooled == fooled) & (now_loss > loss))
            if self.drop_fooled:
                worse &= ~fooled
            shaped = worse.view(-1, *[1] * (x.ndim - 1))
            worst[live] = torch.where(shaped, x_adv, worst[live])
            fooled, loss = fooled | now_fooled, torch.where(worse, now_loss, loss)
        return worst


class _Queries:
    """What the attack asks the model, ``batch_size`` images at a time."""

    def __init__(self, attack: SPSA, oracle: ModelOracle, x: Tensor) -> None:
        self._victim = oracle
        self._loss = LOSSES[attack.loss]
        self._delta, self._samples = attack.delta, attack.samples
        self._batch_size = attack.batch_size or BATCH_SIZE.get(x.device.type, 512)
        self._dtype = oracle.shown(x).dtype
        self._layout = _layout(x)

    def outcome(self, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """For each example, whether it is misclassified, and its loss."""
        shown = round_toward(x_adv, x.to(self._dtype))
        starts = range(0, len(x), self._batch_size)
        logits = torch.cat([self._logits(shown[a : a + self._batch_size]) for a in starts])
        # A loss that is not a number must lose every comparison.
        loss = self._loss(logits, y).nan_to_num(nan=-torch.inf)
        return logits.argmax(1) != (y.argmax(1) if y.is_floating_point() else y), loss

    def gradient(self, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """The estimate at ``x``, from directions that ``keys``, shape (N,), and those after name.

        A difference that is not finite counts as zero.
        """
        pairs = self._batch_size // 2
        rows, columns = max(1, pairs // self._samples), min(pairs, self._samples)
        numel = x[0].numel()
        g = torch.zeros_like(x)
        for a in range(0, len(x), rows):
            z, target = x[a : a + rows], y[a : a + rows]
            total = x.new_zeros(len(z), numel)
            for s in range(0, self._samples, columns):
                n = min(columns, self._samples - s)
                of_pairs = keys[a : a + rows, None] + torch.arange(s, s + n, device=x.device)
                signs = rademacher(of_pairs.flatten(), numel, x.dtype)
                change = self._difference(z, target, signs.view(len(z), n, *x.shape[1:]))
                signs.mul_(change.to(x.dtype).unsqueeze(1))
                total += signs.view(len(z), n, numel).sum(1)
            g[a : a + rows] = total.div_(2 * self._delta * self._samples).view_as(z)
        return g

    def _difference(self, x: Tensor, y: Tensor, signs: Tensor) -> Tensor:
        """f(x + delta * v) - f(x - delta * v), shape (N * n,), for ``signs`` of shape (N, n, ...).

        Both sides of all share one forward pass.
        """
        count = signs.shape[0] * signs.shape[1]
        points = torch.empty(
            (2 * count, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=self._layout
        )
        for side, delta in zip(points.chunk(2), (self._delta, -self._delta), strict=True):
            torch.add(x.unsqueeze(1), signs, alpha=delta, out=side.view_as(signs))
        y = y.repeat_interleave(signs.shape[1], 0)
        loss = self._loss(self._logits(points.to(self._dtype)), torch.cat([y, y]))
        up, down = loss.chunk(2)
        return (up - down).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def _logits(self, points: Tensor) -> Tensor:
        with uncached_autocast(points.device.type):
            return self._victim.forward(points)


def rademacher(keys: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent signs, -1 or 1, a row for each key: the same key has the same row anywhere.

    They are the bits of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014), which takes a few operations for 64 of them.

    Args:
        keys: int64, shape (K,).
        numel: signs a row.
        dtype: of the result.

    Returns:
        Shape (K, numel), contiguous.
    """
    words = torch.arange(1, math.ceil(numel / 64) + 1, device=keys.device)
    # Mixed once for the key and once for the word, so that neighbouring keys share nothing.
    z = _mix(_mix(keys * _GAMMA).unsqueeze(1) + words * _GAMMA)
    eight = torch.arange(8, dtype=torch.uint8, device=keys.device)
    bits = z.view(torch.uint8).unsqueeze(2).bitwise_right_shift(eight).bitwise_and_(1)
    return bits.view(len(keys), -1)[:, :numel].to(dtype).mul_(2).sub_(1)


def _signed(word: int) -> int:
    """64 bits as a signed number, which is how tensors hold them."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function, on int64, whose products wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _logical_shift(z, shift)) * _signed(factor)
    return z ^ _logical_shift(z, 31)


def _logical_shift(z: Tensor, by: int) -> Tensor:
    """To the right; an int64's own shift would repeat the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format of a batch, for tensors of another length."""
    if x.is_contiguous():
        return torch.contiguous_format
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == ndim and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format
