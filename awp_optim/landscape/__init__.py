"""Weight loss landscapes: natural and adversarial losses along directions in weight space.

    d = filter_normalized_direction(model, torch.Generator().manual_seed(0))
    c = loss_curve(model, (x, y), PGD(steps=10), np.linspace(-1, 1, 21), d)
    c.adv_loss, c.nat_loss, c.sharpness(0.5), c.flat_width()

Eq. (5) and Algorithm 1 of Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust
Generalization" (NeurIPS 2020): ``g(alpha) = rho(w + alpha d)``, where the adversarial loss ``rho``
is the mean cross-entropy on adversarial examples that are generated for every perturbed model.
"""

from awp_optim.landscape.directions import (
    awp_direction,
    filter_normalized_direction,
    rwp_direction,
)
from awp_optim.landscape.measure import loss_curve, loss_surface
from awp_optim.landscape.results import LossCurve, LossSurface, Sharpness

__all__ = [
    "LossCurve",
    "LossSurface",
    "Sharpness",
    "awp_direction",
    "filter_normalized_direction",
    "loss_curve",
    "loss_surface",
    "rwp_direction",
]
