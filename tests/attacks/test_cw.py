"""CW against margins known in closed form, and against the PGD that it is."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from awp_optim.attacks import CW, PGD
from awp_optim.attacks.losses import cw

from .conftest import seeded

norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def test_the_default_step_depends_on_the_radius_of_the_attack():
    assert CW().loss == "cw"
    assert "loss" not in repr(CW())
    assert dataclasses.replace(CW(), eps=0.1) == CW(eps=0.1)
    with pytest.raises(TypeError, match="loss"):
        CW(loss="ce")


@pytest.mark.parametrize(("norm", "eps", "step"), [("linf", 8 / 255, 2 / 255), ("l2", 0.5, 1 / 16)])
@pytest.mark.parametrize(("random_start", "restarts"), [(True, 1), (True, 3), (False, 1)])
def test_is_pgd_of_the_margin(norm, eps, step, random_start, restarts, cnn, batch):
    expected = seeded(3, PGD(eps, step, 9, norm, "cw", random_start, restarts), cnn, *batch)
    ours = seeded(
        3, CW(eps, steps=9, norm=norm, random_start=random_start, restarts=restarts), cnn, *batch
    )
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, batch[0])


@norms
def test_reaches_the_margin_of_a_linear_model(norm):
    # The worst margin is max_k of (margin_k(x) + eps * |w_k - w_y|*), with the dual norm; two
    # classes have one rival, so that there is one hill.
    w = torch.randn(2, 12, dtype=torch.float64)
    x, y = torch.rand(6, 12, dtype=torch.float64) * 0.2 + 0.4, torch.tensor([0, 1, 0, 1, 1, 0])
    eps = {"linf": 0.05, "l2": 0.2}[norm]
    slope = (w[1 - y] - w[y]).norm(p=1 if norm == "linf" else 2, dim=1)
    x_adv = CW(eps, norm=norm)(lambda x: x @ w.T, x, y)
    reached = cw(x_adv @ w.T, y)
    torch.testing.assert_close(reached, cw(x @ w.T, y) + eps * slope, atol=1e-9, rtol=0)
