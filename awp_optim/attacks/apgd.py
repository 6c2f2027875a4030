"""Auto-PGD: projected gradient ascent that chooses its own step size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from awp_optim._utils.checks import check_int, check_real

from .ascent import BallAttack
from .balls import Ball, Projection, per_example_norm
from .base import ModelOracle
from .losses import LOSSES, Loss, dlr_targeted

MOMENTUM = 0.75
TARGETED = "dlr-targeted"
# Of L1 ("Mind the box", section 4.2 and appendix C): sparsity, looked at every 4% of the steps.
SPARSITY, LOOK, SHORTER, SHORTEST, CHANGED = 1.5, 0.04, 1.5, 10.0, 0.95


@dataclass(frozen=True)
class APGD(BallAttack):
    """PGD with momentum that halves its step where it stalls, and goes on from its best point.

    Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks" (ICML 2020, https://arxiv.org/abs/2003.01690), Algorithm 1; in L_1
    "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers" (ICML 2021,
    https://arxiv.org/abs/2103.01208): sparse steps inside the ball cut by the box, the radius
    falling from 3 eps over 2 eps to eps. An image that the model gets wrong as it is comes back as
    it is. The others come back at a misclassified iterate if there was one, else at the highest
    loss seen. It costs ``steps + 1`` forward and ``steps`` backward passes a run, in L_1 two
    forward passes more, and one forward pass at ``x``. How to call it: see
    :meth:`Attack.__call__`; labels are class indices.

    Args:
        eps: radius of the ball, at least 0, in the units of the input. At 0 the input is returned
            as it is and the model is not called.
        steps: at least 1. In L_1, where three radii share them, at least 3.
        norm: "linf", "l2" or "l1".
        loss: "ce", "cw", "dlr" or "dlr-targeted". The last climbs toward each of ``targets``
            classes, the most probable wrong ones of the image as it is, in a run of its own.
        restarts: runs, each from a random start; of each target. At least 1.
        targets: of "dlr-targeted", at least 1; there cannot be more than classes less one.
        rho: share of a period's steps that must raise the loss, or the step is halved; in [0, 1].
        clip: the box (lo, hi) of valid inputs, or None for no box.
        model_mode: "eval" or "train", the mode in which the model is attacked.
        drop_fooled: leave examples at their first misclassified iterate and out of the batch from
            then on. Who is fooled stays the same, the time is that of those who stand. On the CPU
            the attack looks at every step; elsewhere at checkpoints, and each look waits for the
            device, so it cannot be in a CUDA graph.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range; when called, the model has too few classes for the
            loss: 2 for "cw", 3 for "dlr", 4 for "dlr-targeted".

    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    >>> APGD(eps=0.1, steps=10)(lambda x: x * 3, x, y)
    tensor([[0.4000, 0.6000]])
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    losses: ClassVar[tuple[str, ...]] = ("ce", "cw", "dlr", TARGETED)

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
        self._set("steps", check_int("steps", self.steps, least=3 if self.norm == "l1" else 1))
        self._set("restarts", check_int("restarts", self.restarts, least=1))
        self._set("targets", check_int("targets", self.targets, least=1))
        self._set("rho", check_real("rho", self.rho))
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho must be in [0, 1], got {self.rho!r}")
        if not isinstance(self.drop_fooled, bool):
            raise TypeError(f"drop_fooled must be True or False, got {self.drop_fooled!r}")

    def _takes_probabilities(self) -> bool:
        return False

    def _search(
        self, oracle: ModelOracle, x: Tensor, y: Tensor | None, project: Projection
    ) -> Tensor:
        assert y is not None  # _check saw to it
        logits = oracle.logits(x)
        fooled = logits.argmax(1) != y
        x_adv, loss = x.clone(), torch.full_like(logits[:, 0], -torch.inf, dtype=torch.float32)
        runs = list(self._runs(logits, y))
        self._loss(runs[0])(logits, y)  # refuses too few classes, whoever is fooled
        for i, target in enumerate(runs):
            start = x + self._start(x)  # of all examples, that none's depends on the others
            rows = torch.arange(len(x), device=x.device)
            if self.drop_fooled:
                rows = rows[~fooled]
                if len(rows) == 0:
                    break
            of_rows = None if target is None else target[rows]
            of_victim = oracle.only(rows)
            end = self._run(
                of_victim, x[rows], y[rows], of_rows, start[rows], last=i == len(runs) - 1
            )
            was = fooled[rows]
            better = ~was & (end.fooled | (end.loss > loss[rows]))
            x_adv[rows] = torch.where(_like(better, x), end.x_adv, x_adv[rows])
            loss[rows] = torch.where(better, end.loss.to(loss.dtype), loss[rows])
            fooled[rows] = was | end.fooled
        return x_adv

    def _runs(self, logits: Tensor, y: Tensor) -> Iterator[Tensor | None]:
        """What each run aims at: classes of shape (N,), or None for any but the label."""
        if self.loss != TARGETED:
            yield from [None] * self.restarts
            return
        wrong = logits.float().scatter(1, y.unsqueeze(1), -torch.inf)
        n = min(self.targets, logits.shape[1] - 1)
        for target in wrong.topk(max(n, 0), dim=1).indices.unbind(1):
            yield from [target] * self.restarts
        if n <= 0:
            yield y  # for the loss to say what is wrong

    def _start(self, x: Tensor) -> Tensor:
        """A random offset: on the ball's surface, as the authors draw it; in L_1 not yet cut."""
        if self.norm == "linf":
            t = 2 * torch.rand_like(x) - 1
            return t * (self.eps / per_example_norm(t, torch.inf).clamp_min(1e-12))
        t = torch.randn_like(x)
        if self.norm == "l1":
            return t
        return t * (self.eps / per_example_norm(t, 2).clamp_min(1e-12))

    def _run(
        self,
        oracle: ModelOracle,
        x: Tensor,
        y: Tensor,
        target: Tensor | None,
        start: Tensor,
        last: bool,
    ) -> _End:
        if self.norm != "l1":
            return self._climb_alone(oracle, x, y, target, start, self.eps, self.steps, last)
        third = math.ceil(0.3 * self.steps)
        for scale, steps in ((3, third), (2, third)):
            end = self._climb_alone(oracle, x, y, target, start, scale * self.eps, steps, False)
            start = end.best
        return self._climb_alone(
            oracle, x, y, target, start, self.eps, max(1, self.steps - 2 * third), last
        )

    def _climb_alone(
        self,
        oracle: ModelOracle,
        x: Tensor,
        y: Tensor,
        target: Tensor | None,
        start: Tensor,
        eps: float,
        steps: int,
        last: bool,
    ) -> _End:
        """Algorithm 1 from one start, in a ball of radius ``eps``."""
        rule: _Sparse | _Halving
        if self.norm == "l1":
            rule = _Sparse(eps, steps)
        else:
            rule = _Halving(self._ball, eps, steps, self.rho)
        drop = self.drop_fooled and eps == self.eps
        look_always = x.device.type == "cpu"
        end = _End.at(x)
        project = self._ball.projection(x, eps, self.clip)
        s = _State.at(x, y, target, project(start))
        s.see(*oracle.evaluate_point(s.x_adv, self._loss(s.target), s.y, last=last and steps == 1))
        rule.begin(s)
        for i in range(steps):
            if drop and (look_always or i in rule.checkpoints) and bool(s.fooled.any()):
                end.note(s)
                stands = ~s.fooled
                s, oracle = s.only(stands), oracle.only(stands)
                if len(s.x) == 0:
                    return end
                project = self._ball.projection(s.x, eps, self.clip)
            x_new = rule.propose(s, project, first=i == 0)
            s.x_old, s.x_adv = s.x_adv, x_new
            if i == steps - 1:  # nothing climbs from here
                logits = oracle.logits(s.x_adv)
                s.see(logits, self._loss(s.target)(logits, s.y), s.g)
            else:
                s.see(
                    *oracle.evaluate_point(
                        s.x_adv, self._loss(s.target), s.y, last=last and i == steps - 2
                    )
                )
            if i + 1 in rule.checkpoints:
                rule.check(s, i + 1)
        end.note(s)
        return end

    def _loss(self, target: Tensor | None) -> Loss:
        if self.loss == TARGETED:
            assert target is not None  # _runs gives one
            return partial(dlr_targeted, target=target)
        return LOSSES[self.loss]


@dataclass
class _State:
    """Of one run, a row an example: the iterate, the best point, and what the rule needs."""

    rows: Tensor
    x: Tensor
    y: Tensor
    target: Tensor
    x_adv: Tensor
    x_old: Tensor
    g: Tensor
    loss: Tensor
    best: Tensor
    best_g: Tensor
    best_loss: Tensor
    fooled: Tensor
    fooling: Tensor  # a misclassified iterate, where there is one
    step: Tensor
    rises: Tensor  # steps that raised the loss since the last checkpoint
    checked_loss: Tensor  # the best at the last checkpoint
    spared: Tensor  # whether the step was not halved there
    sparsity: Tensor  # share of elements that a step moves, in L_1
    moved: Tensor  # elements in which the best point differs from x, in L_1

    @classmethod
    def at(cls, x: Tensor, y: Tensor, target: Tensor | None, x_adv: Tensor) -> _State:
        n, real_dtype = len(x), x.dtype
        none = torch.full((n,), -torch.inf, dtype=real_dtype, device=x.device)
        no = torch.zeros(n, dtype=torch.bool, device=x.device)
        zero = torch.zeros(n, dtype=real_dtype, device=x.device)
        return cls(
            rows=torch.arange(n, device=x.device),
            x=x,
            y=y,
            target=y if target is None else target,
            x_adv=x_adv,
            x_old=x_adv,
            g=torch.zeros_like(x),
            loss=none,
            best=x_adv,
            best_g=torch.zeros_like(x),
            best_loss=none,
            fooled=no,
            fooling=x_adv,
            step=zero,
            rises=zero,
            checked_loss=none,
            spared=no,
            sparsity=zero,
            moved=zero,
        )

    def only(self, kept: Tensor) -> _State:
        """The rows that ``kept`` names."""
        parts = {f.name: getattr(self, f.name)[kept] for f in dataclasses.fields(self)}
        return _State(**parts)

    def see(self, logits: Tensor, loss: Tensor, g: Tensor) -> None:
        """Take note of what the model says at the iterate."""
        loss = loss.to(self.best_loss.dtype)  # one that is not a number loses every comparison
        self.rises = self.rises + (loss > self.loss)
        self.loss, self.g = loss, g
        wrong = logits.argmax(1) != self.y
        self.fooling = torch.where(_like(wrong, self.x), self.x_adv, self.fooling)
        self.fooled = self.fooled | wrong
        better = loss > self.best_loss
        self.best = torch.where(_like(better, self.x), self.x_adv, self.best)
        self.best_g = torch.where(_like(better, self.x), g, self.best_g)
        self.best_loss = torch.where(better, loss, self.best_loss)

    def back_to_best(self, which: Tensor) -> None:
        self.x_adv = torch.where(_like(which, self.x), self.best, self.x_adv)
        self.g = torch.where(_like(which, self.x), self.best_g, self.g)


@dataclass
class _End:
    """What came of a run, for each example it began with."""

    x_adv: Tensor  # misclassified if the example was fooled, else the best
    best: Tensor
    loss: Tensor
    fooled: Tensor

    @classmethod
    def at(cls, x: Tensor) -> _End:
        n = len(x)
        loss = torch.full((n,), -torch.inf, dtype=x.dtype, device=x.device)
        return cls(x.clone(), x.clone(), loss, torch.zeros(n, dtype=torch.bool, device=x.device))

    def note(self, s: _State) -> None:
        self.x_adv[s.rows] = torch.where(_like(s.fooled, s.x), s.fooling, s.best)
        self.best[s.rows] = s.best
        self.loss[s.rows] = s.best_loss
        self.fooled[s.rows] = s.fooled


class _Halving:
    """L_inf and L_2: steps of 2 eps with momentum, halved at checkpoints where they do not help."""

    def __init__(self, ball: Ball, eps: float, steps: int, rho: float) -> None:
        self._ball, self._eps, self._rho = ball, eps, rho
        self.checkpoints = checkpoints(steps)

    def begin(self, s: _State) -> None:
        s.step = torch.full_like(s.step, 2 * self._eps)
        s.rises, s.checked_loss = torch.zeros_like(s.rises), s.best_loss

    def propose(self, s: _State, project: Projection, first: bool) -> Tensor:
        """A projected step of steepest ascent, then three parts of it and one of the last move."""
        z = project(s.x_adv + _like(s.step, s.x) * self._ball.ascent(s.g))
        if first:
            return z
        return project(s.x_adv + MOMENTUM * (z - s.x_adv) + (1 - MOMENTUM) * (s.x_adv - s.x_old))

    def check(self, s: _State, at: int) -> None:
        """Section 3.1: few steps raised the loss, or none since a checkpoint without a halving."""
        before = [0, *(w for w in self.checkpoints if w < at)][-1]
        stalled = s.rises <= self._rho * (at - before)
        stalled = stalled | (s.spared & (s.checked_loss >= s.best_loss))
        s.step = torch.where(stalled, s.step / 2, s.step)
        s.back_to_best(stalled)
        s.spared, s.checked_loss, s.rises = ~stalled, s.best_loss, torch.zeros_like(s.rises)


class _Sparse:
    """L_1: steps along the largest entries of the gradient, as many as the best point suggests."""

    def __init__(self, eps: float, steps: int) -> None:
        self._eps = eps
        self.checkpoints = range(every := max(int(LOOK * steps), 1), steps + 1, every)

    def begin(self, s: _State) -> None:
        s.step = torch.full_like(s.step, self._eps)
        s.moved = _moved(s.x_adv, s.x)
        s.sparsity = s.moved / s.x[0].numel() / SPARSITY

    def propose(self, s: _State, project: Projection, first: bool) -> Tensor:
        g = s.g.reshape(len(s.x), -1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        n = g.shape[1]
        rank = ((1 - s.sparsity) * n).clamp(0, n - 1).long().unsqueeze(1)
        least = g.abs().sort(1).values.gather(1, rank)
        sign = g.sign() * (g.abs() >= least)
        sign = sign / sign.abs().sum(1, keepdim=True).clamp_min(1)
        return project(s.x_adv + _like(s.step, s.x) * sign.view_as(s.x))

    def check(self, s: _State, at: int) -> None:
        moved = _moved(s.best, s.x)
        sparser = moved < CHANGED * s.moved
        step = torch.where(sparser, self._eps, s.step / SHORTER)
        s.step = step.clamp(self._eps / SHORTEST, self._eps)
        s.moved, s.sparsity = moved, moved / s.x[0].numel() / SPARSITY
        s.back_to_best(sparser)


def checkpoints(steps: int) -> list[int]:
    """The steps w_j after which the step size is looked at (section 3.1).

    The first 22% of ``steps``, then periods that are shorter by 3% each, of 6% at least.

    >>> checkpoints(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    at, period, found = 0, max(int(0.22 * steps), 1), []
    while at + period <= steps:
        at += period
        found.append(at)
        period = max(period - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return found


def _moved(z: Tensor, x: Tensor) -> Tensor:
    return (z != x).reshape(len(x), -1).sum(1).to(x.dtype)


def _like(t: Tensor, x: Tensor) -> Tensor:
    """A number an example, shaped to go with ``x``."""
    return t.view(-1, *[1] * (x.ndim - 1))
