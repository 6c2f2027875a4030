"""Pictures of weight loss landscapes.

They draw what :mod:`awp_optim.landscape` measures: cross-entropies of perturbed models. A line is
the mean over directions and runs (seeds), its band reaches from the lowest of them to the highest.
Losses that are not finite are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from awp_optim.lab.reports.plots.parts import (
    COLOURS,
    MARKERS,
    band,
    by_epoch,
    canvas,
    coloured,
    save,
    tidy,
)
from awp_optim.lab.reports.summary import Runs, summary
from awp_optim.lab.run_folder import Row, best

if TYPE_CHECKING:
    from awp_optim.landscape import LossCurve, LossSurface

__all__ = [
    "directions",
    "landscapes",
    "landscapes_by_epoch",
    "landscapes_by_gamma",
    "on_the_fly",
    "perturbed_weights",
    "surfaces",
    "weight_histograms",
]

ALPHA = r"$\alpha$, distance along the direction"
LOSS = "adversarial loss (cross-entropy)"
RISE = r"rise of the adversarial loss, $g(\alpha) - g(0)$"


def landscapes(
    curves: Mapping[str, Sequence[LossCurve]],
    path: Path | str,
    title: str = "",
    *,
    runs: Mapping[str, Runs] | None = None,
    relative: bool = False,
) -> None:
    """Landscapes of several methods, as in Figures 1 (b) and 3 (b) of the paper.

    Args:
        curves: by label, 8 at the most, one for each run (seed) with the same alphas. Where there
            are few lines, four at the most, the loss on the images as they are is dashed.
        path: the picture to write.
        title: put above the panels.
        runs: the same labels' rows: robust accuracy and its gap at the end go beside the curves.
        relative: draw g(alpha) - g(0).

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are more labels than colours, or curves differ in their alphas.
    """
    figure = canvas(11 if runs else 7, 4.4)
    *beside, axes = figure.subplots(1, 2 if runs else 1, squeeze=False)[0]
    with_natural = len(curves) <= 4 and not relative
    for i, (colour, (label, seeds)) in enumerate(coloured(curves, len(COLOURS))):
        x, values = _stacked(seeds, relative=relative)
        band(axes, x, values, colour, label, marker=MARKERS[i], markersize=4)
        if with_natural:
            natural = _stacked(seeds, natural=True)[1].mean(0)
            axes.plot(x, natural, color=colour, linestyle="--", linewidth=1)
    if with_natural:
        axes.plot([], [], color="0.3", linestyle="--", linewidth=1, label="dashed: natural loss")
    _by_alpha(axes, RISE if relative else LOSS)
    axes.legend(frameon=False, fontsize=8)
    if runs:
        _gaps(beside[0], runs)
    save(figure, path, title)


def landscapes_by_gamma(
    curves: Mapping[float, Sequence[LossCurve]],
    path: Path | str,
    title: str = "",
    *,
    runs: Mapping[float, Runs] | None = None,
) -> None:
    """Landscapes by the size of AWP's perturbation in training, as in Figure 2 (c) and (d).

    Args:
        curves: by gamma, one for each run (seed). Gamma 0, training without AWP, is grey.
        path: the picture to write.
        title: put above the panels.
        runs: the same gammas' rows: robust accuracy at the end goes beside the curves.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: curves of a gamma differ in their alphas.
    """
    figure = canvas(11 if runs else 7, 4.4)
    axes, *beside = figure.subplots(1, 2 if runs else 1, squeeze=False)[0]
    gammas = sorted(curves)
    shades = _shades("viridis", sum(g > 0 for g in gammas), 0.0, 0.88)
    colours = {g: next(shades) if g > 0 else "0.55" for g in gammas}
    for gamma in gammas:
        x, values = _stacked(curves[gamma])
        band(axes, x, values, colours[gamma], rf"$\gamma$ = {gamma:g}")
    _by_alpha(axes, LOSS)
    axes.legend(frameon=False, fontsize=8)
    if runs:
        _accuracy_by_gamma(beside[0], runs, colours)
    save(figure, path, title)


def landscapes_by_epoch(
    rows: Sequence[Row], curves: Mapping[int, LossCurve], path: Path | str, title: str = ""
) -> None:
    """A run's learning curve, and its landscapes before and after the best epoch, as in Figure 1.

    Args:
        rows: of the run's epochs.
        curves: of its checkpoints, by the number of epochs done.
        path: the picture to write.
        title: put above the panels.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no curve.
    """
    if not curves:
        raise ValueError("there is no landscape to draw")
    figure = canvas(14, 4.2)
    learning, before, after = figure.subplots(1, 3)
    top = int(best(list(rows))["epoch"]) + 1
    _learning_curve(learning, rows, top)
    early = [epoch for epoch in sorted(curves) if epoch <= top]
    late = [epoch for epoch in sorted(curves) if epoch > top]
    for axes, epochs, shades, when in (
        (before, early, "Blues", f"up to the best epoch, {top}"),
        (after, late, "Reds", f"after the best epoch, {top}"),
    ):
        for epoch, colour in zip(epochs, _shades(shades, len(epochs), 0.35, 1.0), strict=False):
            x, values = _stacked([curves[epoch]])
            band(axes, x, values, colour, f"epoch {epoch}")
        axes.set_title(f"landscapes {when}", fontsize=10)
        _by_alpha(axes, LOSS)
        if epochs:
            axes.legend(frameon=False, fontsize=8)
        else:
            _say(axes, "no checkpoint")
    shown = [axes for axes, epochs in ((before, early), (after, late)) if epochs]
    limits = [
        (min(a for a, _ in pairs), max(b for _, b in pairs))
        for pairs in ([a.get_xlim() for a in shown], [a.get_ylim() for a in shown])
    ]
    for axes in (before, after):
        axes.set_xlim(limits[0])
        axes.set_ylim(limits[1])
    save(figure, path, title)


def directions(curves: Mapping[str, LossCurve], path: Path | str, title: str = "") -> None:
    """Whether a landscape depends on the direction drawn, as in Figure 5: a thin line for each.

    Args:
        curves: by label (a checkpoint), 8 at the most.
        path: the picture to write.
        title: put above it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are more labels than colours.
    """
    figure = canvas(7, 4.4)
    axes = figure.subplots()
    for colour, (label, curve) in coloured(curves, len(COLOURS)):
        x, values = _stacked([curve])
        axes.plot(x, values.T, color=colour, linewidth=0.7, alpha=0.5)
        count = "1 direction" if len(values) == 1 else f"{len(values)} directions"
        axes.plot(x, values.mean(0), color=colour, linewidth=2.2, label=f"{label}, {count}")
    _by_alpha(axes, LOSS)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path, title)


def perturbed_weights(curves: Mapping[str, LossCurve], path: Path | str, title: str = "") -> None:
    """Adversarial loss of one model by the size of a weight perturbation, as in Figure 3 (a).

    Args:
        curves: by the kind of perturbation ("AWP", "RWP"), 8 at the most: of the same model, along
            directions as long as each layer's weights, so that their alphas are gammas. Only those
            above 0 are drawn.
        path: the picture to write.
        title: put above it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are more labels than colours, or no gamma above 0.
    """
    figure = canvas(7, 4.4)
    axes = figure.subplots()
    for i, (colour, (label, curve)) in enumerate(coloured(curves, len(COLOURS))):
        x, values = _stacked([curve])
        if not (x > 0).any():
            raise ValueError(f"{label} has no gamma above 0")
        values = values[:, x > 0]
        band(axes, x[x > 0], values, colour, label, marker=MARKERS[i], markersize=4)
    centre = next(iter(curves.values())).adv_center
    axes.axhline(centre, color="0.4", linestyle=":", label=r"unperturbed ($\gamma$ = 0)")
    axes.set_xscale("log")
    losses = _finite(np.concatenate([c.adv_losses.ravel() for c in curves.values()]))
    if np.nanmin(losses, initial=np.inf) > 0 and np.nanmax(losses, initial=0.0) > 10 * centre:
        axes.set_yscale("log")  # else what happens at small gammas could not be seen
    axes.set_xlabel(r"$\gamma$, size of the perturbation (share of each layer's norm)")
    axes.set_ylabel(LOSS)
    tidy(axes)
    _say_if_empty(axes)
    axes.legend(frameon=False, fontsize=9)
    save(figure, path, title)


def weight_histograms(
    weights: Mapping[str, Sequence[Any]], path: Path | str, title: str = "", *, layer: str = ""
) -> None:
    """How the weights of a layer are distributed, as in Figure 4.

    Args:
        weights: by label, 8 at the most, an array of any shape for each run (seed), which are
            counted together.
        path: the picture to write.
        title: put above it.
        layer: its name.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are more labels than colours, or no finite weight.
    """
    pooled = {
        label: np.concatenate([np.ravel(np.asarray(a, dtype=float)) for a in arrays])
        for label, arrays in weights.items()
    }
    pooled = {label: values[np.isfinite(values)] for label, values in pooled.items()}
    if not all(values.size for values in pooled.values()):
        raise ValueError("there is no finite weight to count")
    # A few large weights would make the rest a single bar: what is beyond is in the outer bins.
    reach = max(float(np.quantile(np.abs(values), 0.999)) for values in pooled.values()) or 1.0
    edges = np.linspace(-reach, reach, 81)
    figure = canvas(7, 4.4)
    axes = figure.subplots()
    for colour, (label, values) in coloured(pooled, len(COLOURS)):
        deviation, largest = float(values.std()), float(np.abs(values).max())
        density = np.histogram(values.clip(-reach, reach), edges, density=True)[0]
        name = f"{label}: standard deviation {deviation:.3g}, largest {largest:.3g}"
        axes.stairs(density, edges, color=colour, linewidth=1.4, label=name)
    axes.set_xlabel(f"weight of {layer}" if layer else "weight")
    axes.set_ylabel("density")
    tidy(axes)
    _room_for_legend(axes)
    save(figure, path, title)


def surfaces(surfaces: Mapping[str, LossSurface], path: Path | str, title: str = "") -> None:
    """Relative landscapes on a plane, |g(alpha, beta) - g(0, 0)|, as in Figure 6.

    Args:
        surfaces: by label (a checkpoint, a method), a column each, all on the same scale.
        path: the picture to write.
        title: put above the panels.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is none, or one has fewer than two alphas or betas.
    """
    import matplotlib as mpl

    if not surfaces:
        raise ValueError("there is no surface to draw")
    for label, s in surfaces.items():
        if min(s.relative.shape) < 2:
            raise ValueError(f"{label}: a surface needs two alphas and two betas or more")
    heights = np.concatenate([_finite(s.relative).ravel() for s in surfaces.values()])
    heights = heights[np.isfinite(heights)]
    # The corners are far away and steep: without a cut they alone would be seen.
    top = float(np.quantile(heights, 0.95)) if heights.size else 1.0
    levels = np.linspace(0, top or 1.0, 13)
    figure = canvas(max(5.0, 0.9 + 3.4 * len(surfaces)), 7)
    colours = mpl.colormaps["cividis"]
    shared = None
    for i, (label, s) in enumerate(surfaces.items()):
        across, along = np.argsort(s.alphas), np.argsort(s.betas)
        z = _finite(s.relative)[np.ix_(across, along)].T  # rows are y, beta
        x, y = np.meshgrid(s.alphas[across], s.betas[along])
        flat = figure.add_subplot(2, len(surfaces), i + 1)
        shown = np.ma.masked_invalid(z)
        shared = flat.contourf(x, y, shown, levels, cmap=colours, extend="max")
        lines = flat.contour(x, y, shown, levels[::2], colors="white", linewidths=0.6)
        flat.clabel(lines, fontsize=7, fmt="%.2g")
        flat.plot(0, 0, "+", color="white", markersize=10)
        flat.set_title(label, fontsize=10)
        flat.set_xlabel(r"$\alpha$")
        flat.set_ylabel(r"$\beta$")
        solid = figure.add_subplot(2, len(surfaces), len(surfaces) + i + 1, projection="3d")
        solid.plot_surface(
            x, y, z.clip(max=levels[-1]), cmap=colours, vmin=0, vmax=levels[-1],
            rstride=1, cstride=1, linewidth=0.2, edgecolor="0.3",
        )  # fmt: skip
        solid.set_zlim(0, levels[-1])
        solid.set_xlabel(r"$\alpha$")
        solid.set_ylabel(r"$\beta$")
        solid.tick_params(labelsize=7, pad=-2)
    figure.colorbar(
        shared, ax=figure.axes, shrink=0.6, label=r"$|g(\alpha, \beta) - g(0, 0)|$", format="%.2g"
    )
    save(figure, path, title)


def on_the_fly(curves: Mapping[str, LossCurve], path: Path | str, title: str = "") -> None:
    """Why adversarial examples are made anew for every perturbed model (Section 3).

    Args:
        curves: of the same model and direction by how the examples were made ("on the fly",
            "pre-generated"), 8 at the most. A band is two standard errors to either side.
        path: the picture to write.
        title: put above it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are more labels than colours.
    """
    figure = canvas(7, 4.4)
    axes = figure.subplots()
    for i, (colour, (label, curve)) in enumerate(coloured(curves, len(COLOURS))):
        x, values = _stacked([curve])
        mean = values.mean(0)
        # Of the mean over directions it is at most the mean: the examples are the same.
        error = 2 * _finite(curve.adv_stderr[:, np.argsort(curve.alphas)]).mean(0)
        axes.plot(x, mean, color=colour, label=label, marker=MARKERS[i], markersize=4)
        axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.15, lw=0)
    first = next(iter(curves.values()))
    x, natural = _stacked([first], natural=True)
    axes.plot(x, natural.mean(0), color="0.4", linestyle="--", linewidth=1, label="natural loss")
    _by_alpha(axes, "loss (cross-entropy)")
    axes.legend(frameon=False, fontsize=9)
    save(figure, path, title)


# --- Parts ------------------------------------------------------------------------------------


def _stacked(
    curves: Sequence[LossCurve], *, natural: bool = False, relative: bool = False
) -> tuple[Any, Any]:
    """Alphas, ascending, and the losses there, shape (runs times directions, alphas)."""
    first = curves[0].alphas
    if any(not np.array_equal(c.alphas, first) for c in curves):
        raise ValueError("runs that are drawn as one line must have the same alphas")
    losses = [
        (c.nat_losses if natural else c.adv_losses) - (c.adv_center if relative else 0.0)
        for c in curves
    ]
    order = np.argsort(first, kind="stable")
    return first[order], _finite(np.concatenate(losses)[:, order])


def _finite(values: Any) -> Any:
    return np.where(np.isfinite(values), values, np.nan)


def _shades(name: str, count: int, low: float, high: float) -> Any:
    """So many colours of a map of matplotlib's, evenly from ``low`` to ``high``."""
    import matplotlib as mpl

    return iter([mpl.colormaps[name](share) for share in np.linspace(low, high, max(count, 1))])


