"""The pictures are drawn, from one seed or several, from one evaluation or many."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from awp_optim.lab.plots import learning_curves


def run(epochs, evaluated, offset=0.0):
    rows = [{"epoch": float(e), "lr": 0.1} for e in range(epochs)]
    for row in rows[evaluated - 1 :: evaluated]:
        row |= {"train_robust_acc": 0.8 + offset, "test_robust_acc": 0.5 + offset}
    return rows


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
