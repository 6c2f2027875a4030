"""Plots of weight loss landscapes, as :mod:`awp_optim.landscape` measures them.

A line is the mean over directions and runs (seeds), in a band from the lowest to the highest; the
curves of a label must have the same alphas. Losses that are not finite are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from awp_optim.lab.reports.plots.runs import robust_curves
from awp_optim.lab.reports.plots.style import (
    DASHED,
    MARKERS,
    MAX_PAIRS,
    Array,
    band,
    by_epoch,
    error_bars,
    mean_and_deviation,
    note,
    picture,
    with_colors,
)
from awp_optim.lab.reports.summary import Runs, values_of
from awp_optim.lab.run_folder import Row, best

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from awp_optim.landscape import LossCurve, LossSurface

__all__ = [
    "directions",
    "gap_by_rise",
    "landscapes",
    "landscapes_by_epoch",
    "landscapes_by_gamma",
    "on_the_fly",
    "perturbed_weights",
    "surfaces",
    "weight_histograms",
]

LOSS = "adversarial loss (cross-entropy)"
TRAIN, TEST, GAP = "robust, training set, last", "robust, last", "gap, last"


def landscapes(
    curves: Mapping[str, Sequence[LossCurve]],
    runs: Mapping[str, Runs],
    path: Path | str,
    title: str = "",
) -> None:
    """Landscapes of several methods beside their robust accuracies (Figures 1 and 3 (b)).

    ``curves`` holds one for each run, by label; with at most 4 labels, dashed lines show the loss
    on natural images.
    """
    with picture(path, title, 11, 4.4) as figure:
        accuracies, axes = figure.subplots(1, 2)
        for i, (color, label, of_label) in enumerate(with_colors(curves)):
            alphas, losses = _losses(of_label)
            band(axes, alphas, losses, color, label, marker=MARKERS[i])
            if len(curves) <= MAX_PAIRS:
                natural = _losses(of_label, "nat_losses")[1].mean(0)
                axes.plot(alphas, natural, color=color, linestyle="--", linewidth=1)
        if len(curves) <= MAX_PAIRS:
            axes.plot([], [], color="0.3", linestyle="--", lw=1, label="dashed: natural loss")
        _label_loss_axes(axes)
        axes.legend()
        _accuracy_bars(accuracies, runs)


def landscapes_by_gamma(
    curves: Mapping[float, Sequence[LossCurve]],
    runs: Mapping[float, Runs],
    path: Path | str,
    title: str = "",
) -> None:
    """Landscapes and robust accuracy by the gamma of training (Figure 2 (c) and (d))."""
    with picture(path, title, 11, 4.4) as figure:
        axes, accuracies = figure.subplots(1, 2)
        gammas = sorted(curves)
        shades = _shades("viridis", len(gammas), 0.0, 0.88)
        colors = {g: shade if g > 0 else "0.55" for g, shade in zip(gammas, shades, strict=True)}
        for gamma in gammas:
            band(axes, *_losses(curves[gamma]), colors[gamma], rf"$\gamma$ = {gamma:g}")
        _label_loss_axes(axes)
        axes.legend()
        _accuracies_by_gamma(accuracies, runs, colors)


def landscapes_by_epoch(
    rows: Sequence[Row], curves: Mapping[int, LossCurve], path: Path | str, title: str = ""
) -> None:
    """A run's learning curve, and its landscapes up to and after the best epoch (Figure 1).

    The curves of its checkpoints are by the number of epochs done.
    """
    with picture(path, title, 14, 4.2) as figure:
        learning, before, after = figure.subplots(1, 3)
        before.sharex(after)
        before.sharey(after)
        top = int(best(list(rows))["epoch"]) + 1
        _learning_curve(learning, rows, top)
        until = {epoch: curves[epoch] for epoch in sorted(curves) if epoch <= top}
        beyond = {epoch: curves[epoch] for epoch in sorted(curves) if epoch > top}
        _shaded_by_epoch(before, until, "Blues", f"landscapes up to the best epoch, {top}")
        _shaded_by_epoch(after, beyond, "Reds", f"landscapes after the best epoch, {top}")


def gap_by_rise(
    points: Mapping[str, Sequence[tuple[float, float]]],
    path: Path | str,
    title: str = "",
    *,
    at: float,
) -> None:
    """The generalization gap of checkpoints by the rise of their loss at a distance ``at``."""
    with picture(path, title, 7, 4.8) as figure:
        axes = figure.subplots()
        for i, (color, label, of_label) in enumerate(with_colors(points)):
            if of_label:
                axes.scatter(
                    *zip(*of_label, strict=True), color=color, marker=MARKERS[i], label=label
                )
        axes.set_xlabel(rf"rise of the adversarial loss at $|\alpha|$ = {at:g}")
        axes.set_ylabel("robust generalization gap in points")
        axes.legend()


def directions(curves: Mapping[str, LossCurve], path: Path | str, title: str = "") -> None:
    """How much a landscape depends on the random direction: a thin line for each (Figure 5)."""
    with picture(path, title, 7, 4.4) as figure:
        axes = figure.subplots()
        for color, label, curve in with_colors(curves):
            alphas, losses = _losses([curve])
            axes.plot(alphas, losses.T, color=color, linewidth=0.7, alpha=0.5)
            count = "1 direction" if len(losses) == 1 else f"{len(losses)} directions"
            axes.plot(alphas, losses.mean(0), color=color, lw=2.2, label=f"{label}, {count}")
        _label_loss_axes(axes)
        axes.legend()


def perturbed_weights(curves: Mapping[str, LossCurve], path: Path | str, title: str = "") -> None:
    """Adversarial loss of one model by the size of a weight perturbation (Figure 3 (a)).

    The curves, by the kind of perturbation ("AWP", "RWP"), are along directions as long as each
    layer's weights: their alphas are gammas, above 0.
    """
    with picture(path, title, 7, 4.4) as figure:
        axes = figure.subplots()
        for i, (color, label, curve) in enumerate(with_colors(curves)):
            band(axes, *_losses([curve]), color, label, marker=MARKERS[i])
        unperturbed = next(iter(curves.values())).adv_center
        axes.axhline(unperturbed, color="0.4", linestyle=":", label=r"unperturbed ($\gamma$ = 0)")
        axes.set_xscale("log")
        if _spans_a_decade(curves.values(), unperturbed):
            axes.set_yscale("log")
        _label_loss_axes(axes, x=r"$\gamma$, size of the perturbation (share of each layer's norm)")
        axes.legend()


def weight_histograms(
    weights: Mapping[str, Sequence[Any]], path: Path | str, title: str = "", *, layer: str = ""
) -> None:
    """The distribution of a layer's weights, pooled over the runs of a label (Figure 4)."""
    pooled = {k: np.concatenate([np.ravel(a) for a in arrays]) for k, arrays in weights.items()}
    # The outer bins hold what is beyond: a few large weights would make the rest a single bar.
    reach = max(float(np.quantile(np.abs(values), 0.999)) for values in pooled.values()) or 1.0
    edges = np.linspace(-reach, reach, 81)
    with picture(path, title, 7, 4.4) as figure:
        axes = figure.subplots()
        for color, label, values in with_colors(pooled):
            density, _ = np.histogram(values.clip(-reach, reach), edges, density=True)
            about = f"standard deviation {values.std():.3g}, largest {np.abs(values).max():.3g}"
            axes.stairs(density, edges, color=color, linewidth=1.4, label=f"{label}: {about}")
        axes.set_xlabel(f"weight of {layer}" if layer else "weight")
        axes.set_ylabel("density")
        axes.set_ylim(0, axes.get_ylim()[1] * (1.05 + 0.08 * len(pooled)))  # room for the legend
        axes.legend(loc="upper left")


