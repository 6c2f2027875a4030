"""Projected gradient descent (PGD), the usual attack of adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awp_optim._utils.checks import check_bool, check_int, check_positive
from awp_optim.attacks._outcome import Outcome, comparable, judge, select
from awp_optim.attacks.balls import Projection
from awp_optim.attacks.gradient_ascent import GradientAscentAttack
from awp_optim.attacks.losses import Loss, compares_with_clean, loss_function
from awp_optim.attacks.oracle import ModelOracle


@dataclass(frozen=True, repr=False)
class PGD(GradientAscentAttack):
    """``steps`` steps of projected steepest ascent from a random start; returns the last iterate.

    Madry et al., "Towards deep learning models resistant to adversarial attacks" (ICLR 2018);
    Eq. (14) and lines 6 to 9 of Algorithm 2 of Wu et al., "Adversarial weight perturbation helps
    robust generalization" (NeurIPS 2020). With ``loss="kl"`` it is Eq. (16), the attack of TRADES.
    It costs ``steps`` forward and backward passes per restart, one forward pass for "kl" and
    "score", and one forward pass per restart if there are several. See :meth:`Attack.__call__` for
    how to call it.

    Args:
        eps: radius of the ball, at least 0, in the units of the input. With 0 the clean examples
            are returned and the model is not called.
        step_size: eta_1, length of a step in the same norm, above 0.
        steps: K_1, at least 0. With 0 the random start is returned.
        norm: "linf" or "l2".
        loss: the loss to maximize: "ce", "kl", "score", "cw", "dlr" or a function
            ``loss(logits, target)``. The function gets the model's output, of any shape
            (N, ...), and ``y``, a tensor with N rows such as labels, embeddings or regression
            targets; it returns one number per example, shape (N,). A lambda
            works, but then the attack cannot be pickled.
        random_start: start at a random point of the ball, not at the clean example. The point is
            drawn from torch's global generator: :func:`torch.manual_seed` makes calls repeatable.
        restarts: number of random starts, at least 1. Each example keeps its worst outcome:
            misclassified first, then the highest loss; for "kl", "score" and custom losses, only
            the highest loss. If labels are probabilities, the most probable class counts.
        clip: the box (lo, hi) of valid inputs, or None for no box.
        model_mode: "eval" or "train", the mode in which the model is attacked.
        start_std: start at the clean example plus Gaussian noise of this standard deviation,
            projected; above 0. TRADES and MART train with 0.001. None starts anywhere in the ball.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or ``random_start=False`` is combined with several
            restarts, which would all be the same, with "kl" or "score", whose gradient is zero
            at the clean example, or with ``start_std``.

    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    >>> PGD(eps=0.1, step_size=0.05)(lambda x: x * 3, x, y)
    tensor([[0.4000, 0.6000]])

    An attack that moves embeddings as far as possible from those of the clean examples:

    >>> def distance(z, target):
    ...     return (z - target).square().sum(1)
    >>> attack = PGD(eps=0.1, step_size=0.05, loss=distance)
    >>> encoder = torch.nn.Linear(2, 8)
    >>> x_adv = attack(encoder, x, encoder(x))
    """

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    norm: str = "linf"
    loss: str | Loss = "ce"
    random_start: bool = True
    restarts: int = 1
    clip: tuple[float, float] | None = (0, 1)
    model_mode: str = "eval"
    start_std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_step_size()
        self._set("steps", check_int("steps", self.steps, least=0))
        self._set("restarts", check_int("restarts", self.restarts, least=1))
        check_bool("random_start", self.random_start)
        if self.start_std is not None:
            self._set("start_std", check_positive("start_std", self.start_std))
        if not self.random_start:
            self._check_fixed_start()

    def _check_step_size(self) -> None:
        self._set("step_size", check_positive("step_size", self.step_size))

    def _check_fixed_start(self) -> None:
        if self.restarts > 1:
            raise ValueError(
                f"{self.restarts} restarts from the same point give the same result; set"
                f" random_start=True or restarts=1"
            )
        if self.start_std is not None:
            raise ValueError("start_std needs a random start; leave random_start at True")
        if compares_with_clean(self.loss):
            raise ValueError(
                f"loss={self.loss!r} has a zero gradient at the clean example; set"
                " random_start=True"
            )

    @property
    def gradient_passes(self) -> int:
        return self.steps * self.restarts

    def _search(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        target, project = self._target(oracle, x, y), self._projection(x)
        x_adv = self._climb(oracle, x, target, project)
        if self.restarts == 1:
            return x_adv
        worst = self._outcome(oracle, x_adv, target)
        for _ in range(self.restarts - 1):
            other = self._climb(oracle, x, target, project)
            outcome = self._outcome(oracle, other, target)
            worse = outcome.worse_than(worst)
            x_adv = select(worse, other, x_adv)
            worst = worst.replace(worse, outcome)
        return x_adv

    def _climb(self, oracle: ModelOracle, x: Tensor, target: Tensor, project: Projection) -> Tensor:
        start = self._start(x, project)
        return self._ascend(oracle, start, target, project, self._step_length, self.steps)

    def _start(self, x: Tensor, project: Projection) -> Tensor:
        """Line 6 of Algorithm 2: x + eps * delta, projected."""
        if not self.random_start:
            return super()._start(x, project)
        if self.start_std is not None:
            return project(torch.randn_like(x).mul_(self.start_std).add_(x))
        return project(x + self._ball.random(x, self.eps))

    @property
    def _step_length(self) -> float:
        return self.step_size

    def _outcome(self, oracle: ModelOracle, x_adv: Tensor, target: Tensor) -> Outcome:
        logits, loss = oracle.logits(x_adv), loss_function(self.loss)
        if compares_with_clean(self.loss) or callable(self.loss):  # no labels to compare with
            losses = comparable(loss(logits, target))
            return Outcome(torch.zeros_like(losses, dtype=torch.bool), losses)
        return judge(logits, target, loss)
