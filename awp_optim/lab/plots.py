"""Learning curves of runs, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from awp_optim.lab.trainer import Row

__all__ = ["learning_curves"]

# Okabe & Ito's colours, told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def learning_curves(
    runs: Mapping[str, Sequence[Sequence[Row]]], path: Path | str, title: str = ""
) -> None:
    """Robust accuracy and the robust generalisation gap by epoch, as in Figure 1 of the paper.

    Args:
        runs: for every label the rows of one run or more (seeds), evaluated at the same epochs.
            With several, lines are means and bands reach from the lowest to the highest.
        path: the picture to write; its suffix says in which format.
        title: put above the panels.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'awp_optim[examples]'") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    robust, gap = figure.subplots(1, 2)
    for colour, (label, seeds) in zip(COLOURS, runs.items(), strict=False):
        evaluated = [[row for row in rows if "test_robust_acc" in row] for rows in seeds]
        epochs = [row["epoch"] + 1 for row in evaluated[0]]
        test, train = (
            100 * np.array([[row[f"{part}_robust_acc"] for row in rows] for rows in evaluated])
            for part in ("test", "train")
        )
        _line(robust, epochs, train, colour, f"{label}, training images", linestyle="--")
        _line(robust, epochs, test, colour, f"{label}, test images")
        _line(gap, epochs, train - test, colour, label)
    robust.set_ylabel("robust accuracy (%)")
    gap.set_ylabel("robust generalisation gap (points)")
    gap.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    for axes in (robust, gap):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _line(
    axes: Any, epochs: list[float], values: Any, colour: str, label: str, **style: Any
) -> None:
    """The mean over the first axis; with one epoch alone, a point."""
    marker = "o" if len(epochs) == 1 else None
    axes.plot(epochs, values.mean(0), color=colour, label=label, marker=marker, **style)
    if len(values) > 1:
        axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
