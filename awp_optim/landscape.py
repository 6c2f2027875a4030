"""Weight loss landscapes: the loss along directions in weight space, adversarial examples included.

    d = filter_normalized_direction(model, torch.Generator().manual_seed(0))
    c = loss_curve(model, (x, y), PGD(steps=10), np.linspace(-1, 1, 21), d)
    c.adv_loss, c.nat_loss, c.sharpness(0.5), c.flat_width()

Eq. (5) and Algorithm 1 of Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust
Generalization" (NeurIPS 2020): ``g(alpha) = rho(w + alpha d)``, where the adversarial loss ``rho``
is the mean cross-entropy on examples that are made anew for every perturbed model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["LossCurve", "LossSurface"]


@dataclass(frozen=True)
class LossCurve:
    """The loss along directions in weight space; float64 arrays, A alphas and D directions.

    Attributes:
        alphas: distances, shape (A,), in the order given.
        adv_loss: adversarial loss there, mean over the directions, shape (A,).
        nat_loss: the loss on the examples as they are, the same.
        adv_losses, nat_losses: the losses along each direction, shape (D, A).
        adv_stderr, nat_stderr: their standard errors, the examples being a sample of all there
            could be; shape (D, A). NaN for one example.
        rise_stderr: standard errors of ``adv_losses - adv_centre``, example by example; (D, A).
        adv_centre, nat_centre: the losses of the unperturbed model, g(0).
        n: how many examples.
    """

    alphas: Array
    adv_loss: Array
    nat_loss: Array
    adv_losses: Array = field(repr=False)
    nat_losses: Array = field(repr=False)
    adv_stderr: Array = field(repr=False)
    nat_stderr: Array = field(repr=False)
    rise_stderr: Array = field(repr=False)
    adv_centre: float
    nat_centre: float
    n: int


@dataclass(frozen=True)
class LossSurface:
    """The loss on a plane in weight space; float64 arrays of shape (A, B).

    Attributes:
        alphas, betas: distances along the two directions, shapes (A,) and (B,).
        adv_loss, nat_loss: the losses at ``w + alphas[i] d + betas[j] e``.
        adv_stderr, nat_stderr: their standard errors.
        rise_stderr: those of ``adv_loss - adv_centre``, example by example.
        adv_centre, nat_centre: the losses of the unperturbed model, g(0, 0).
        n: how many examples.
    """

    alphas: Array
    betas: Array
    adv_loss: Array
    nat_loss: Array
    adv_stderr: Array = field(repr=False)
    nat_stderr: Array = field(repr=False)
    rise_stderr: Array = field(repr=False)
    adv_centre: float
    nat_centre: float
    n: int