def _by_alpha(axes: Any, y: str) -> None:
    axes.set_xlabel(ALPHA)
    axes.set_ylabel(y)
    tidy(axes)
    _say_if_empty(axes)


def _say_if_empty(axes: Any) -> None:
    drawn: Iterable[Any] = (np.asarray(line.get_ydata(), dtype=float) for line in axes.lines)
    if axes.lines and not any(np.isfinite(y).any() for y in drawn):
        _say(axes, "no finite loss")


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.4")


def _room_for_legend(axes: Any) -> None:
    """The legend above the data, not over it."""
    _, top = axes.get_ylim()
    axes.set_ylim(0, top * (1.05 + 0.08 * len(axes.get_legend_handles_labels()[1])))
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _learning_curve(axes: Any, rows: Sequence[Row], top: int) -> None:
    evaluated = [row for row in rows if "test_robust_acc" in row]
    epochs = [row["epoch"] + 1 for row in evaluated]
    train, test = (
        np.array([100 * row.get(f"{part}_robust_acc", np.nan) for row in evaluated])
        for part in ("train", "test")
    )
    marker = "o" if len(epochs) == 1 else None
    styles = ("--", "-", "-.")
    names = ("training images", "test images", "gap (points)")
    for y, colour, line, name in zip(
        (train, test, train - test), COLOURS, styles, names, strict=False
    ):
        axes.plot(epochs, y, color=colour, linestyle=line, marker=marker, label=name)
    axes.axvline(top, color="0.4", linestyle=":", label=f"best epoch, {top}")
    axes.set_ylabel("robust accuracy (%)")
    axes.set_title("learning curve", fontsize=10)
    by_epoch(axes)
    axes.legend(frameon=False, fontsize=8)


