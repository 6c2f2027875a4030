"""The pictures: what is drawn where, from one seed or several, from one evaluation or many."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from awp_optim.lab.reports.plots import (
    ablations,
    accuracy_by_radius,
    adversarial_images,
    curve_panels,
    learning_curves,
    perturbation_sizes,
)


def run(epochs, evaluated, offset=0.0):
    rows = [{"epoch": float(e), "lr": 0.1} for e in range(epochs)]
    for i, row in enumerate(rows[evaluated - 1 :: evaluated]):
        row |= {"train_robust_acc": 0.8 + offset, "test_robust_acc": 0.5 + offset + 0.01 * i}
    return rows


def ended(best, last, train, natural=0.9):
    """A run with two evaluations."""
    first = {"epoch": 0.0, "test_robust_acc": best, "test_natural_acc": natural}
    return [first, {**first, "epoch": 1.0, "test_robust_acc": last, "train_robust_acc": train}]


def lines_of(axes):
    """Drawn lines with a label of their own, by label."""
    return {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}


def containers_of(axes):
    return {c.get_label(): c for c in axes.containers if c.get_label()[0] != "_"}


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("evaluated", [1, 2, 6])
@pytest.mark.parametrize("seeds", [1, 3])
def test_learning_curves(tmp_path, seeds, evaluated):
    from matplotlib.image import imread

    runs = {
        label: [run(6, evaluated, 0.01 * seed) for seed in range(seeds)] for label in ("AT", "AWP")
    }
    learning_curves(runs, tmp_path / "curves.png", "title")
    picture = imread(tmp_path / "curves.png")
    assert picture.shape == (600, 1500, 4)
    for blue_or_orange in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        colour = np.array([*blue_or_orange, 255]) / 255
        assert np.isclose(picture, colour, atol=0.02).all(-1).sum() > 20


def test_learning_curves_of_more_than_can_be_told_apart(tmp_path):
    runs = {str(i): [run(2, 1)] for i in range(5)}
    with pytest.raises(ValueError, match="at most 4 can be told apart in one panel"):
        learning_curves(runs, tmp_path / "curves.png")


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (4, (1, 4)), (5, (2, 3)), (7, (2, 4))])
def test_curve_panels(tmp_path, drawn, count, shape):
    runs = {"AT": [run(6, 2), run(6, 2, 0.04)], "with it": [run(6, 2, 0.1)]}
    panels = {f"panel {i}": runs for i in range(count)}
    curve_panels(panels, tmp_path / "curves.png", "title")
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    assert figure.axes[0].get_gridspec().get_geometry() == shape
    for axes in figure.axes:
        lines = lines_of(axes)
        assert list(lines) == [
            f"{label}, {part} images" for label in runs for part in ("training", "test")
        ]
        test, train = lines["AT, test images"], lines["AT, training images"]
        assert list(test.get_xdata(orig=False)) == [2, 4, 6]
        np.testing.assert_allclose(
            test.get_ydata(orig=False), [52, 53, 54]
        )  # means over seeds, in %
        np.testing.assert_allclose(train.get_ydata(orig=False), [82, 82, 82])
        assert (test.get_linestyle(), train.get_linestyle()) == ("-", "--")
        assert test.get_color() == train.get_color() != lines["with it, test images"].get_color()
    # The lowest panel of each column has the scale.
    lowest = [axes.get_xlabel() for axes in figure.axes]
    assert lowest == [""] * (count - shape[1]) + ["epoch"] * shape[1]
    inside = figure.legends[0].get_window_extent()
    assert inside.x0 >= 0
    assert inside.x1 <= figure.bbox.x1


def test_curve_panels_have_one_legend(tmp_path):
    panels = {"a": {"AT": [run(2, 1)]}, "b": {"TRADES": [run(2, 1)]}}
    with pytest.raises(ValueError, match="every panel must have the same labels"):
        curve_panels(panels, tmp_path / "curves.png")


AT = [ended(0.52, 0.50, 0.80), ended(0.54, 0.50, 0.82)]
SIZES = {
    "AWP": {
        0.01: [ended(0.60, 0.58, 0.70), ended(0.64, 0.60, 0.72)],
        0.0: AT,
        0.001: [ended(0.56, 0.54, 0.74), ended(0.56, 0.54, 0.74)],
    },
    "RWP": {1.0: [ended(0.40, 0.30, 0.35), ended(0.42, 0.30, 0.35)]},
}


def test_perturbation_sizes(tmp_path, drawn):
    perturbation_sizes(SIZES, tmp_path / "sizes.png", "title")
    (figure,) = drawn
    test, both = figure.axes
    assert figure.get_suptitle() == "title"
    for axes in (test, both):
        assert axes.get_xscale() == "log"
        assert r"$\gamma$" in axes.get_xlabel()
        assert "(%)" in axes.get_ylabel()
    assert legend_of(test) == [
        r"horizontal: $\gamma$ = 0",
        "AWP, best",
        "AWP, last",
        "RWP, best",
        "RWP, last",
    ]
    points = containers_of(test)
    best, last = (points[f"AWP, {part}"].lines[0] for part in ("best", "last"))
    assert (best.get_linestyle(), last.get_linestyle()) == ("-", "--")
    np.testing.assert_allclose(
        best.get_xdata(orig=False), [0.001, 0.01], rtol=0.1
    )  # beside one another
    np.testing.assert_allclose(best.get_ydata(orig=False), [56, 62])
    np.testing.assert_allclose(last.get_ydata(orig=False), [54, 59])
    # Sample standard deviations: 0 and that of 60 and 64.
    lengths = [np.ptp(bar[:, 1]) for bar in points["AWP, best"].lines[2][0].get_segments()]
    np.testing.assert_allclose(lengths, [0, 2 * np.sqrt(8)], atol=1e-9)
    training = containers_of(both)["AWP, training images"].lines[0]
    np.testing.assert_allclose(training.get_ydata(orig=False), [74, 71])


def horizontal(axes):
    found = {}
    for line in axes.get_lines():
        if list(line.get_xdata(orig=False)) == [0, 1]:  # in shares of the width
            (height,) = set(line.get_ydata(orig=False))
            found[round(height, 6), line.get_linestyle()] = to_hex(line.get_color())
    return found


def test_gamma_0_is_a_line_across(tmp_path, drawn):
    perturbation_sizes(SIZES, tmp_path / "sizes.png")
    found = horizontal(drawn[0].axes[0])
    blue = "#0072b2"
    assert found == {(53, "-"): blue, (50, "--"): blue}


def test_a_line_across_of_several_has_the_colour_of_none(tmp_path, drawn):
    sizes = {label: {**runs, 0.0: AT} for label, runs in SIZES.items()}
    perturbation_sizes(sizes, tmp_path / "sizes.png")
    assert set(horizontal(drawn[0].axes[0]).values()) == {to_hex("0.4")}


def test_ablations(tmp_path, drawn):
    strategies = {
        "K2": {"1": (SIZES["AWP"][0.01], 26 / 23), "5": (SIZES["AWP"][0.001], 38 / 23)},
        "A": {"1": (SIZES["AWP"][0.01], 26 / 23)},
    }
    ablations(strategies, SIZES, tmp_path / "figure2.png", "title")
    (figure,) = drawn
    bars, best_and_last, gap = figure.axes
    np.testing.assert_allclose([bar.get_height() for bar in bars.patches], [62, 56, 62])
    assert [text.get_text() for text in bars.texts] == ["x 1.13", "x 1.65", "x 1.13"]
    assert [t.get_text() for t in bars.get_xticklabels()] == ["K2 = 1", "K2 = 5", "A = 1"]
    colours = [to_hex(bar.get_facecolor()) for bar in bars.patches]
    assert colours[0] == colours[1] != colours[2]
    low, high = bars.get_ylim()
    assert low < 56 < 62 + np.sqrt(8) < high
    assert "not from 0" in bars.get_ylabel()
    assert {"AWP, best", "AWP, last"} < set(legend_of(best_and_last))
    np.testing.assert_allclose(containers_of(gap)["AWP"].lines[0].get_ydata(orig=False), [20, 12])
    assert horizontal(gap) == {(31, "-"): "#0072b2"}
    assert "points" in gap.get_ylabel()


def test_one_seed_has_no_error_bars(tmp_path, drawn):
    one = {label: {g: seeds[:1] for g, seeds in of.items()} for label, of in SIZES.items()}
    perturbation_sizes(one, tmp_path / "sizes.png")
    assert not any(c.has_yerr for c in drawn[0].axes[0].containers)


def test_accuracy_by_radius(tmp_path):
    points = {name: {0.0: 0.9, 0.1: 0.5, 0.2: 0.0} for name in ("FGSM", "PGD-20")}
    accuracy_by_radius(points, tmp_path / "a.png", "title", chance=0.1, marked=0.1)
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="at most 4"):
        accuracy_by_radius({str(i): {0.0: 1.0} for i in range(5)}, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [1, 8])
def test_adversarial_images(tmp_path, channels, n):
    x = np.random.default_rng(0).random((n, channels, 8, 8))
    names = [("cat", "cat", "dog")] * n
    for x_adv in (x, (x + 0.03).clip(0, 1)):
        adversarial_images(x, x_adv, names, tmp_path / "a.png", "title")
        assert (tmp_path / "a.png").stat().st_size > 3000


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
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
