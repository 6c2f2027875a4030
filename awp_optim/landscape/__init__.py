"""Weight loss landscapes: directions, curves and surfaces of the adversarial loss."""

from awp_optim.landscape.measure import (
    LossCurve,
    LossSurface,
    Sharpness,
    awp_direction,
    filter_normalized_direction,
    loss_curve,
    loss_surface,
    rwp_direction,
)

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
