"""Plots of runs and of evaluations: what is drawn, read back from the figures."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from awp_optim.lab.reports.plots import (
    ablations,
    accuracy_by_radius,
    adversarial_images,
    curve_panels,
    learning_curves,
    perturbation_sizes,
)


def run(epochs, every, offset=0.0):
    """Evaluated every so many epochs: 80% on training images; 50, 51, 52 ... on test images."""
    rows = [{"epoch": float(e), "lr": 0.1} for e in range(epochs)]
    for i, row in enumerate(rows[every - 1 :: every]):
        row |= {"train_robust_acc": 0.8 + offset, "test_robust_acc": 0.5 + offset + 0.01 * i}
    return rows


def ended(best, last, train, natural=0.9):
    """A run with two evaluations."""
    first = {"epoch": 0.0, "test_robust_acc": best, "test_natural_acc": natural}
    return [first, {**first, "epoch": 1.0, "test_robust_acc": last, "train_robust_acc": train}]


def points_of(axes):
    """The heights of what has error bars, by label."""
    return {c.get_label(): list(c.lines[0].get_ydata(orig=False)) for c in axes.containers}


@pytest.mark.parametrize("seeds", [1, 3])
def test_learning_curves(tmp_path, drawn, lines_of, seeds):
    runs = {
        label: [run(6, 2, offset + 0.01 * seed) for seed in range(seeds)]
        for label, offset in (("AT", 0.0), ("AWP", 0.1))
    }
    learning_curves(runs, tmp_path / "curves.png", "title")
    robust, gap = drawn[0].axes
    lines, shift = lines_of(robust), np.mean(range(seeds))
    assert lines["AT, test images"].get_xdata() == pytest.approx([2, 4, 6])
    assert lines["AT, test images"].get_ydata() == pytest.approx(
        [50 + shift, 51 + shift, 52 + shift]
    )
    assert lines["AWP, training images"].get_ydata() == pytest.approx([90 + shift] * 3)
    assert lines_of(gap)["AT"].get_ydata() == pytest.approx([30, 29, 28])
    assert len(robust.collections) == (4 if seeds > 1 else 0)  # bands
    assert lines["AT, test images"].get_color() != lines["AWP, test images"].get_color()
    assert drawn[0].get_suptitle() == "title"
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_single_evaluation_is_a_point(tmp_path, drawn, lines_of):
    learning_curves({"AT": [run(6, 6)]}, tmp_path / "curves.png")
    line = lines_of(drawn[0].axes[1])["AT"]
    assert list(line.get_xdata()) == [6]
    assert line.get_marker() == "o"


def test_too_many_labels(tmp_path):
    with pytest.raises(ValueError, match="at most 4"):
        learning_curves({str(i): [run(2, 1)] for i in range(5)}, tmp_path / "curves.png")
    with pytest.raises(ValueError, match="at most 4"):
        accuracy_by_radius({str(i): {0.0: 1.0} for i in range(5)}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (4, (1, 4)), (5, (2, 3))])
def test_curve_panels(tmp_path, drawn, lines_of, count, shape):
    runs = {"AT": [run(6, 2), run(6, 2, 0.04)], "with it": [run(6, 2, 0.1)]}
    panels = {f"panel {i}": runs for i in range(count)}
    curve_panels(panels, tmp_path / "curves.png")
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    assert figure.axes[0].get_gridspec().get_geometry() == shape
    lines = lines_of(figure.axes[-1])
    labels = [f"{label}, {part} images" for label in runs for part in ("training", "test")]
    assert list(lines) == labels
    assert lines["AT, test images"].get_ydata() == pytest.approx([52, 53, 54])  # means over seeds
    assert lines["AT, training images"].get_ydata() == pytest.approx([82, 82, 82])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels


AT = [ended(0.52, 0.50, 0.80), ended(0.54, 0.50, 0.82)]
SIZES = {
    "AWP": {
        0.01: [ended(0.60, 0.58, 0.70), ended(0.64, 0.60, 0.72)],
        0.0: AT,
        0.001: [ended(0.56, 0.54, 0.74), ended(0.56, 0.54, 0.74)],
    },
    "RWP": {1.0: [ended(0.40, 0.30, 0.35), ended(0.42, 0.30, 0.35)]},
}


def horizontal_lines(axes):
    """Height, line style and color of the lines across the panel."""
    lines = [line for line in axes.get_lines() if list(line.get_xdata(orig=False)) == [0, 1]]
    return [
        (round(line.get_ydata(orig=False)[0], 6), line.get_linestyle(), line.get_color())
        for line in lines
    ]


def test_perturbation_sizes(tmp_path, drawn):
    perturbation_sizes(SIZES, tmp_path / "sizes.png")
    test, both = drawn[0].axes
    assert test.get_xscale() == both.get_xscale() == "log"
    points = points_of(test)
    assert list(points) == ["AWP, best", "AWP, last", "RWP, best", "RWP, last"]
    assert points["AWP, best"] == pytest.approx([56, 62])
    assert points["AWP, last"] == pytest.approx([54, 59])
    assert points_of(both)["AWP, training images"] == pytest.approx([74, 71])
    best = test.containers[0]
    assert best.lines[0].get_xdata() == pytest.approx([0.001, 0.01], rel=0.1)
    # Sample standard deviations: 0, and that of 60 and 64.
    lengths = [np.ptp(bar[:, 1]) for bar in best.lines[2][0].get_segments()]
    assert lengths == pytest.approx([0, 2 * np.sqrt(8)], abs=1e-9)
    color = best.lines[0].get_color()
    assert horizontal_lines(test) == [(53, "-", color), (50, "--", color)]


def test_one_seed_has_no_error_bars(tmp_path, drawn):
    one = {label: {g: seeds[:1] for g, seeds in of.items()} for label, of in SIZES.items()}
    perturbation_sizes(one, tmp_path / "sizes.png")
    assert not any(c.has_yerr for c in drawn[0].axes[0].containers)


def test_ablations(tmp_path, drawn):
    strategies = {
        "K2": {"1": (SIZES["AWP"][0.01], 26 / 23), "5": (SIZES["AWP"][0.001], 38 / 23)},
        "A": {"1": (SIZES["AWP"][0.01], 26 / 23)},
    }
    ablations(strategies, SIZES, tmp_path / "figure2.png")
    bars, best_and_last, gap = drawn[0].axes
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([62, 56, 62])
    assert [text.get_text() for text in bars.texts] == ["x 1.13", "x 1.65", "x 1.13"]
    assert [t.get_text() for t in bars.get_xticklabels()] == ["K2 = 1", "K2 = 5", "A = 1"]
    low, high = bars.get_ylim()
    assert low < 56 < 62 + np.sqrt(8) < high
    assert points_of(best_and_last)["AWP, best"] == pytest.approx([56, 62])
    assert points_of(gap)["AWP"] == pytest.approx([20, 12])
    assert [height for height, *_ in horizontal_lines(gap)] == [31]


def test_accuracy_by_radius(tmp_path, drawn, lines_of):
    points = {"FGSM": {0.2: 0.1, 0.0: 0.9, 0.1: 0.5}, "PGD-20": {0.0: 0.9, 0.1: 0.4, 0.2: 0.0}}
    accuracy_by_radius(points, tmp_path / "a.png", chance=0.1, marked=0.1)
    lines = lines_of(drawn[0].axes[0])
    assert list(lines["FGSM"].get_xdata()) == [0, 0.1, 0.2]
    assert lines["FGSM"].get_ydata() == pytest.approx([90, 50, 10])
    assert lines["chance, 10%"].get_ydata() == pytest.approx([10, 10])


@pytest.mark.parametrize("channels", [1, 3])
def test_adversarial_images(tmp_path, drawn, channels):
    x = np.random.default_rng(0).random((2, channels, 8, 8))
    x_adv = (x + 0.03).clip(0, 1)
    names = [("cat", "cat", "dog"), ("cat", "dog", "dog")]
    adversarial_images(x, x_adv, names, tmp_path / "a.png")
    shown = [axes.get_images()[0].get_array() for axes in drawn[0].axes]
    assert np.allclose(np.moveaxis(x[0], 0, -1).squeeze(), shown[0])
    assert np.allclose(np.moveaxis(x_adv[1], 0, -1).squeeze(), shown[3])
    assert [axes.get_xlabel() for axes in drawn[0].axes] == ["cat", "dog", "dog", "dog", "", ""]
    adversarial_images(x, x, names, tmp_path / "a.png")  # no difference to magnify


def test_a_picture_that_cannot_be_written_leaves_the_previous_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"before")

    def half(self, file, **kwargs):
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space"):
        accuracy_by_radius({"FGSM": {0.0: 1.0}}, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
