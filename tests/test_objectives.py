"""Objectives against their formulas in float64."""

import numpy as np
import torch

from awp_optim.objectives import AT, at


def test_at_is_the_mean_cross_entropy():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(7, 4)) * 5, rng.integers(4, size=7)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -np.mean(log_p[np.arange(7), y])
    ours = at(torch.tensor(logits), torch.tensor(y))
    np.testing.assert_allclose(ours.item(), expected, rtol=1e-12)
    assert AT()(torch.tensor(logits), None, torch.tensor(y)) == ours
    assert not AT().needs_natural
    assert AT() == AT()
