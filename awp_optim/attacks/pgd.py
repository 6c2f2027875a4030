"""Projected gradient descent, the attack of adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from awp_optim._utils.checks import check_int, check_real

from .ascent import BallAttack
from .balls import Projection
from .base import ModelOracle
from .losses import LOSSES


@dataclass(frozen=True)
class PGD(BallAttack):
    """``steps`` steps of projected steepest ascent from a random start; the last iterate counts.

    Madry et al., "Towards deep learning models resistant to adversarial attacks" (ICLR 2018);
    Eq. (14) and lines 6 to 9 of Algorithm 2 of Wu et al., "Adversarial weight perturbation helps
    robust generalization" (NeurIPS 2020). With ``loss="kl"`` it is Eq. (16), the attack of TRADES.
    It costs ``steps`` forward and backward passes, one forward pass more for "kl", and with several
    restarts one forward pass more for each. How to call it: see :meth:`Attack.__call__`.

    Args:
        eps: radius of the ball, at least 0, in the units of the input. At 0 the input is returned
            as it is and the model is not called.
        step_size: eta_1, length of a step in the same norm, above 0.
        steps: K_1, at least 0. At 0 the random start is returned.
        norm: "linf" or "l2".
        loss: what is climbed: "ce", "kl", "cw" or "dlr".
        random_start: start at a random point of the ball, not at the input. torch's global
            generator decides, so :func:`torch.manual_seed` makes a call repeatable.
        restarts: how many times to start, at least 1. Each example keeps its worst outcome: being
            misclassified before not being so, then the higher loss; for "kl" the higher loss alone.
            Where labels are probabilities, the class is the most probable one.
        clip: the box (lo, hi) of valid inputs, or None for no box.
        model_mode: "eval" or "train", the mode in which the model is attacked.
        start_std: start beside the input instead, by Gaussian noise of this standard deviation, cut
            by the ball; above 0. TRADES and MART train with 0.001. None for anywhere in the ball.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or ``random_start=False`` comes with several
            restarts, which would all be the same, with "kl", whose gradient is zero there, or with
            ``start_std``.

    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    >>> PGD(eps=0.1, step_size=0.05)(lambda x: x * 3, x, y)
    tensor([[0.4000, 0.6000]])
    """

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    norm: str = "linf"
    loss: str = "ce"
    random_start: bool = True
    restarts: int = 1
    clip: tuple[float, float] | None = (0, 1)
    model_mode: str = "eval"
    start_std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("step_size", check_real("step_size", self.step_size))
        if self.step_size <= 0:
            raise ValueError(f"step_size must be above 0, got {self.step_size!r}")
        self._set("steps", check_int("steps", self.steps, least=0))
        self._set("restarts", check_int("restarts", self.restarts, least=1))
        if not isinstance(self.random_start, bool):
            raise TypeError(f"random_start must be True or False, got {self.random_start!r}")
        if not self.random_start and self.restarts > 1:
            raise ValueError(
                f"{self.restarts} restarts from the same point are all the same; set"
                f" random_start=True or restarts=1"
            )
        if self.start_std is not None:
            self._set("start_std", check_real("start_std", self.start_std))
            if self.start_std <= 0:
                raise ValueError(f"start_std must be above 0 or None, got {self.start_std!r}")
            if not self.random_start:
                raise ValueError("start_std is of a random start: leave random_start at True")
        if not self.random_start and self.loss == "kl":
            raise ValueError(
                "loss='kl' has a zero gradient at the clean input; set random_start=True"
            )

    def _search(
        self, oracle: ModelOracle, x: Tensor, y: Tensor | None, project: Projection
    ) -> Tensor:
        if self.steps == 0 and self.restarts == 1:
            return self._start(x, project)
        target = self._target(oracle, x, y)
        if self.restarts == 1:
            return self._run(oracle, x, target, project)
        x_adv = self._run(oracle, x, target, project, last=False)
        fooled, loss = self._outcome(oracle, x_adv, target)
        for i in range(2, self.restarts + 1):
            other = self._run(oracle, x, target, project, last=i == self.restarts)
            other_fooled, other_loss = self._outcome(oracle, other, target)
            worse = (other_fooled & ~fooled) | ((other_fooled == fooled) & (other_loss > loss))
            x_adv = torch.where(worse.view(-1, *[1] * (x.ndim - 1)), other, x_adv)
            fooled, loss = fooled | other_fooled, torch.where(worse, other_loss, loss)
        return x_adv

    def _start(self, x: Tensor, project: Projection) -> Tensor:
        """Line 6 of Algorithm 2: x + eps * delta, cut by the box."""
        if not self.random_start:
            return project(x)
        if self.start_std is not None:
            return project(torch.randn_like(x).mul_(self.start_std).add_(x))
        return project(x + self._ball.random(x, self.eps))

    def _run(
        self, oracle: ModelOracle, x: Tensor, target: Tensor, project: Projection, last: bool = True
    ) -> Tensor:
        """One start and the climb from it."""
        start = self._start(x, project)
        return self._climb(oracle, start, target, project, self.step_size, self.steps, last=last)

    def _outcome(self, oracle: ModelOracle, x_adv: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """For each example, whether it is misclassified (for "kl", no matter) and its loss."""
        logits = oracle.logits(x_adv)
        # A loss that is not a number must lose every comparison, also as the first.
        loss = LOSSES[self.loss](logits, target).nan_to_num(nan=-torch.inf)
        if self.loss == "kl":
            return torch.zeros_like(loss, dtype=torch.bool), loss
        y = target.argmax(1) if target.is_floating_point() else target
        return logits.argmax(1) != y, loss
