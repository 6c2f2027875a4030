"""The paper's figures as plots, and those of an evaluation, drawn with matplotlib.

Every function takes what it draws, usually by label, then the file to write, whose suffix sets the
format, and a title. It raises ImportError if matplotlib is not installed, and ValueError if there
are more labels than a reader can tell apart. Figures are numbered as in the paper.
"""

from awp_optim.lab.reports.plots.evaluation import accuracy_by_radius, adversarial_images
from awp_optim.lab.reports.plots.landscape import (
    directions,
    gap_by_rise,
    landscapes,
    landscapes_by_epoch,
    landscapes_by_gamma,
    on_the_fly,
    perturbed_weights,
    surfaces,
    weight_histograms,
)
from awp_optim.lab.reports.plots.runs import (
    ablations,
    curve_panels,
    learning_curves,
    perturbation_sizes,
)
from awp_optim.lab.reports.plots.style import MAX_LABELS, MAX_PAIRS

__all__ = [
    "MAX_LABELS",
    "MAX_PAIRS",
    "ablations",
    "accuracy_by_radius",
    "adversarial_images",
    "curve_panels",
    "directions",
    "gap_by_rise",
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
