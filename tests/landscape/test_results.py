"""The scalars of a curve on lines and parabolas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from awp_optim.landscape import LossCurve


def curve(alphas, losses, center, errors=0.0) -> LossCurve:
    losses = np.atleast_2d(np.array(losses, dtype=float))
    mean, errors = losses.mean(0), np.full_like(losses, errors)
    return LossCurve(
        np.array(alphas, dtype=float), mean, mean, losses, losses, errors, errors, errors,
        center, center, 10,
    )  # fmt: skip


class TestSharpness:
    def test_of_a_parabola(self):
        alphas = np.linspace(-1, 1, 21)
        s = curve(alphas, [2 + alphas**2, 2 + 3 * alphas**2], 2.0, errors=0.5).sharpness(0.5)
        assert (s.mean, s.worst) == (pytest.approx(0.5), pytest.approx(0.75))
        assert (s.relative, s.stderr) == (pytest.approx(0.5), pytest.approx(0.5))

    def test_falling_and_rising(self):
        c = curve([-1, 0, 1], [[1.0, 2.0, 5.0]], 2.0)
        s, half = c.sharpness(1.0), c.sharpness(0.5)  # between points, linearly
        assert (s.mean, s.worst, s.relative) == (1.0, 3.0, 2.0)
        assert (half.mean, half.worst, half.relative) == (0.5, 1.5, 1.0)

    def test_the_loss_at_the_weights_is_a_point_of_the_curve(self):
        s = curve([1, -1], [[4.0, 2.0]], 1.0, errors=0.5).sharpness(0.5)
        assert (s.mean, s.worst, s.stderr) == (1.0, 1.5, 0.25)
        assert curve([0.1, 1], [[2.0, 3.0]], 1.0).sharpness(0.05).mean == pytest.approx(0.5)

    def test_one_side(self):
        c = curve([0.0, 0.01, 0.02], [[1.0, 2.0, 4.0]], 1.0)
        assert c.sharpness(0.015).mean == pytest.approx(2.0)
        with pytest.raises(ValueError, match="neither"):
            c.sharpness(0.03)
        with pytest.raises(ValueError, match="above 0"):
            c.sharpness(0.0)


class TestFlatWidth:
    def test_of_a_parabola(self):
        alphas = np.linspace(-1, 1, 201)
        c = curve(alphas, [2 + alphas**2], 2.0)
        assert c.flat_width() == pytest.approx(2 * math.sqrt(0.2), rel=1e-3)
        assert c.flat_width(0.02) == pytest.approx(0.4, rel=1e-3)
        assert c.flat_width(0.6) == math.inf

    @pytest.mark.parametrize(
        ("alphas", "losses", "width"),
        [
            ([1.0, -2.0, 0.5], [3.0, 4.0, 1.05], 0.5 + 0.5 * (0.05 / 1.95) + 2 * 0.1 / 3),
            ([0, 1, 2, 3], [1.0, 1.2, 1.0, 2.0], 0.5),  # the first rise
            ([0, 1, 2], [1.0, 1.0, math.nan], 1.0),
            ([0, 1, 2], [1.0, 1.0, math.inf], 1.0),
        ],
    )
    def test_in_any_order_until_the_first_rise(self, alphas, losses, width):
        assert curve(alphas, [losses], 1.0).flat_width() == pytest.approx(width)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="nonzero alpha"):
            curve([0.0], [[1.0]], 1.0).flat_width()
        with pytest.raises(ValueError, match="above 0"):
            curve([0.0, 1.0], [[1.0, 2.0]], 1.0).flat_width(0)
