"""The plain loop that landscapes are timed against computes the same curve."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from awp_optim.attacks import PGD
from awp_optim.landscape import filter_normalized_direction, loss_curve
from benchmarks.landscape import plain_curve


def test_it_is_the_same_curve():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).double()
    x, y = torch.rand(10, 3, 6, 6, dtype=torch.float64), torch.randint(5, (10,))
    direction = filter_normalized_direction(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attack, alphas = PGD(0.1, 0.03, 5, random_start=False), [-0.5, 0.0, 0.5]
    plain = plain_curve(model, TensorDataset(x, y), attack, alphas, direction, batch_size=4)
    ours = loss_curve(model, (x, y), attack, alphas, direction, batch_size=4, progress=False)
    assert np.allclose(plain, ours.adv_loss, rtol=1e-10)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
