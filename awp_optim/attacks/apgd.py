"""Auto-PGD: projected gradient ascent that chooses its own step size."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from awp_optim._utils.checks import check_bool, check_choice, check_int, check_real
from awp_optim.attacks._outcome import select
from awp_optim.attacks.balls import Ball, Projection, per_example_norm
from awp_optim.attacks.base import BallAttack
from awp_optim.attacks.losses import LOSSES, Loss, dlr_targeted
from awp_optim.attacks.oracle import ModelOracle

MOMENTUM = 0.75
TARGETED = "dlr-targeted"
L1_SPARSITY, L1_PERIOD, L1_SHRINK, L1_SHORTEST, L1_SPARSER = 1.5, 0.04, 1.5, 10.0, 0.95
"""Constants of "Mind the box", section 4.2 and appendix C; a period is a fraction of the steps."""


@dataclass(frozen=True)
class APGD(BallAttack):
    """PGD with momentum that halves its step where progress stalls and returns to its best point.

    Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks" (ICML 2020, https://arxiv.org/abs/2003.01690), Algorithm 1; in L_1,
    "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers" (ICML 2021,
    https://arxiv.org/abs/2103.01208): sparse steps inside the intersection of ball and box, with
    radius 3 eps, then 2 eps, then eps. Examples that the model already misclassifies are returned
    unchanged. For the others, the attack returns a misclassified iterate if it found one, otherwise
    the iterate with the highest loss. It costs one forward pass at ``x`` and, per run, ``steps +
    1`` forward and ``steps`` backward passes (in L_1 two more forward passes). See
    :meth:`Attack.__call__` for how to call it; labels are class indices.

    Args:
        eps: radius of the ball, at least 0, in the units of the input. With 0 the clean examples
            are returned and the model is not called.
        steps: at least 1. In L_1, at least 3, because three radii share them.
        norm: "linf", "l2" or "l1".
        loss: "ce", "cw", "dlr" or "dlr-targeted". The last one runs once toward each of the
            ``targets`` most probable wrong classes of the clean example.
        restarts: number of runs per target, each from a random start; at least 1.
        targets: number of target classes for "dlr-targeted", at least 1; limited by the number of
            wrong classes.
        rho: if at most this fraction of the steps between two checkpoints raises the loss, the step
            size is halved; in [0, 1].
        clip: the box (lo, hi) of valid inputs, or None for no box.
        model_mode: "eval" or "train", the mode in which the model is attacked.
        drop_fooled: stop attacking an example at its first misclassified iterate and remove it from
            the batch. The same examples are fooled in less time. On the CPU the attack checks at
            every step; on other devices at checkpoints. Each check waits for the device, so the
            attack cannot be captured as a CUDA graph.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range; when called, the model has too few classes for the
            loss: "cw" needs 2, "dlr" 3, "dlr-targeted" 4.

    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    >>> APGD(eps=0.1, steps=10)(lambda x: x * 3, x, y)
    tensor([[0.4000, 0.6000]])
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    eps: float = 8 / 255
    steps: int = 100
    norm: str = "linf"
    loss: str = "ce"
    restarts: int = 1
    targets: int = 9
    rho: float = 0.75
    clip: tuple[float, float] | None = (0, 1)
    model_mode: str = "eval"
    drop_fooled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, ("ce", "cw", "dlr", TARGETED))
        self._set("steps", check_int("steps", self.steps, least=3 if self.norm == "l1" else 1))
        self._set("restarts", check_int("restarts", self.restarts, least=1))
        self._set("targets", check_int("targets", self.targets, least=1))
        self._set("rho", check_real("rho", self.rho))
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho must be in [0, 1], got {self.rho!r}")
        check_bool("drop_fooled", self.drop_fooled)

    def _search(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None  # checked
        logits = oracle.logits(x)
        self._loss(y)(logits, y)  # raises if there are too few classes, even if all are fooled
        found = _Found.at(x, fooled=logits.argmax(1) != y)
        for target in self._targets(logits, y):
            # Drawn for all examples, so that it does not depend on which were dropped.
            state = _State.at(x, y, target, x + self._start(x))
            if self.drop_fooled:
                state = state.only(~found.fooled)
                if len(state.x) == 0:
                    break
            self._run(oracle, state, found)
        return found.x_adv

    def _loss(self, target: Tensor) -> Loss:
        return partial(dlr_targeted, target=target) if self.loss == TARGETED else LOSSES[self.loss]

    def _targets(self, logits: Tensor, y: Tensor) -> list[Tensor]:
        """The target classes of each run, shape (N,); the labels if the loss is untargeted."""
        if self.loss != TARGETED:
            return [y] * self.restarts
        wrong = logits.float().scatter(1, y.unsqueeze(1), -torch.inf)
        n = min(self.targets, logits.shape[1] - 1)
        targets = wrong.topk(n, dim=1).indices.unbind(1)
        return [target for target in targets for _ in range(self.restarts)]

    def _start(self, x: Tensor) -> Tensor:
        """A random offset on the ball's surface, as the authors draw it; in L_1 of any length."""
        if self.norm == "linf":
            t = 2 * torch.rand_like(x) - 1
            return t * (self.eps / per_example_norm(t, torch.inf).clamp_min(1e-12))
        t = torch.randn_like(x)
        if self.norm == "l1":
            return t
        return t * (self.eps / per_example_norm(t, 2).clamp_min(1e-12))

    def _run(self, oracle: ModelOracle, s: _State, found: _Found) -> None:
        """One run from ``s.x_adv``; in L_1 through three radii."""
        *wider, (eps, steps) = self._stages()
        rows = oracle.subset(s.rows)
        for wide_eps, wide_steps in wider:
            s = self._ascend(rows, s, wide_eps, wide_steps, None)
            s = _State.at(s.x, s.y, s.target, s.best, s.rows)
        found.update(self._ascend(rows, s, eps, steps, found if self.drop_fooled else None))

    def _stages(self) -> list[tuple[float, int]]:
        """The radii and the number of steps with each."""
        if self.norm != "l1":
            return [(self.eps, self.steps)]
        n = math.ceil(0.3 * self.steps)
        return [(3 * self.eps, n), (2 * self.eps, n), (self.eps, max(1, self.steps - 2 * n))]

    def _ascend(
        self, oracle: ModelOracle, s: _State, eps: float, steps: int, dropped: _Found | None
    ) -> _State:
        """Algorithm 1 in a ball of radius ``eps``; fooled examples go to ``dropped`` if given."""
        rule = self._rule(eps, steps)
        project = self._ball.projection(s.x, eps, self.clip)
        s.x_adv = s.x_previous = project(s.x_adv)
        s.update(*self._evaluate(oracle, s))
        rule.begin(s)
        for i in range(steps):
            may_read = s.x.device.type == "cpu" or i in rule.checkpoints
            if dropped and may_read and bool(s.fooled.any()):
                dropped.update(s.only(s.fooled))
                s, oracle = s.only(~s.fooled), oracle.subset(~s.fooled)
                if len(s.x) == 0:
                    break
                project = self._ball.projection(s.x, eps, self.clip)
            x_new = rule.propose(s, project, is_first=i == 0)
            s.x_previous, s.x_adv = s.x_adv, x_new
            s.update(*self._evaluate(oracle, s, with_gradient=i < steps - 1))
            if i + 1 in rule.checkpoints:
                rule.check(s, i + 1)
        return s

    def _rule(self, eps: float, steps: int) -> _Halving | _Sparse:
        if self.norm == "l1":
            return _Sparse(eps, steps)
        return _Halving(self._ball, eps, steps, self.rho)

    def _evaluate(
        self, oracle: ModelOracle, s: _State, *, with_gradient: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, losses and gradients at the iterate."""
        loss = self._loss(s.target)
        if with_gradient:
            return oracle.evaluate_point(s.x_adv, loss, s.y)
        logits = oracle.logits(s.x_adv)
        return logits, loss(logits, s.y), s.g


@dataclass
class _State:
    """The state of a run, one row for each example in it."""

    rows: Tensor  # the examples' indices in the batch
    x: Tensor
    y: Tensor
    target: Tensor
    x_adv: Tensor  # the iterate
    x_previous: Tensor
    g: Tensor
    loss: Tensor
    best: Tensor
    best_g: Tensor
    best_loss: Tensor
    fooled: Tensor
    misclassified: Tensor  # the latest misclassified iterate, if fooled
    step: Tensor  # step size
    rises: Tensor  # number of steps that raised the loss since the last checkpoint
    checkpoint_loss: Tensor  # the best loss at the last checkpoint
    not_halved: Tensor  # whether the step size was kept there
    sparsity: Tensor  # fraction of the elements that a step changes, in L_1
    changed: Tensor  # number of elements in which the best point differs from x, in L_1

    @classmethod
    def at(
        cls, x: Tensor, y: Tensor, target: Tensor, x_adv: Tensor, rows: Tensor | None = None
    ) -> _State:
        """The state before the first evaluation."""
        n = len(x)
        none = torch.full((n,), -torch.inf, dtype=x.dtype, device=x.device)
        zero = torch.zeros(n, dtype=x.dtype, device=x.device)
        no = torch.zeros(n, dtype=torch.bool, device=x.device)
        return cls(
            rows=torch.arange(n, device=x.device) if rows is None else rows,
            x=x,
            y=y,
            target=target,
            x_adv=x_adv,
            x_previous=x_adv,
            g=torch.zeros_like(x),
            loss=none,
            best=x_adv,
            best_g=torch.zeros_like(x),
            best_loss=none,
            fooled=no,
            misclassified=x_adv,
            step=zero,
            rises=zero,
            checkpoint_loss=none,
            not_halved=no,
            sparsity=zero,
            changed=zero,
        )

    def only(self, kept: Tensor) -> _State:
        """The state of the examples in a mask."""
        return _State(*(getattr(self, f.name)[kept] for f in dataclasses.fields(self)))

    def update(self, logits: Tensor, loss: Tensor, g: Tensor) -> None:
        """Record an evaluation of the model at the iterate."""
        loss = loss.to(self.best_loss.dtype)  # NaN loses every comparison
        self.rises = self.rises + (loss > self.loss)
        self.loss, self.g = loss, g
        wrong = logits.argmax(1) != self.y
        self.misclassified = select(wrong, self.x_adv, self.misclassified)
        self.fooled = self.fooled | wrong
        better = loss > self.best_loss
        self.best = select(better, self.x_adv, self.best)
        self.best_g = select(better, g, self.best_g)
        self.best_loss = torch.where(better, loss, self.best_loss)

    def return_to_best(self, which: Tensor) -> None:
        self.x_adv = select(which, self.best, self.x_adv)
        self.g = select(which, self.best_g, self.g)


@dataclass
class _Found:
    """The worst adversarial example of each example over all runs."""

    x_adv: Tensor
    loss: Tensor
    fooled: Tensor

    @classmethod
    def at(cls, x: Tensor, fooled: Tensor) -> _Found:
        loss = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        return cls(x.clone(), loss, fooled)

    def update(self, s: _State) -> None:
        """Keep a run's results where they are worse than the previous ones."""
        rows = s.rows
        worse = ~self.fooled[rows] & (s.fooled | (s.best_loss > self.loss[rows]))
        x_adv = select(s.fooled, s.misclassified, s.best)
        self.x_adv[rows] = select(worse, x_adv, self.x_adv[rows])
        self.loss[rows] = torch.where(worse, s.best_loss, self.loss[rows])
        self.fooled[rows] |= s.fooled


class _Halving:
    """L_inf and L_2: steps of 2 eps with momentum, halved at checkpoints without progress."""

    def __init__(self, ball: Ball, eps: float, steps: int, rho: float) -> None:
        self._ball, self._eps, self._rho = ball, eps, rho
        self.checkpoints = checkpoints(steps)

    def begin(self, s: _State) -> None:
        s.step = torch.full_like(s.step, 2 * self._eps)
        s.rises, s.checkpoint_loss = torch.zeros_like(s.rises), s.best_loss

    def propose(self, s: _State, project: Projection, *, is_first: bool) -> Tensor:
        """3/4 of a projected step of steepest ascent plus 1/4 of the previous move, projected."""
        z = project(s.x_adv + _like(s.step, s.x) * self._ball.ascent(s.g))
        if is_first:
            return z
        previous_move = s.x_adv - s.x_previous
        return project(s.x_adv + MOMENTUM * (z - s.x_adv) + (1 - MOMENTUM) * previous_move)

    def check(self, s: _State, step: int) -> None:
        """Section 3.1: halve if few steps raised the loss, or none since an unhalved checkpoint."""
        previous = max((w for w in self.checkpoints if w < step), default=0)
        stalled = s.rises <= self._rho * (step - previous)
        stalled = stalled | (s.not_halved & (s.checkpoint_loss >= s.best_loss))
        s.step = torch.where(stalled, s.step / 2, s.step)
        s.return_to_best(stalled)
        s.not_halved, s.checkpoint_loss = ~stalled, s.best_loss
        s.rises = torch.zeros_like(s.rises)


class _Sparse:
    """L_1: steps along the largest entries of the gradient; the best point decides how many."""

    def __init__(self, eps: float, steps: int) -> None:
        self._eps = eps
        period = max(int(L1_PERIOD * steps), 1)
        self.checkpoints = range(period, steps + 1, period)

    def begin(self, s: _State) -> None:
        s.step = torch.full_like(s.step, self._eps)
        self._set_sparsity(s, _changed(s.x_adv, s.x))

    def propose(self, s: _State, project: Projection, *, is_first: bool) -> Tensor:
        """A projected step of L_1 length ``s.step``, evenly over the largest entries."""
        g = s.g.reshape(len(s.x), -1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        n = g.shape[1]
        rank = ((1 - s.sparsity) * n).clamp(0, n - 1).long().unsqueeze(1)
        least = g.abs().sort(1).values.gather(1, rank)
        sign = g.sign() * (g.abs() >= least)
        sign = sign / sign.abs().sum(1, keepdim=True).clamp_min(1)
        return project(s.x_adv + _like(s.step, s.x) * sign.view_as(s.x))

    def check(self, s: _State, step: int) -> None:
        """Shrink the step, or restart from the best point with the full step if it got sparser."""
        changed = _changed(s.best, s.x)
        sparser = changed < L1_SPARSER * s.changed
        shrunk = torch.where(sparser, self._eps, s.step / L1_SHRINK)
        s.step = shrunk.clamp(self._eps / L1_SHORTEST, self._eps)
        self._set_sparsity(s, changed)
        s.return_to_best(sparser)

    def _set_sparsity(self, s: _State, changed: Tensor) -> None:
        s.changed, s.sparsity = changed, changed / s.x[0].numel() / L1_SPARSITY


def checkpoints(steps: int) -> list[int]:
    """The steps w_j after which the step size is reviewed (section 3.1).

    The first period is 22% of ``steps``. Each one is shorter than the previous one by 3% of
    ``steps``, but at least 6%.

    >>> checkpoints(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    at, period, found = 0, max(int(0.22 * steps), 1), []
    while at + period <= steps:
        at += period
        found.append(at)
        period = max(period - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return found


def _changed(z: Tensor, x: Tensor) -> Tensor:
    return (z != x).reshape(len(x), -1).sum(1).to(x.dtype)


def _like(t: Tensor, x: Tensor) -> Tensor:
    """One number for each example, shaped to broadcast over ``x``."""
    return t.view(-1, *[1] * (x.ndim - 1))