def _gaps(axes: Any, runs: Mapping[str, Runs]) -> None:
    """Robust accuracy on training and test images at the end, and what is between them."""
    for i, (colour, (_, seeds)) in enumerate(coloured(runs, len(COLOURS))):
        figures = [summary(rows) for rows in seeds]
        train, test, gap = (
            np.array([run[name] for run in figures])
            for name in ("robust, training set, last", "robust, last", "gap, last")
        )
        for at, values, alpha in ((i - 0.2, train, 0.35), (i + 0.2, test, 0.9)):
            axes.bar(at, values.mean(), 0.38, color=colour, alpha=alpha)
            if len(values) > 1:
                axes.errorbar(at, values.mean(), values.std(ddof=1), color="black", capsize=2)
        highest = max((v.mean() + (v.std(ddof=1) if len(v) > 1 else 0)) for v in (train, test))
        place = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(f"gap {gap.mean():.1f}", (i, highest), (0, 4), **place)
    axes.bar(0, 0, color="0.3", alpha=0.35, label="light: training images")
    axes.bar(0, 0, color="0.3", alpha=0.9, label="dark: test images")
    turned = len(runs) > 3 or max(map(len, runs)) > 12
    axes.set_xticks(
        range(len(runs)), list(runs), fontsize=8,
        **({"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if turned else {}),
    )  # fmt: skip
    axes.set_ylabel("robust accuracy at the end (%)")
    tidy(axes)
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.16)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def _accuracy_by_gamma(axes: Any, runs: Mapping[float, Runs], colours: Mapping[float, Any]) -> None:
    """As Figure 2 (d): a point for each gamma, at even distances, in the colour of its curve."""
    gammas = sorted(runs)
    for name, line, label in (
        ("robust, training set, last", "--", "training images"),
        ("robust, last", "-", "test images"),
    ):
        values = [np.array([summary(rows)[name] for rows in runs[g]]) for g in gammas]
        means = [v.mean() for v in values]
        errors = [v.std(ddof=1) if len(v) > 1 else 0.0 for v in values]
        axes.errorbar(
            range(len(gammas)), means, errors if any(errors) else None, color="0.4", linestyle=line,
            capsize=2, elinewidth=1, label=label, zorder=2,
        )  # fmt: skip
        axes.scatter(
            range(len(gammas)), means, color=[colours.get(g, "0.4") for g in gammas], zorder=3
        )
    axes.set_xticks(range(len(gammas)), [f"{g:g}" for g in gammas])
    axes.set_xlabel(r"$\gamma$ in training")
    axes.set_ylabel("robust accuracy at the end (%)")
    tidy(axes)
    axes.legend(frameon=False, fontsize=8)
