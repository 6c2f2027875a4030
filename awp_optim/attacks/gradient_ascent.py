"""Projected gradient ascent: the loop that FGSM, PGD and CW share."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from awp_optim.attacks.balls import Projection
from awp_optim.attacks.base import BallAttack
from awp_optim.attacks.losses import (
    Labels,
    Loss,
    check_loss,
    compares_with_clean,
    labels_of,
    loss_function,
)
from awp_optim.attacks.oracle import Gradients, Model, ModelOracle


class GradientAscentAttack(BallAttack):
    """An attack that maximizes a loss by projected steepest ascent.

    A subclass declares the fields below along with its own, implements :meth:`_search` with
    :meth:`_ascend`, and defines :attr:`gradient_passes`.

    Attributes:
        eps: radius of the ball, in the units of the input.
        norm: "linf" or "l2".
        loss: "ce", "kl", "score", "cw", "dlr" (see :mod:`awp_optim.attacks.losses`), or a function
            ``loss(logits, target) -> (N,)``.
    """

    loss: str | Loss

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)

    def __repr__(self) -> str:
        """The usual repr of a dataclass, but with the qualified name of a loss function."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.repr}  # type: ignore[arg-type]
        parts = [f"{name}={_name(value)}" for name, value in settings.items()]
        return f"{type(self).__qualname__}({', '.join(parts)})"

    @property
    def labels(self) -> Labels:
        return labels_of(self.loss)

    @property
    @abstractmethod
    def gradient_passes(self) -> int:
        """The number of gradients that a call computes if ``eps`` is positive."""

    def with_weight_gradients(
        self, model: Model, x: Tensor, y: Tensor | None, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Gradients]:
        """Compute adversarial examples, and weight gradients in the attack's last backward pass.

        The gradients are those of the attack's loss, summed over the batch, at the input before the
        last step and in the attack's ``model_mode``. They cost one backward pass to the weights; a
        separate pass at the adversarial examples would cost a forward and a backward pass more.

        Args:
            model: as in :meth:`Attack.__call__`.
            x: the same.
            y: the same.
            weights: tensors that require gradients, such as the model's parameters.

        Returns:
            The adversarial examples, and a gradient for each of ``weights``, which is None if the
            loss does not depend on it or the attack computes no gradient (``eps=0``, no steps).
        """
        with self._access(model, x, y) as oracle:
            oracle.collect_weight_gradients(weights, in_pass=self.gradient_passes)
            return self._attack(oracle), oracle.weight_gradients

    def _target(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        """The loss's second argument: the labels, or the clean logits."""
        if compares_with_clean(self.loss):
            return oracle.logits(x)
        assert y is not None  # checked
        return y

    def _start(self, x: Tensor, project: Projection) -> Tensor:
        """Where the ascent starts."""
        return project(x)

    def _ascend(
        self,
        oracle: ModelOracle,
        x_adv: Tensor,
        target: Tensor,
        project: Projection,
        step_size: float,
        steps: int,
    ) -> Tensor:
        """Eq. (14), ``steps`` times: steepest ascent by ``step_size``, then projection.

        A step is eta_1 * sign(g) in L_inf, and eta_1 * g/|g| in L_2.
        """
        loss = loss_function(self.loss)
        for _ in range(steps):
            g = oracle.gradient(x_adv, loss, target)
            x_adv = project(x_adv.add(self._ball.ascent(g), alpha=step_size))
        return x_adv


def _name(value: object) -> str:
    if not callable(value):
        return repr(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
