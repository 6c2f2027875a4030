"""Pictures of landscapes: what is drawn where, read back from the figures."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex

from awp_optim.lab.reports import plots
from awp_optim.landscape import LossCurve, LossSurface

ALPHAS = np.linspace(-0.5, 0.5, 5)


def curve(sharp=1.0, directions=2, alphas=ALPHAS, centre=0.25):
    """Parabolas ``centre + sharp * (1 + d) * alpha^2``; the natural loss is half of it."""
    alphas = np.asarray(alphas, dtype=float)
    adv = np.array([centre + sharp * (1 + d) * alphas**2 for d in range(directions)])
    se = np.full_like(adv, 0.01)
    return LossCurve(
        alphas, adv.mean(0), adv.mean(0) / 2, adv, adv / 2, se, se, se, centre, centre / 2, 100
    )


def surface(sharp=1.0, side=5):
    a = np.linspace(-1, 1, side)
    z = 0.5 + sharp * (a[:, None] ** 2 + 2 * a[None] ** 2)
    return LossSurface(a, a, z, z, z * 0, z * 0, z * 0, 0.5, 0.5, 100)


def rows(test=(0.5, 0.6, 0.55), train=(0.6, 0.8, 0.9)):
    return [
        {"epoch": float(5 * i + 4), "test_natural_acc": 0.9, "test_robust_acc": a,
         "train_robust_acc": b}
        for i, (a, b) in enumerate(zip(test, train, strict=True))
    ]  # fmt: skip


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


class TestLandscapes:
    def test_a_line_is_the_mean_of_directions_and_seeds_and_the_band_their_range(
        self, tmp_path, drawn
    ):
        plots.landscapes({"AT": [curve(1), curve(3)], "AT-AWP": [curve(0.5)]}, tmp_path / "a.png")
        (axes,) = drawn[0].axes
        x, y = lines_of(axes)["AT"].get_data()
        assert np.allclose(x, ALPHAS)
        assert np.allclose(y, 0.25 + 3 * ALPHAS**2)  # of 1, 2, 3 and 6
        band = axes.collections[0].get_paths()[0].vertices
        assert np.isclose(band[:, 1].max(), 0.25 + 6 * 0.25)
        assert "distance" in axes.get_xlabel()
        assert "adversarial loss" in axes.get_ylabel()
        dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
        assert np.allclose(dashed[0].get_ydata(), (0.25 + 3 * ALPHAS**2) / 2)

    def test_alphas_may_be_in_any_order(self, tmp_path, drawn):
        plots.landscapes({"AT": [curve(alphas=ALPHAS[::-1])]}, tmp_path / "a.png")
        assert np.allclose(lines_of(drawn[0].axes[0])["AT"].get_xdata(), ALPHAS)

    def test_relative(self, tmp_path, drawn):
        plots.landscapes({"AT": [curve(1, 1)]}, tmp_path / "a.png", relative=True)
        (axes,) = drawn[0].axes
        assert np.allclose(lines_of(axes)["AT"].get_ydata(), ALPHAS**2)
        assert "rise" in axes.get_ylabel()

    def test_gaps_stand_beside(self, tmp_path, drawn):
        runs = {"AT": [rows(), rows(test=(0.5, 0.6, 0.65))], "AT-AWP": [rows()]}
        curves = {label: [curve()] for label in runs}
        plots.landscapes(curves, tmp_path / "a.png", runs=runs)
        beside, axes = drawn[0].axes
        assert [t.get_text() for t in beside.texts] == ["gap 30.0", "gap 35.0"]
        heights = [bar.get_height() for bar in beside.patches[:4]]
        assert heights == pytest.approx([90, 60, 90, 55])
        assert to_hex(beside.patches[0].get_facecolor()) == to_hex(lines_of(axes)["AT"].get_color())

    def test_other_alphas_are_refused_and_nothing_is_written(self, tmp_path):
        with pytest.raises(ValueError, match="same alphas"):
            plots.landscapes({"AT": [curve(), curve(alphas=[0.0, 1.0])]}, tmp_path / "a.png")
        with pytest.raises(ValueError, match="at most 8"):
            plots.landscapes({str(i): [curve()] for i in range(9)}, tmp_path / "a.png")
        assert not (tmp_path / "a.png").exists()

    def test_what_is_not_finite_is_left_out(self, tmp_path, drawn):
        c = curve(1, 1)
        c.adv_losses[0, 0] = np.inf
        plots.landscapes({"AT": [c]}, tmp_path / "a.png")
        y = lines_of(drawn[0].axes[0])["AT"].get_ydata()
        assert np.isnan(y[0])
        assert np.isfinite(y[1:]).all()
        c.adv_losses[:] = np.nan
        c.nat_losses[:] = np.nan
        plots.landscapes({"AT": [c]}, tmp_path / "b.png")
        assert [t.get_text() for t in drawn[1].axes[0].texts] == ["no finite loss"]


def test_by_gamma(tmp_path, drawn):
    gammas = {0.01: [curve(0.5)], 0.0: [curve(2)], 0.005: [curve(1)]}
    runs = {g: [rows(train=(0.6, 0.8, 0.9 - g))] for g in gammas}
    plots.landscapes_by_gamma(gammas, tmp_path / "a.png", runs=runs)
    axes, beside = drawn[0].axes
    assert [t.split()[-1] for t in legend_of(axes)] == ["0", "0.005", "0.01"]
    colours = [to_hex(line.get_color()) for line in lines_of(axes).values()]
    assert len(set(colours)) == 3
    assert colours[0] == to_hex("0.55")  # without AWP: grey
    assert [t.get_text() for t in beside.get_xticklabels()] == ["0", "0.005", "0.01"]
    (train, _) = (c.lines[0].get_ydata() for c in beside.containers)
    assert list(train) == pytest.approx([90, 89.5, 89])


class TestByEpoch:
    def test_the_best_epoch_parts_them(self, tmp_path, drawn):
        curves = {epoch: curve(epoch / 10) for epoch in (15, 5, 10)}
        plots.landscapes_by_epoch(rows(), curves, tmp_path / "a.png")
        learning, before, after = drawn[0].axes
        assert legend_of(before) == ["epoch 5", "epoch 10"]
        assert legend_of(after) == ["epoch 15"]
        assert before.get_ylim() == after.get_ylim()
        assert "best epoch, 10" in legend_of(learning)
        assert np.allclose(lines_of(learning)["gap (points)"].get_ydata(), [10, 20, 35])
        assert np.allclose(lines_of(learning)["test images"].get_xdata(), [5, 10, 15])

    def test_none_after_it(self, tmp_path, drawn):
        plots.landscapes_by_epoch(rows(), {5: curve()}, tmp_path / "a.png")
        assert [t.get_text() for t in drawn[0].axes[2].texts] == ["no checkpoint"]
        with pytest.raises(ValueError, match="no landscape"):
            plots.landscapes_by_epoch(rows(), {}, tmp_path / "b.png")


def test_directions_are_a_thin_line_each(tmp_path, drawn):
    plots.directions({"AT": curve(1, 10), "AT-AWP": curve(0.5, 1)}, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert len(axes.get_lines()) == 10 + 1 + 2
    assert legend_of(axes) == ["AT, 10 directions", "AT-AWP, 1 direction"]


class TestPerturbedWeights:
    def test_by_gamma_on_a_log_scale(self, tmp_path, drawn):
        gammas = [0.0, 0.01, 0.1, 1.0]
        curves = {"AWP": curve(100, 1, gammas), "RWP": curve(1, 2, gammas)}
        plots.perturbed_weights(curves, tmp_path / "a.png")
        (axes,) = drawn[0].axes
        assert axes.get_xscale() == axes.get_yscale() == "log"
        x, y = lines_of(axes)["AWP"].get_data()
        assert np.allclose(x, gammas[1:])
        assert np.allclose(y, 0.25 + 100 * x**2)

    def test_small_rises_on_a_linear_one(self, tmp_path, drawn):
        plots.perturbed_weights({"AWP": curve(1, 1, [0.01, 0.1])}, tmp_path / "a.png")
        assert drawn[0].axes[0].get_yscale() == "linear"
        with pytest.raises(ValueError, match="no gamma above 0"):
            plots.perturbed_weights({"AWP": curve(1, 1, [0.0])}, tmp_path / "b.png")


def test_histograms_pool_the_seeds(tmp_path, drawn):
    weights = {"AT": [np.full((2, 2), -1.0), np.full(4, 1.0)], "AT-AWP": [np.zeros(3)]}
    plots.weight_histograms(weights, tmp_path / "a.png", layer="conv2")
    (axes,) = drawn[0].axes
    assert "standard deviation 1, largest 1" in legend_of(axes)[0]
    assert axes.get_xlabel() == "weight of conv2"
    values, edges, _ = axes.patches[0].get_data()
    assert np.isclose((values * np.diff(edges)).sum(), 1)
    assert np.isclose(values[0], values[-1])
    with pytest.raises(ValueError, match="no finite weight"):
        plots.weight_histograms({"AT": [np.array([np.nan])]}, tmp_path / "b.png")


class TestSurfaces:
    def test_all_on_one_scale(self, tmp_path, drawn):
        plots.surfaces({"AT": surface(2), "AT-AWP": surface(1)}, tmp_path / "a.png")
        flat = [axes for axes in drawn[0].axes if axes.get_title() in ("AT", "AT-AWP")]
        assert len(flat) == 2
        levels = [axes.collections[0].levels for axes in flat]
        assert np.array_equal(*levels)
        solid = [axes for axes in drawn[0].axes if hasattr(axes, "get_zlim")]
        assert len({axes.get_zlim() for axes in solid}) == 1

    def test_what_cannot_be_drawn(self, tmp_path):
        with pytest.raises(ValueError, match="no surface"):
            plots.surfaces({}, tmp_path / "a.png")
        with pytest.raises(ValueError, match="two alphas and two betas"):
            plots.surfaces({"AT": surface(side=1)}, tmp_path / "a.png")

    def test_a_flat_one_and_one_with_holes(self, tmp_path):
        s = surface(0)
        s.adv_loss[0, 0] = np.nan
        plots.surfaces({"flat": s}, tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 10_000


def test_on_the_fly_against_pregenerated(tmp_path, drawn):
    curves = {"made anew": curve(2, 2), "pre-generated": curve(1, 2)}
    plots.on_the_fly(curves, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert legend_of(axes) == ["made anew", "pre-generated", "natural loss"]
    band = axes.collections[0].get_paths()[0].vertices
    mean = lines_of(axes)["made anew"].get_ydata()
    assert np.isclose(band[:, 1].max(), mean.max() + 0.02)  # two standard errors
