"""SPSA: an attack that estimates gradients from logits only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from awp_optim._utils.checks import check_bool, check_choice, check_int, check_positive
from awp_optim.attacks._outcome import Outcome, judge, select
from awp_optim.attacks.base import BallAttack
from awp_optim.attacks.losses import LOSSES, Labels, labels_of
from awp_optim.attacks.oracle import ModelOracle, uncached_autocast

BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8  # Adam's, as its authors set them
BATCH_SIZE = {"cpu": 32}
"""The default ``batch_size``, which fits into a processor's caches; 512 on other devices."""


@dataclass(frozen=True)
class SPSA(BallAttack):
    """A gradient-free attack: differences of the loss along random directions, maximized by Adam.

    Uesato et al., "Adversarial risk and the dangers of evaluating against weak attacks"
    (ICML 2018, https://arxiv.org/abs/1802.05666), Algorithm 1. It starts at the clean example. In
    every step it estimates the gradient from ``samples`` directions v of independent random signs,

        g = mean_v (f(x + delta * v) - f(x - delta * v)) / (2 * delta) * v,

    takes Adam's step and projects. It only needs logits, so the forward pass may be quantized,
    stochastic or under ``no_grad``. If SPSA succeeds where PGD fails, gradients are masked. The
    query points lie up to ``delta`` outside ball and box, as in the authors' code; the iterates lie
    inside. The defaults are those of Wu et al. (NeurIPS 2020, Section 5.2). See
    :meth:`Attack.__call__` for how to call it.

    It costs one forward pass per example, and ``2 * samples + 1`` more in each step. Each example
    keeps its worst iterate: misclassified first, then the highest loss. An example's random
    directions do not depend on the other examples or on ``batch_size``.

    Args:
        eps: radius of the ball, at least 0, in the units of the input. With 0 the clean examples
            are returned and the model is not called.
        steps: at least 0.
        delta: half the distance between the two query points, in each element, above 0. The dtype
            of ``x`` must resolve it: at least 0.001 for float16 and 0.0079 for bfloat16. With
            float32 inputs, a model in half precision or under autocast rounds the difference, which
            makes the estimate worse.
        lr: Adam's learning rate, above 0: about how far an element moves in a step, in either norm.
        samples: directions per estimate, at least 1; each takes two forward passes.
        norm: "linf" or "l2".
        loss: the loss to maximize: "cw", "ce" or "dlr". Not "kl", which has its minimum at the
            clean example, where the estimate is zero.
        clip: the box (lo, hi) of valid inputs, or None for no box.
        model_mode: "eval" or "train", the mode in which the model is attacked. In train mode,
            BatchNorm mixes the images in a forward pass.
        batch_size: images per forward pass, at least 2. It bounds the memory, independently of the
            batch and of ``samples``, and changes results only by rounding. None means 32 on the CPU
            and 512 elsewhere.
        drop_fooled: stop attacking an example at its first misclassified iterate, as the authors
            do. On the CPU it then costs no more passes; on other devices it remains in the batch,
            because checking would wait for the device. With False, the attack continues to a higher
            loss, and fools the same examples.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range; when called, ``delta`` is too small for x's dtype.

    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    >>> SPSA(eps=0.1, steps=20)(lambda x: x * 3, x, y)
    tensor([[0.4900, 0.5100]])
    """

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
        check_choice("loss", self.loss, ("cw", "ce", "dlr"))
        self._set("delta", check_positive("delta", self.delta))
        self._set("lr", check_positive("lr", self.lr))
        self._set("steps", check_int("steps", self.steps, least=0))
        self._set("samples", check_int("samples", self.samples, least=1))
        if self.batch_size is not None:
            self._set("batch_size", check_int("batch_size", self.batch_size, least=2))
        check_bool("drop_fooled", self.drop_fooled)

    @property
    def uses_gradients(self) -> bool:
        return False

    @property
    def labels(self) -> Labels:
        return labels_of(self.loss)

    def check_inputs(self, x: Tensor, y: Tensor | None) -> None:
        super().check_inputs(x, y)
        finest = torch.finfo(x.dtype).eps
        if self.delta < finest:
            raise ValueError(
                f"delta={self.delta:g} is too small for {x.dtype}, whose numbers near 1 are up to"
                f" {finest:.2g} apart: pass x.float() and a float32 model, or set delta to"
                f" {finest:.2g} or more"
            )

    def _search(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        project, queries = self._projection(x), _Queries(self, oracle, _layout(x))
        may_drop = self.drop_fooled and x.device.type == "cpu"
        worst = x.clone()
        rows = torch.arange(len(x), device=x.device)  # the examples that remain in x
        keys = torch.randint(2**63 - 1, (len(x),), device=x.device)
        x_adv, m, v = x, torch.zeros_like(x), torch.zeros_like(x)
        kept = queries.outcome(x_adv)
        for i in range(self.steps):
            if may_drop and bool(kept.fooled.any()):
                left = ~kept.fooled
                rows, keys, x, x_adv, m, v = (t[left] for t in (rows, keys, x, x_adv, m, v))
                if len(x) == 0:
                    break
                kept = Outcome(*(t[left] for t in kept))
                project, queries = self._projection(x), queries.subset(left)
            g = queries.gradient(x_adv, keys + i * self.samples)
            m.lerp_(g, 1 - BETA1)
            v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            scale = v.div(1 - BETA2 ** (i + 1)).sqrt_().add_(ADAM_EPS)
            x_adv = project(x_adv.addcdiv(m, scale, value=self.lr / (1 - BETA1 ** (i + 1))))
            outcome = queries.outcome(x_adv)
            worse = outcome.worse_than(kept)
            if self.drop_fooled:
                worse &= ~kept.fooled
            worst[rows] = select(worse, x_adv, worst[rows])
            kept = kept.replace(worse, outcome)
        return worst


@dataclass
class _Queries:
    """Queries to the model, ``batch_size`` images at a time."""

    attack: SPSA
    oracle: ModelOracle
    layout: torch.memory_format

    def __post_init__(self) -> None:
        self._loss = LOSSES[self.attack.loss]
        device = self.oracle.x.device.type
        self._batch_size = self.attack.batch_size or BATCH_SIZE.get(device, 512)

    def subset(self, rows: Tensor) -> _Queries:
        """The queries for some of the examples."""
        return dataclasses.replace(self, oracle=self.oracle.subset(rows))

    def outcome(self, x_adv: Tensor) -> Outcome:
        """Whether each example is misclassified, and its loss."""
        batches = torch.split(self.oracle.as_input(x_adv), self._batch_size)
        return judge(torch.cat([self._logits(b.clone()) for b in batches]), self._y, self._loss)

    def gradient(self, x: Tensor, keys: Tensor) -> Tensor:
        """The estimate at ``x``; ``keys``, shape (N,), determine its random directions.

        Non-finite differences count as zero.
        """
        samples = self.attack.samples
        pairs = self._batch_size // 2
        rows, columns = max(1, pairs // samples), min(pairs, samples)
        numel = x[0].numel()
        g = torch.zeros_like(x)
        for a in range(0, len(x), rows):
            z, y = x[a : a + rows], self._y[a : a + rows]
            total = x.new_zeros(len(z), numel)
            for s in range(0, samples, columns):
                n = min(columns, samples - s)
                sample_keys = keys[a : a + rows, None] + torch.arange(s, s + n, device=x.device)
                signs = rademacher(sample_keys.flatten(), numel, x.dtype)
                change = self.difference(z, y, signs.view(len(z), n, *x.shape[1:]))
                signs.mul_(change.to(x.dtype).unsqueeze(1))
                total += signs.view(len(z), n, numel).sum(1)
            g[a : a + rows] = total.div_(2 * self.attack.delta * samples).view_as(z)
        return g

    def difference(self, x: Tensor, y: Tensor, signs: Tensor) -> Tensor:
        """f(x + delta * v) - f(x - delta * v), shape (N * n,), for ``signs`` of shape (N, n, ...).

        All points share one forward pass.
        """
        n, delta = signs.shape[1], self.attack.delta
        points = torch.empty(
            (2 * len(x) * n, *x.shape[1:]),
            dtype=x.dtype,
            device=x.device,
            memory_format=self.layout,
        )
        for side, alpha in zip(points.chunk(2), (delta, -delta), strict=True):
            torch.add(x.unsqueeze(1), signs, alpha=alpha, out=side.view_as(signs))
        y = y.repeat_interleave(n, 0)
        losses = self._loss(self._logits(points.to(self.oracle.x.dtype)), torch.cat([y, y]))
        up, down = losses.chunk(2)
        return (up - down).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    @property
    def _y(self) -> Tensor:
        assert self.oracle.y is not None  # checked
        return self.oracle.y

    def _logits(self, points: Tensor) -> Tensor:
        with uncached_autocast(points.device.type):
            return self.oracle.forward(points)


def rademacher(keys: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent signs, -1 or 1, in one row per key, which determines the row.

    They are bits of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014), which computes 64 bits in a few operations.

    Args:
        keys: int64, shape (K,).
        numel: signs per row.
        dtype: of the result.

    Returns:
        Shape (K, numel), contiguous.
    """
    words = torch.arange(1, math.ceil(numel / 64) + 1, device=keys.device)
    # Mixed once for the key and once for the word, so that neighboring keys are independent.
    z = _mix(_mix(keys * _GAMMA).unsqueeze(1) + words * _GAMMA)
    shifts = torch.arange(8, dtype=torch.uint8, device=keys.device)
    bits = z.view(torch.uint8).unsqueeze(2).bitwise_right_shift(shifts).bitwise_and_(1)
    return bits.view(len(keys), -1)[:, :numel].to(dtype).mul_(2).sub_(1)


def _signed(word: int) -> int:
    """64 bits as a signed integer."""
    return word - (1 << 64) if word >> 63 else word


_GAMMA = _signed(0x9E3779B97F4A7C15)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function, in int64 arithmetic that wraps around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _logical_shift(z, shift)) * _signed(factor)
    return z ^ _logical_shift(z, 31)


def _logical_shift(z: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros; the shift of an int64 would repeat the sign bit."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format of a batch, for batches of other sizes."""
    if x.is_contiguous():
        return torch.contiguous_format
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == ndim and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format
