"""Plots of landscapes: what is drawn, read back from the figures."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from awp_optim.lab.reports import plots
from awp_optim.landscape import LossCurve, LossSurface

ALPHAS = np.linspace(-0.5, 0.5, 5)


def curve(sharp=1.0, directions=2, alphas=ALPHAS):
    """Parabolas 0.25 + sharp * (1 + d) * alpha^2; the natural loss is half of it."""
    alphas = np.asarray(alphas, dtype=float)
    adv = np.array([0.25 + sharp * (1 + d) * alphas**2 for d in range(directions)])
    se = np.full_like(adv, 0.01)
    return LossCurve(
        alphas, adv.mean(0), adv.mean(0) / 2, adv, adv / 2, se, se, se, 0.25, 0.125, 100
    )


def surface(sharp=1.0):
    a = np.linspace(-1, 1, 5)
    z = 0.5 + sharp * (a[:, None] ** 2 + 2 * a[None] ** 2)
    return LossSurface(a, a, z, z, z * 0, z * 0, z * 0, 0.5, 0.5, 100)


def rows(test=(0.5, 0.6, 0.55), train=(0.6, 0.8, 0.9)):
    """A run evaluated after 5, 10 and 15 epochs."""
    return [
        {"epoch": float(5 * i + 4), "test_natural_acc": 0.9, "test_robust_acc": a,
         "train_robust_acc": b}
        for i, (a, b) in enumerate(zip(test, train, strict=True))
    ]  # fmt: skip


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def test_a_line_is_the_mean_of_directions_and_seeds_and_the_band_their_range(
    tmp_path, drawn, lines_of
):
    runs = {"AT": [rows(), rows(test=(0.5, 0.6, 0.65))], "AT-AWP": [rows()]}
    curves = {"AT": [curve(1), curve(3)], "AT-AWP": [curve(0.5, alphas=ALPHAS[::-1])]}
    plots.landscapes(curves, runs, tmp_path / "a.png")
    accuracies, axes = drawn[0].axes
    lines = lines_of(axes)
    mean = 0.25 + 3 * ALPHAS**2  # of 1, 2, 3 and 6
    assert np.allclose(lines["AT"].get_data(), (ALPHAS, mean))
    assert np.allclose(lines["AT-AWP"].get_xdata(), ALPHAS)  # given in descending order
    band = axes.collections[0].get_paths()[0].vertices
    assert np.isclose(band[:, 1].max(), 0.25 + 6 * 0.25)
    dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert np.allclose(dashed[0].get_ydata(), mean / 2)
    assert "adversarial loss" in axes.get_ylabel()
    # Beside it, robust accuracy on training and test images.
    heights = [bar.get_height() for bar in accuracies.patches[:4]]
    assert heights == pytest.approx([90, 60, 90, 55])
    assert texts_of(accuracies) == ["gap 30.0", "gap 35.0"]


def test_what_cannot_be_one_picture_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="same alphas"):
        curves = {"AT": [curve(), curve(alphas=[0.0, 1.0])]}
        plots.landscapes(curves, {"AT": [rows()] * 2}, tmp_path / "a.png")
    labels = [str(i) for i in range(9)]
    with pytest.raises(ValueError, match="at most 8"):
        curves = {label: [curve()] for label in labels}
        plots.landscapes(curves, {label: [rows()] for label in labels}, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_losses_that_are_not_finite_are_left_out(tmp_path, drawn, lines_of):
    c = curve(1, 1)
    c.adv_losses[0, 0] = np.inf
    plots.directions({"AT": c}, tmp_path / "a.png")
    y = lines_of(drawn[0].axes[0])["AT, 1 direction"].get_ydata()
    assert np.isnan(y[0])
    assert np.isfinite(y[1:]).all()
    c.adv_losses[:] = np.nan
    plots.directions({"AT": c}, tmp_path / "b.png")
    assert texts_of(drawn[1].axes[0]) == ["no finite loss"]


def test_by_gamma(tmp_path, drawn, lines_of):
    gammas = {0.01: [curve(0.5)], 0.0: [curve(2)], 0.005: [curve(1)]}
    runs = {g: [rows(train=(0.6, 0.8, 0.9 - g))] for g in gammas}
    plots.landscapes_by_gamma(gammas, runs, tmp_path / "a.png")
    axes, accuracies = drawn[0].axes
    lines = lines_of(axes)
    assert [label.split()[-1] for label in lines] == ["0", "0.005", "0.01"]
    assert len({str(line.get_color()) for line in lines.values()}) == 3
    assert [t.get_text() for t in accuracies.get_xticklabels()] == ["0", "0.005", "0.01"]
    train, test = (list(c.lines[0].get_ydata()) for c in accuracies.containers)
    assert train == pytest.approx([90, 89.5, 89])
    assert test == pytest.approx([55, 55, 55])


def test_by_epoch(tmp_path, drawn, lines_of):
    curves = {epoch: curve(epoch / 10) for epoch in (15, 5, 10)}
    plots.landscapes_by_epoch(rows(), curves, tmp_path / "a.png")
    learning, before, after = drawn[0].axes
    assert list(lines_of(before)) == ["epoch 5", "epoch 10"]
    assert list(lines_of(after)) == ["epoch 15"]
    assert before.get_ylim() == after.get_ylim()
    assert max(after.get_ylim()) > curves[15].adv_loss.max()
    lines = lines_of(learning)
    assert "best epoch, 10" in lines
    assert np.allclose(lines["gap (points)"].get_ydata(), [10, 20, 35])
    assert np.allclose(lines["test images"].get_xdata(), [5, 10, 15])
    plots.landscapes_by_epoch(rows(), {5: curve()}, tmp_path / "b.png")
    *_, after = drawn[1].axes
    assert texts_of(after) == ["no checkpoint"]


def test_directions_are_a_thin_line_each(tmp_path, drawn, legend_of):
    plots.directions({"AT": curve(1, 10), "AT-AWP": curve(0.5, 1)}, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert len(axes.get_lines()) == 10 + 1 + 2
    assert legend_of(axes) == ["AT, 10 directions", "AT-AWP, 1 direction"]


def test_perturbed_weights(tmp_path, drawn, lines_of):
    gammas = [0.01, 0.1, 1.0]
    curves = {"AWP": curve(100, 1, gammas), "RWP": curve(1, 2, gammas)}
    plots.perturbed_weights(curves, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    x, y = lines_of(axes)["AWP"].get_data()
    assert np.allclose(x, gammas)
    assert np.allclose(y, 0.25 + 100 * x**2)
    plots.perturbed_weights({"AWP": curve(1, 1, [0.01, 0.1])}, tmp_path / "a.png")
    assert drawn[1].axes[0].get_yscale() == "linear"  # the rise is small


def test_histograms_pool_the_seeds(tmp_path, drawn, legend_of):
    weights = {"AT": [np.full((2, 2), -1.0), np.full(4, 1.0)], "AT-AWP": [np.zeros(3)]}
    plots.weight_histograms(weights, tmp_path / "a.png", layer="conv2")
    (axes,) = drawn[0].axes
    assert "standard deviation 1, largest 1" in legend_of(axes)[0]
    assert "conv2" in axes.get_xlabel()
    values, edges, _ = axes.patches[0].get_data()
    assert np.isclose((values * np.diff(edges)).sum(), 1)
    assert np.isclose(values[0], values[-1])


def test_surfaces_have_one_scale(tmp_path, drawn):
    plots.surfaces({"AT": surface(2), "AT-AWP": surface(1)}, tmp_path / "a.png")
    maps = [axes for axes in drawn[0].axes if axes.get_title() in ("AT", "AT-AWP")]
    assert len(maps) == 2
    assert np.array_equal(*(axes.collections[0].levels for axes in maps))
    reliefs = [axes for axes in drawn[0].axes if hasattr(axes, "get_zlim")]
    assert len({axes.get_zlim() for axes in reliefs}) == 1


def test_a_flat_surface_with_a_hole(tmp_path):
    s = surface(0)
    s.adv_loss[0, 0] = np.nan
    plots.surfaces({"flat": s}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_on_the_fly_against_pregenerated(tmp_path, drawn, lines_of, legend_of):
    curves = {"on the fly": curve(2, 2), "pre-generated": curve(1, 2)}
    plots.on_the_fly(curves, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert legend_of(axes) == ["on the fly", "pre-generated", "natural loss"]
    band = axes.collections[0].get_paths()[0].vertices
    mean = lines_of(axes)["on the fly"].get_ydata()
    assert np.isclose(band[:, 1].max(), mean.max() + 0.02)  # two standard errors
