"""Plots of an evaluation: accuracy by radius, and adversarial images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from awp_optim.lab.reports.plots.style import MARKERS, MAX_PAIRS, picture, with_colors
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
    """Robust accuracy in [0, 1] by attack (at most 4) and eps: it must fall to zero.

    Lines mark ``chance``, the accuracy of guessing, and the eps of the rest of the evaluation.
    """
    with picture(path, title, 6.4, 4.2) as figure:
        axes = figure.subplots()
        for i, (color, label, points) in enumerate(with_colors(accuracies, MAX_PAIRS)):
            radii = sorted(points)
            percent = [100 * points[eps] for eps in radii]
            axes.plot(radii, percent, color=color, label=label, marker=MARKERS[i])
        axes.axhline(100 * chance, color="gray", linestyle=":", label=f"chance, {chance:.0%}")
        if marked is not None:
            axes.axvline(marked, color="gray", linestyle="--", lw=1, label=f"eps {radius(marked)}")
        axes.set_xlabel("eps, radius of the ball")
        axes.set_ylabel("robust accuracy (%)")
        axes.set_ylim(bottom=-2)
        axes.legend()


def adversarial_images(
    x: Any,
    x_adv: Any,
    names: Sequence[tuple[str, str, str]],
    path: Path | str,
    title: str = "",
) -> None:
    """Images, the same under attack, and the difference, magnified; a column each.

    The arrays have shape (N, C, H, W), with one or three channels and values in [0, 1]; ``names``
    holds for each image its label, and what the model predicts for the two, orange if it is wrong.
    """
    x, x_adv = (np.moveaxis(np.asarray(images, dtype=float), 1, -1) for images in (x, x_adv))
    largest = float(np.abs(x_adv - x).max())
    factor = max(1, round(0.5 / largest)) if largest > 0 else 1
    rows = {
        "image": x,
        "attacked": x_adv,
        f"difference x {factor}": 0.5 + factor * (x_adv - x),
    }
    width = max(8.0, 0.9 + 1.5 * len(x))  # titles are long
    with picture(path, title, width, 5.6) as figure:
        grid = figure.subplots(len(rows), len(x), squeeze=False)
        for axes, image in zip(grid.flat, np.concatenate(list(rows.values())), strict=True):
            image = image.squeeze(-1) if image.shape[-1] == 1 else image
            axes.imshow(image.clip(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
        for axes, name in zip(grid[:, 0], rows, strict=True):
            axes.set_ylabel(name)
        for column, (label, *predictions) in zip(grid.T, names, strict=True):
            for axes, predicted in zip(column, predictions, strict=False):
                color = "black" if predicted == label else "C1"
                axes.set_xlabel(predicted, fontsize=9, color=color)