def surfaces(surfaces: Mapping[str, LossSurface], path: Path | str, title: str = "") -> None:
    """Relative landscapes on a plane, |g(alpha, beta) - g(0, 0)|, on one scale (Figure 6)."""
    heights = np.concatenate([surface.relative.ravel() for surface in surfaces.values()])
    heights = heights[np.isfinite(heights)]
    # The corners are steep: if the scale reached them, nothing else would be seen.
    top = float(np.quantile(heights, 0.95)) if heights.size else 1.0
    levels = np.linspace(0, top or 1.0, 13)
    columns = len(surfaces)
    with picture(path, title, max(5.0, 0.9 + 3.4 * columns), 7) as figure:
        for i, (label, surface) in enumerate(surfaces.items()):
            grid = _grid(surface)
            contours = _contours(figure.add_subplot(2, columns, i + 1, title=label), grid, levels)
            position = (2, columns, columns + i + 1)
            _relief(figure.add_subplot(*position, projection="3d"), grid, levels[-1])
        name = r"$|g(\alpha, \beta) - g(0, 0)|$"
        figure.colorbar(contours, ax=figure.axes, shrink=0.6, label=name, format="%.2g")


def on_the_fly(curves: Mapping[str, LossCurve], path: Path | str, title: str = "") -> None:
    """Why adversarial examples are generated for every perturbed model (Section 3).

    The curves, of one model and direction, are by how the examples were generated; bands of two
    standard errors.
    """
    with picture(path, title, 7, 4.4) as figure:
        axes = figure.subplots()
        for i, (color, label, curve) in enumerate(with_colors(curves)):
            alphas, losses = _losses([curve])
            mean = losses.mean(0)
            # An upper bound for the mean over directions, which share their examples.
            error = 2 * _losses([curve], "adv_stderr")[1].mean(0)
            axes.plot(alphas, mean, color=color, label=label, marker=MARKERS[i])
            axes.fill_between(alphas, mean - error, mean + error, color=color, alpha=0.15, lw=0)
        alphas, natural = _losses([next(iter(curves.values()))], "nat_losses")
        axes.plot(alphas, natural.mean(0), color="0.4", linestyle="--", lw=1, label="natural loss")
        _label_loss_axes(axes)
        axes.set_ylabel("loss (cross-entropy)")
        axes.legend()


