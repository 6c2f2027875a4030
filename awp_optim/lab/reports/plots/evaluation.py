"""Pictures of an evaluation: accuracy by radius, adversarial images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awp_optim.lab.reports.plots.parts import MARKERS, canvas, coloured, save, tidy
from awp_optim.lab.reports.tables import radius

__all__ = ["accuracy_by_radius", "adversarial_images"]


def accuracy_by_radius(
    accuracies: Mapping[str, Mapping[float, float]],
    path: Path | str,
    title: str = "",
    *,
    chance: float = 0.0,
    marked: float | None = None,
) -> None:
    """Robust accuracy under attacks of growing radius: it must fall to zero.

    Args:
        accuracies: for each attack, accuracy in [0, 1] by eps.
        path: the picture to write.
        title: put above it.
        chance: accuracy of a guess, drawn as a line.
        marked: the eps that the rest of the evaluation is about.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are more attacks than colours.
    """
    figure = canvas(6.4, 4.2)
    axes = figure.subplots()
    for (colour, (label, points)), marker in zip(coloured(accuracies), MARKERS, strict=False):
        radii = sorted(points)
        values = [100 * points[eps] for eps in radii]
        axes.plot(radii, values, color=colour, label=label, marker=marker, markersize=4)
    axes.axhline(100 * chance, color="grey", linestyle=":", label=f"chance, {chance:.0%}")
    if marked is not None:
        axes.axvline(marked, color="grey", linestyle="--", lw=1, label=f"eps {radius(marked)}")
    axes.set_xlabel("eps, radius of the ball")
    axes.set_ylabel("robust accuracy (%)")
    axes.set_ylim(bottom=-2)
    axes.legend(frameon=False)
    tidy(axes)
    save(figure, path, title)


def adversarial_images(
    x: Any, x_adv: Any, names: list[tuple[str, str, str]], path: Path | str, title: str = ""
) -> None:
    """Images as they are, attacked, and the difference, magnified; a column each.

    Args:
        x, x_adv: arrays of shape (N, C, H, W) in [0, 1], one or three channels.
        names: for each image its label and what the model says of the two.
        path: the picture to write.
        title: put above it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    x, x_adv = (np.moveaxis(np.asarray(t, dtype=float), 1, -1) for t in (x, x_adv))
    largest = float(np.abs(x_adv - x).max())
    factor = max(1, round(0.5 / largest)) if largest > 0 else 1
    figure = canvas(max(8.0, 0.9 + 1.5 * len(x)), 5.6)  # the title is long
    grid = figure.subplots(3, len(x), squeeze=False)
    titles = ("as it is", "attacked", f"difference x {factor}")
    for i, (label, before, after) in enumerate(names):
        pictures = (x[i], x_adv[i], 0.5 + factor * (x_adv[i] - x[i]))
        captions = (f"{before}", f"{after}", "")
        for row, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            axes = grid[row, i]
            picture = picture[..., 0] if picture.shape[-1] == 1 else picture
            axes.imshow(picture.clip(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            wrong = row < 2 and caption != label
            axes.set_xlabel(caption, fontsize=9, color="#D55E00" if wrong else "black")
    for axes, name in zip(grid[:, 0], titles, strict=True):
        axes.set_ylabel(name, fontsize=10)
    save(figure, path, title)
