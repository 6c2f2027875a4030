"""Projected gradient ascent inside a ball: the one loop that gradient attacks share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from awp_optim._utils.checks import check_choice, check_real

from .balls import BALLS, Ball, Projection
from .base import Attack, Gradients, Model, ModelOracle
from .losses import LOSSES


class BallAttack(Attack):
    """An attack that climbs a loss within eps of the input.

    A subclass declares the fields below with its own and implements :meth:`_search`, from
    :meth:`_climb` or from a loop of its own.

    Attributes:
        norms, losses: of the class, the names that it takes.
        eps: radius of the ball, in the units of the input.
        norm: "linf" or "l2".
        loss: "ce", "kl", "cw" or "dlr": see :mod:`awp_optim.attacks.losses`. Labels may be
            probabilities for "ce", and for "kl", which ignores them.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    losses: ClassVar[tuple[str, ...]] = tuple(LOSSES)

    eps: float
    norm: str
    loss: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("eps", check_real("eps", self.eps))
        if self.eps < 0:
            raise ValueError(f"eps must not be negative, got {self.eps!r}")
        check_choice("norm", self.norm, self.norms)
        check_choice("loss", self.loss, self.losses)

    def with_weight_gradients(
        self, model: Model, x: Tensor, y: Tensor | None, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Gradients]:
        """Perturb a batch, and take the weights' gradients in the attack's last backward pass.

        They are of the attack's loss, summed over the batch, at the input before the last step and
        in the mode of the attack. That costs a backward pass to the weights, where a pass of its
        own at the perturbed input would cost a forward and the other backward pass more.

        Args:
            model, x, y: as in :meth:`Attack.__call__`.
            weights: tensors that require gradients, such as the model's parameters.

        Returns:
            The perturbed batch, and a gradient for each of ``weights``; None where the loss does
            not depend on it, and everywhere if the attack takes no gradient (``eps=0``, no steps).
        """
        return self._call(model, x, y, weights)

    @property
    def _ball(self) -> Ball:
        return BALLS[self.norm]

    def _needs_labels(self) -> bool:
        return self.loss != "kl"

    def _takes_probabilities(self) -> bool:
        return self.loss in ("ce", "kl")  # the others are margins of one class

    def _perturb(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        if self.eps == 0:
            return x.clone()
        return self._search(oracle, x, y, self._ball.projection(x, self.eps, self.clip))

    @abstractmethod
    def _search(
        self, oracle: ModelOracle, x: Tensor, y: Tensor | None, project: Projection
    ) -> Tensor:
        """Return the perturbed ``x``, a new tensor that ``project`` made; eps is positive here."""

    def _target(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        """What the loss compares the logits with: the labels or, for "kl", the clean logits."""
        if self.loss == "kl":
            return oracle.logits(x)
        assert y is not None  # _check saw to it
        return y

    def _climb(
        self,
        oracle: ModelOracle,
        x_adv: Tensor,
        target: Tensor,
        project: Projection,
        step_size: float,
        steps: int,
        *,
        last: bool = True,
    ) -> Tensor:
        """Eq. (14), ``steps`` times from ``x_adv``: steepest ascent by ``step_size``, projection.

        In L_inf the ascent is eta_1 * sign(g), in L_2 it is eta_1 * g/|g|. ``last`` says that no
        other climb follows.
        """
        loss = LOSSES[self.loss]
        for i in range(steps):
            g = oracle.gradient(x_adv, loss, target, last=last and i == steps - 1)
            x_adv = project(x_adv.add(self._ball.ascent(g), alpha=step_size))
        return x_adv
