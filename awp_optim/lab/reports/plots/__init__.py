"""Pictures as in the paper's figures, drawn with matplotlib.

Every function writes a file; its suffix says in which format.
"""

from awp_optim.lab.reports.plots.evaluation import accuracy_by_radius, adversarial_images
from awp_optim.lab.reports.plots.landscape import (
    directions,
    landscapes,
    landscapes_by_epoch,
    landscapes_by_gamma,
    on_the_fly,
    perturbed_weights,
    surfaces,
    weight_histograms,
)
from awp_optim.lab.reports.plots.parts import COLOURS
from awp_optim.lab.reports.plots.runs import (
    ablations,
    curve_panels,
    learning_curves,
    perturbation_sizes,
)

__all__ = [
    "COLOURS",
    "ablations",
    "accuracy_by_radius",
    "adversarial_images",
    "curve_panels",
    "directions",
    "landscapes",
    "landscapes_by_epoch",
    "landscapes_by_gamma",
    "learning_curves",
    "on_the_fly",
    "perturbation_sizes",
    "perturbed_weights",
    "surfaces",
    "weight_histograms",
]
