"""Pictures of runs: learning curves, and what a setting does.

Where a setting has several runs (seeds), a point is their mean and an error bar their sample
standard deviation; of curves, bands reach from the lowest run to the highest.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awp_optim.lab.reports.plots.parts import MARKERS, band, by_epoch, canvas, coloured, save, tidy
from awp_optim.lab.reports.summary import Runs, summary

__all__ = ["ablations", "curve_panels", "learning_curves", "perturbation_sizes"]

LINES = ("-", "--")


def learning_curves(runs: Mapping[str, Runs], path: Path | str, title: str = "") -> None:
    """Robust accuracy and the robust generalisation gap by epoch, as in Figure 1 of the paper.

    Args:
        runs: by label, 4 at the most.
        path: the picture to write.
        title: put above the panels.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are more runs than colours to tell them apart.
    """
    figure = canvas(10, 4)
    robust, gap = figure.subplots(1, 2)
    for colour, (label, seeds) in coloured(runs):
        epochs, test, train = _curves(seeds)
        band(robust, epochs, train, colour, f"{label}, training images", linestyle="--")
        band(robust, epochs, test, colour, f"{label}, test images")
        band(gap, epochs, train - test, colour, label)
    robust.set_ylabel("robust accuracy (%)")
    gap.set_ylabel("robust generalisation gap (points)")
    gap.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    for axes in (robust, gap):
        by_epoch(axes)
        axes.legend(frameon=False, fontsize=9)
    save(figure, path, title)


def curve_panels(
    panels: Mapping[str, Mapping[str, Runs]], path: Path | str, title: str = ""
) -> None:
    """Robust accuracy by epoch, one panel beside the other on the same scales.

    Args:
        panels: by their titles; in each, runs by label, 4 at the most and the same labels in all.
        path: the picture to write.
        title: put above the panels.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the labels are not the same, or more than there are colours.
    """
    labels = list(next(iter(panels.values())))
    if any(list(runs) != labels for runs in panels.values()):
        raise ValueError(f"every panel must have the same labels, {labels}: the legend is of all")
    rows = -(-len(panels) // 4)
    columns = -(-len(panels) // rows)
    figure = canvas(max(6, 1 + 2.6 * columns), 0.8 + 2.4 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for i, (axes, (name, runs)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
        for colour, (label, seeds) in coloured(runs):
            epochs, test, train = _curves(seeds)
            band(axes, epochs, train, colour, f"{label}, training images", linestyle="--")
            band(axes, epochs, test, colour, f"{label}, test images")
        axes.set_title(name, fontsize=10)
        by_epoch(axes)
        is_lowest = i + columns >= len(panels)
        axes.set_xlabel("epoch" if is_lowest else "")
        axes.xaxis.set_tick_params(labelbottom=is_lowest)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel("robust accuracy (%)")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    save(figure, path, title)


def ablations(
    strategies: Mapping[str, Mapping[str, tuple[Runs, float]]],
    sizes: Mapping[str, Mapping[float, Runs]],
    path: Path | str,
    title: str = "",
) -> None:
    """What the steps, the size and the norm of the perturbation do, as in Figure 2 (a), (b), (d).

    Args:
        strategies: for each setting that is varied its values, and with each the runs and what a
            step costs, as a multiple of adversarial training's; it is written on the bar.
        sizes: as in :func:`perturbation_sizes`.
        path: the picture to write.
        title: put above the panels.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are more settings or labels than colours.
    """
    figure = canvas(14, 4.2)
    bars, best_and_last, gap = figure.subplots(1, 3)
    _bars(bars, strategies)
    bars.set_title("(a) steps: K2 for each attack, A in turn", fontsize=10)
    _size_lines(best_and_last, sizes, {"best": "robust, best", "last": "robust, last"})
    best_and_last.set_ylabel("robust test accuracy (%)")
    best_and_last.set_title("(b) size and norm", fontsize=10)
    _size_lines(gap, sizes, {"": "gap, last"})
    gap.set_ylabel("robust generalisation gap, last (points)")
    gap.set_title("(c) generalisation gap", fontsize=10)
    save(figure, path, title)


def perturbation_sizes(
    sizes: Mapping[str, Mapping[float, Runs]], path: Path | str, title: str = ""
) -> None:
    """Robust accuracy by gamma: test at best and at last, training and test; as in Figure 3 (c).

    Args:
        sizes: for each label runs by gamma. Those of gamma 0, where there are any, are drawn as
            horizontal lines.
        path: the picture to write.
        title: put above the panels.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are more labels than colours.
    """
    figure = canvas(10, 4.2)
    test, both = figure.subplots(1, 2)
    _size_lines(test, sizes, {"best": "robust, best", "last": "robust, last"})
    test.set_ylabel("robust test accuracy (%)")
    parts = {"test images": "robust, last", "training images": "robust, training set, last"}
    _size_lines(both, sizes, parts)
    both.set_ylabel("robust accuracy at the end (%)")
    save(figure, path, title)


# --- Parts ------------------------------------------------------------------------------------


def _curves(seeds: Runs) -> tuple[list[float], Any, Any]:
    """Epochs evaluated; robust accuracy there, test and training, in %, shape (seeds, epochs)."""
    evaluated = [[row for row in rows if "test_robust_acc" in row] for rows in seeds]
    test, train = (
        100 * np.array([[row[f"{part}_robust_acc"] for row in rows] for rows in evaluated])
        for part in ("test", "train")
    )
    return [row["epoch"] + 1 for row in evaluated[0]], test, train


def _figures(seeds: Runs, name: str) -> tuple[float, float]:
    """Mean and standard deviation of a figure of :func:`summary`; of one run, 0."""
    values = [summary(rows)[name] for rows in seeds]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _bars(axes: Any, strategies: Mapping[str, Mapping[str, tuple[Runs, float]]]) -> None:
    """A group of bars for each setting, with costs on them."""
    at, places, names, ends = 0.0, [], [], []
    for colour, (setting, values) in coloured(strategies):
        for name, (seeds, cost) in values.items():
            mean, deviation = _figures(seeds, "robust, best")
            first = name == next(iter(values))
            axes.bar(at, mean, 0.8, color=colour, alpha=0.75, label=setting if first else None)
            axes.errorbar(at, mean, deviation or None, color="black", capsize=3)
            axes.annotate(
                f"x {cost:.2f}",
                (at, mean + deviation),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
            places.append(at)
            names.append(f"{setting} = {name}")
            ends += [mean - deviation, mean + deviation]
            at += 1
        at += 0.5
    low, high = min(ends), max(ends)
    room = max(high - low, 1.0)
    # Not from 0, which would make all bars look alike; the label says so.
    axes.set_ylim(max(0.0, low - 2 * room), min(110.0, high + room))
    axes.set_xticks(places, names, fontsize=8, rotation=30)
    axes.set_xlabel("on the bars: cost of a step in passes, AT's = 1")
    axes.set_ylabel("robust test accuracy, best (%; not from 0)")
    tidy(axes)
    axes.grid(visible=False, axis="x")


def _size_lines(
    axes: Any, sizes: Mapping[str, Mapping[float, Runs]], figures: Mapping[str, str]
) -> None:
    """One or two figures of :func:`summary` by gamma, the first solid and the second dashed."""
    without = [runs[0.0] for runs in sizes.values() if 0.0 in runs]
    for i, (colour, (label, runs)) in enumerate(coloured(sizes)):
        gammas = sorted(gamma for gamma in runs if gamma > 0)
        for j, (part, name) in enumerate(figures.items()):
            means, deviations = zip(*(_figures(runs[g], name) for g in gammas), strict=True)
            axes.errorbar(
                [g * 1.03 ** (2 * i + j) for g in gammas],  # or error bars would cover one another
                means,
                deviations if any(deviations) else None,
                color=colour,
                linestyle=LINES[j],
                marker=MARKERS[i],
                markersize=4,
                markerfacecolor="white" if j else colour,
                elinewidth=1,
                capsize=2,
                label=f"{label}, {part}" if part else label,
            )
            if 0.0 in runs:
                is_shared = without.count(runs[0.0]) > 1
                axes.axhline(
                    _figures(runs[0.0], name)[0],
                    color="0.4" if is_shared else colour,
                    linestyle=LINES[j],
                    linewidth=0.9,
                    alpha=0.7,
                )
    axes.plot([], [], color="0.4", linewidth=0.9, label=r"horizontal: $\gamma$ = 0")
    axes.set_xscale("log")
    axes.set_xlabel(r"size of the perturbation, $\gamma$ (share of the weights' norm)")
    tidy(axes)
    axes.legend(frameon=False, fontsize=8, handlelength=3.5)
