"""Pictures as in the paper's figures, drawn with matplotlib.

Every function writes a file; its suffix says in which format.
"""

from awp_optim.lab.plots.evaluation import accuracy_by_radius, adversarial_images
from awp_optim.lab.plots.runs import (
    ablations,
    curve_panels,
    learning_curves,
    perturbation_sizes,
)

__all__ = [
    "ablations",
    "accuracy_by_radius",
    "adversarial_images",
    "curve_panels",
    "learning_curves",
    "perturbation_sizes",
]
