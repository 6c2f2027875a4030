"""How sharp landscapes are, in tables, and how that goes with the generalization gap."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from awp_optim.lab.reports.runs import Groups
from awp_optim.lab.reports.summary import Cells, spread
from awp_optim.landscape import LossCurve

__all__ = ["correlations", "rise_differences", "sharpness_table"]


def sharpness_table(curves: Mapping[str, Sequence[LossCurve]], at: float) -> tuple[str, Cells]:
    """The title and cells of a table: for each label, mean and deviation over its curves.

    Args:
        curves: by label, one for each run.
        at: the distance from the unperturbed weights at which the rise is measured.
    """
    title = (
        "Adversarial loss of the unperturbed model, g(0); its rise, g(alpha) - g(0), at |alpha| ="
        f" {at:g}: mean over directions and signs, standard error due to the sample of images,"
        " the worst, and the mean of |rise|; flat width: the range of alpha around 0 in which the"
        " loss rises by less than 10%"
    )
    cells = [["", "g(0)", "rise", "± images", "worst rise", "|rise|", "flat width"]]
    for label, of_label in curves.items():
        sharpness = [curve.sharpness(at) for curve in of_label]
        widths = [curve.flat_width() for curve in of_label]
        cells.append(
            [
                label,
                spread([curve.adv_center for curve in of_label], 3),
                spread([s.mean for s in sharpness], 3),
                f"{statistics.mean(s.stderr for s in sharpness):.3f}",
                f"{max(s.worst for s in sharpness):.3f}",
                spread([s.relative for s in sharpness], 3),
                spread(widths, 3) if all(map(math.isfinite, widths)) else "beyond the curve",
            ]
        )
    return title, cells


def rise_differences(
    groups: Groups, curves: Mapping[str, Sequence[LossCurve]], at: float
) -> list[tuple[str, Cells]]:
    """The rise of each label minus that of the first, seed by seed.

    Args:
        groups: the runs by label.
        curves: the landscapes of the same runs.
        at: as for :func:`sharpness_table`.

    Returns:
        The title and cells of a table; nothing if no label has several seeds in common with the
        first.
    """
    rises = {
        label: {
            run.config.seed: curve.sharpness(at).mean
            for run, curve in zip(groups[label], curves[label], strict=True)
        }
        for label in curves
    }
    (first, base), *others = rises.items()
    cells = [["", "rise", "by seed", "as a ratio"]]
    for label, of_label in others:
        seeds = sorted(base.keys() & of_label.keys())
        if len(seeds) > 1:
            less = [of_label[s] - base[s] for s in seeds]
            ratio = sum(of_label[s] for s in seeds) / sum(base[s] for s in seeds)
            by_seed = ", ".join(f"{difference:+.3f}" for difference in less)
            mean = spread(less, 3, signed=True)
            cells.append([f"{label} minus {first}", mean, by_seed, f"{ratio:.2f}"])
    title = "The rise compared seed by seed, mean ± standard deviation"
    return [(title, cells)] if len(cells) > 1 else []


def correlations(points: Sequence[tuple[float, float]]) -> tuple[str, str]:
    """Pearson's and Spearman's correlation of pairs of numbers, such as "+0.81" and "+0.77".

    "-" stands for a correlation that does not exist because one of the two does not vary.

    Args:
        points: two or more.
    """
    values = np.array(points, dtype=float).T
    if (np.ptp(values, axis=1) == 0).any():
        return "-", "-"
    pearson, spearman = (f(*values).statistic for f in (stats.pearsonr, stats.spearmanr))
    return f"{pearson:+.2f}", f"{spearman:+.2f}"
