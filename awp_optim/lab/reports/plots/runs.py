"""Plots of runs: learning curves, and the effect of a setting.

Where a setting has several runs (seeds), curves are their mean in a band from the lowest run to the
highest; single points are their mean, with the sample standard deviation as an error bar.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from awp_optim.lab.reports.plots.style import (
    DASHED,
    MARKERS,
    MAX_PAIRS,
    Array,
    band,
    by_epoch,
    error_bars,
    mean_and_deviation,
    picture,
    with_colors,
)
from awp_optim.lab.reports.summary import Runs, values_of
from awp_optim.lab.run_folder import reported

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ablations", "curve_panels", "learning_curves", "perturbation_sizes", "robust_curves"]

Sizes = Mapping[str, Mapping[float, Runs]]
"""Runs by label and gamma."""


def learning_curves(runs: Mapping[str, Runs], path: Path | str, title: str = "") -> None:
    """Robust accuracy and its generalization gap by epoch, for at most 4 labels (Figure 1)."""
    with picture(path, title, 10, 4 + 0.2 * len(runs)) as figure:
        robust, gap = figure.subplots(1, 2)
        for color, label, seeds in with_colors(runs, MAX_PAIRS):
            _train_and_test(robust, seeds, color, label)
            epochs, train, test = robust_curves(seeds)
            band(gap, epochs, train - test, color, label)
        robust.set_ylabel("robust accuracy (%)")
        gap.set_ylabel("robust generalization gap (points)")
        gap.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        for axes in (robust, gap):
            by_epoch(axes)
        _legend_below(figure, robust)


def curve_panels(
    panels: Mapping[str, Mapping[str, Runs]], path: Path | str, title: str = ""
) -> None:
    """Robust accuracy by epoch in several panels with the same scales and one legend.

    The panels, by title, hold the same labels, at most 4.
    """
    rows = -(-len(panels) // 4)
    columns = -(-len(panels) // rows)
    with picture(path, title, max(6, 1 + 2.6 * columns), 0.8 + 2.4 * rows) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for i, (axes, (name, runs)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
            for color, label, seeds in with_colors(runs, MAX_PAIRS):
                _train_and_test(axes, seeds, color, label)
            axes.set_title(name)
            by_epoch(axes)
            is_lowest = i + columns >= len(panels)
            axes.set_xlabel("epoch" if is_lowest else "")
            axes.xaxis.set_tick_params(labelbottom=is_lowest)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for axes in grid[:, 0]:
            axes.set_ylabel("robust accuracy (%)")
        _legend_below(figure, grid[0, 0])


def ablations(
    strategies: Mapping[str, Mapping[str, tuple[Runs, float]]],
    sizes: Sizes,
    path: Path | str,
    title: str = "",
) -> None:
    """The effect of the perturbation's steps, size and norm (Figure 2 (a), (b), (d)).

    ``strategies`` holds, by setting and value, the runs and the cost of a training step as a
    multiple of plain adversarial training's; ``sizes`` is as for :func:`perturbation_sizes`.
    """
    with picture(path, title, 14, 4.2) as figure:
        bars, best_and_last, gap = figure.subplots(1, 3)
        _cost_bars(bars, strategies)
        bars.set_title("(a) steps: K2 for each attack, A in turn")
        _lines_by_gamma(best_and_last, sizes, {"best": "robust, best", "last": "robust, last"})
        best_and_last.set_ylabel("robust test accuracy (%)")
        best_and_last.set_title("(b) size and norm")
        _lines_by_gamma(gap, sizes, {"": "gap, last"})
        gap.set_ylabel("robust generalization gap, last (points)")
        gap.set_title("(c) generalization gap")


def perturbation_sizes(sizes: Sizes, path: Path | str, title: str = "") -> None:
    """Robust accuracy by gamma, of at most 4 labels; gamma 0 is a horizontal line (Figure 3 (c)).

    On test images at the best and at the last epoch; on training images at the last.
    """
    with picture(path, title, 10, 4.2) as figure:
        test, both = figure.subplots(1, 2)
        _lines_by_gamma(test, sizes, {"best": "robust, best", "last": "robust, last"})
        test.set_ylabel("robust test accuracy (%)")
        names = {"test images": "robust, last", "training images": "robust, training set, last"}
        _lines_by_gamma(both, sizes, names)
        both.set_ylabel("robust accuracy, last (%)")


def robust_curves(seeds: Runs) -> tuple[list[float], Array, Array]:
    """The epochs evaluated; robust accuracies in % on training and test images, (runs, epochs)."""
    evaluated = [[reported(row) for row in rows if "test_robust_acc" in row] for rows in seeds]

    def percent(name: str) -> Array:
        return 100 * np.array([[row.get(name, np.nan) for row in rows] for rows in evaluated])

    epochs = [row["epoch"] + 1 for row in evaluated[0]]
    return epochs, percent("train_robust_acc"), percent("test_robust_acc")


def _train_and_test(axes: Axes, seeds: Runs, color: str, label: str) -> None:
    epochs, train, test = robust_curves(seeds)
    band(axes, epochs, train, color, f"{label}, training images", **DASHED)
    band(axes, epochs, test, color, f"{label}, test images")


def _legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _cost_bars(axes: Axes, strategies: Mapping[str, Mapping[str, tuple[Runs, float]]]) -> None:
    """A group of bars for each setting: best robust test accuracy, labeled with the cost."""
    x, ticks, ends = 0.0, {}, []
    for color, setting, values in with_colors(strategies, MAX_PAIRS):
        for name, (seeds, cost) in values.items():
            mean, deviation = mean_and_deviation(values_of(seeds, "robust, best"))
            bar = axes.bar(x, mean, yerr=deviation or None, color=color, alpha=0.75)
            axes.bar_label(bar, [f"x {cost:.2f}"], padding=4, fontsize=9)
            ticks[x] = f"{setting} = {name}"
            ends += [mean - deviation, mean + deviation]
            x += 1
        x += 0.5
    # Bars from 0 would all look alike; the label on the axis says that these do not begin there.
    low, high = min(ends), max(ends)
    room = max(high - low, 1.0)
    axes.set_ylim(max(0.0, low - 2 * room), min(110.0, high + room))
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=8, rotation=30)
    axes.set_xlabel("on the bars: cost of a step in passes, AT = 1")
    axes.set_ylabel("robust test accuracy, best (%; not from 0)")
    axes.grid(visible=False, axis="x")


def _lines_by_gamma(axes: Axes, sizes: Sizes, names: Mapping[str, str]) -> None:
    """One or two figures of :func:`summary` by gamma: the first solid, the second dashed."""
    for i, (color, label, runs) in enumerate(with_colors(sizes, MAX_PAIRS)):
        gammas = sorted(gamma for gamma in runs if gamma > 0)
        for j, (part, name) in enumerate(names.items()):
            error_bars(
                axes,
                [gamma * 1.03 ** (2 * i + j) for gamma in gammas],  # so that no bars overlap
                [values_of(runs[gamma], name) for gamma in gammas],
                color=color,
                marker=MARKERS[i],
                elinewidth=1,
                label=f"{label}, {part}" if part else label,
                **(DASHED if j else {}),
            )
    _lines_without(axes, sizes, list(names.values()))
    axes.plot([], [], color="0.4", linewidth=0.9, label=r"horizontal: $\gamma$ = 0")
    axes.set_xscale("log")
    axes.set_xlabel(r"size of the perturbation, $\gamma$ (share of the weights' norm)")
    axes.legend(handlelength=3.5)


def _lines_without(axes: Axes, sizes: Sizes, names: list[str]) -> None:
    """Horizontal lines for gamma 0: gray where several labels share the same runs."""
    without = [runs.get(0.0) for runs in sizes.values()]
    for i, seeds in enumerate(without):
        if seeds is None:
            continue
        color = "0.4" if without.count(seeds) > 1 else f"C{i}"
        for name, line in zip(names, ("-", "--"), strict=False):
            mean = float(np.mean(values_of(seeds, name)))
            axes.axhline(mean, color=color, linestyle=line, linewidth=0.9, alpha=0.7)