# --- What is drawn, as arrays -----------------------------------------------------------------


def _losses(curves: Sequence[LossCurve], name: str = "adv_losses") -> tuple[Array, Array]:
    """Alphas in ascending order, and values there, shape (runs x directions, alphas)."""
    alphas = curves[0].alphas
    if any(not np.array_equal(curve.alphas, alphas) for curve in curves):
        raise ValueError("curves that are drawn as one line must have the same alphas")
    order = np.argsort(alphas, kind="stable")
    values = np.concatenate([getattr(curve, name) for curve in curves])[:, order]
    return alphas[order], _finite(values)


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, np.nan)


def _spans_a_decade(curves: Any, unperturbed: float) -> bool:
    """Whether the losses rise so far that only a log scale shows what happens at small gammas."""
    losses = np.concatenate([curve.adv_losses.ravel() for curve in curves])
    losses = losses[np.isfinite(losses)]
    return bool(losses.size and losses.min() > 0 and losses.max() > 10 * unperturbed)


def _grid(surface: LossSurface) -> tuple[Array, Array, Array]:
    """x, y and the height above the origin as matplotlib has them, rows being betas."""
    x, y = np.meshgrid(surface.alphas, surface.betas)
    return x, y, _finite(surface.relative).T


# --- Panels -----------------------------------------------------------------------------------


def _label_loss_axes(axes: Axes, x: str = r"$\alpha$, distance along the direction") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(LOSS)
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    if drawn and not any(np.isfinite(y).any() for y in drawn):
        note(axes, "no finite loss")


def _shades(name: str, count: int, low: float, high: float) -> Array:
    """Colors of one of matplotlib's color maps, evenly spaced from ``low`` to ``high``."""
    import matplotlib as mpl

    return np.asarray(mpl.colormaps[name](np.linspace(low, high, count)))


def _shaded_by_epoch(axes: Axes, curves: Mapping[int, LossCurve], shades: str, title: str) -> None:
    colors = _shades(shades, len(curves), 0.35, 1.0)
    for color, (epoch, curve) in zip(colors, curves.items(), strict=True):
        band(axes, *_losses([curve]), color, f"epoch {epoch}")
    axes.set_title(title)
    _label_loss_axes(axes)
    if curves:
        axes.legend()
    else:
        note(axes, "no checkpoint")


