"""The learning-rate schedules against their formulas and torch's schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from awp_optim.lab.schedules import SCHEDULES


def test_schedules_are_the_papers():
    rate = {name: [0.1 * f(t / 200) for t in range(200)] for name, f in SCHEDULES.items()}
    assert rate["piecewise"][99] == 0.1
    assert rate["piecewise"][100] == pytest.approx(0.01)
    assert rate["piecewise"][149:151] == pytest.approx([0.01, 0.001])
    for t in (0, 50, 120, 199):
        assert rate["cosine"][t] == pytest.approx(0.05 * (math.cos(math.pi * t / 200) + 1))
    assert rate["cyclic"][0] == 0
    assert max(rate["cyclic"]) == rate["cyclic"][80] == pytest.approx(0.1)
    assert [rate["cyclic"][t] for t in (40, 140)] == pytest.approx([0.05, 0.05])
    assert set(rate["constant"]) == {0.1}


def one_cycle_of_torch(**settings):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = OneCycleLR(optimizer, max_lr=1.0, cycle_momentum=False, **settings)
    for _ in range(settings["total_steps"]):
        yield scheduler.get_last_lr()[0]
        optimizer.step()
        if scheduler.last_epoch + 1 < settings["total_steps"]:
            scheduler.step()


@pytest.mark.parametrize("steps", [40, 97, 4000])
def test_one_cycle_is_torchs(steps):
    """torch's first part has a step less than ``pct_start`` says, and its last rate is a step's."""
    theirs = one_cycle_of_torch(total_steps=steps + 1, pct_start=(0.025 * steps + 1) / (steps + 1))
    ours = [SCHEDULES["one-cycle"](step / steps) for step in range(steps + 1)]
    assert ours == pytest.approx(list(theirs), rel=1e-9)


@pytest.mark.parametrize("epochs", [120, 400, 2400])
def test_one_cycle_passes_through_the_rate_of_every_epoch_of_the_authors(epochs):
    factor = SCHEDULES["one-cycle"]
    theirs = list(one_cycle_of_torch(total_steps=epochs, pct_start=0.025))
    assert max(theirs) == factor(0.025) == 1
    for epoch, rate in enumerate(theirs):
        begin, end = factor(epoch / epochs), factor((epoch + 1) / epochs)
        assert min(begin, end) - 1e-12 <= rate <= max(begin, end) + 1e-12
        if epoch >= 0.025 * epochs:
            assert rate == pytest.approx(end, rel=1e-9)