def _learning_curve(axes: Axes, rows: Sequence[Row], best_epoch: int) -> None:
    epochs, train, test = robust_curves([rows])
    band(axes, epochs, train, "C0", "training images", **DASHED)
    band(axes, epochs, test, "C1", "test images")
    band(axes, epochs, train - test, "C2", "gap (points)", linestyle="-.")
    axes.axvline(best_epoch, color="0.4", linestyle=":", label=f"best epoch, {best_epoch}")
    axes.set_ylabel("robust accuracy (%)")
    axes.set_title("learning curve")
    by_epoch(axes)
    axes.legend()


def _accuracy_bars(axes: Axes, runs: Mapping[str, Runs]) -> None:
    """Last robust accuracy on training and test images, and the gap between them."""
    for i, (color, _, seeds) in enumerate(with_colors(runs)):
        top = 0.0
        for x, name, alpha in ((i - 0.2, TRAIN, 0.35), (i + 0.2, TEST, 0.9)):
            mean, deviation = mean_and_deviation(values_of(seeds, name))
            axes.bar(x, mean, 0.38, yerr=deviation or None, color=color, alpha=alpha)
            top = max(top, mean + deviation)
        gap = f"gap {np.mean(values_of(seeds, GAP)):.1f}"
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(gap, (i, top), (0, 4), **place)
    axes.bar(0, 0, color="0.3", alpha=0.35, label="light: training images")
    axes.bar(0, 0, color="0.3", alpha=0.9, label="dark: test images")
    is_crowded = len(runs) > 3 or max(map(len, runs)) > 12
    turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(runs)), list(runs), fontsize=8, **(turned if is_crowded else {}))
    axes.set_ylabel("robust accuracy, last (%)")
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.16)  # room for the legend
    axes.legend(ncols=2, loc="upper left")


def _accuracies_by_gamma(
    axes: Axes, runs: Mapping[float, Runs], colors: Mapping[float, Any]
) -> None:
    """Last robust accuracy: evenly spaced gammas, each point in the color of its landscape."""
    gammas = sorted(runs)
    x = range(len(gammas))
    for name, line, label in ((TRAIN, "--", "training images"), (TEST, "-", "test images")):
        samples = [values_of(runs[gamma], name) for gamma in gammas]
        error_bars(axes, x, samples, color="0.4", linestyle=line, elinewidth=1, label=label)
        means = [np.mean(sample) for sample in samples]
        axes.scatter(x, means, 36, [colors[gamma] for gamma in gammas], zorder=3)
    axes.set_xticks(x, [f"{gamma:g}" for gamma in gammas])
    axes.set_xlabel(r"$\gamma$ in training")
    axes.set_ylabel("robust accuracy, last (%)")
    axes.legend()


def _contours(axes: Axes, grid: tuple[Array, Array, Array], levels: Array) -> Any:
    """A map of the heights; returns the filled contours for the color bar."""
    x, y, z = grid
    heights = np.ma.masked_invalid(z)
    filled = axes.contourf(x, y, heights, levels, cmap="cividis", extend="max")
    lines = axes.contour(x, y, heights, levels[::2], colors="white", linewidths=0.6)
    axes.clabel(lines, fontsize=7, fmt="%.2g")
    axes.plot(0, 0, "+", color="white", markersize=10)
    axes.set_xlabel(r"$\alpha$")
    axes.set_ylabel(r"$\beta$")
    return filled


def _relief(axes: Any, grid: tuple[Array, Array, Array], top: float) -> None:
    """The same in three dimensions."""
    x, y, z = grid
    axes.plot_surface(
        x, y, z.clip(max=top), cmap="cividis", vmin=0, vmax=top,
        rstride=1, cstride=1, linewidth=0.2, edgecolor="0.3",
    )  # fmt: skip
    axes.set_zlim(0, top)
    axes.set_xlabel(r"$\alpha$")
    axes.set_ylabel(r"$\beta$")
    axes.tick_params(labelsize=7, pad=-2)
