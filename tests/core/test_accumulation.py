"""Gradients accumulated over micro-batches: v of all of them, or of one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from awp_optim import AWP

GAMMA, PARTS = 0.05, 4
SGD = torch.optim.SGD


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5)).double()


def batches(n):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        yield x, torch.randint(5, (8,), generator=generator)


def accumulate(model, x, y):
    """The mean of the losses of all micro-batches, one at a time."""
    for micro_x, micro_y in zip(x.chunk(PARTS), y.chunk(PARTS)):
        (F.cross_entropy(model(micro_x), micro_y) / PARTS).backward()


def assert_equal_weights(one, other):
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert (p - q).norm() <= 1e-12 * q.norm()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("closure", [False, True])
def test_v_of_all_micro_batches_is_that_of_the_whole_batch(model, steps, norm, closure):
    whole = copy.deepcopy(model)
    settings = {"gamma": GAMMA, "ascent_steps": steps, "norm": norm, "lr": 0.1, "momentum": 0.9}
    opts = [AWP(m.parameters(), SGD, **settings) for m in (model, whole)]
    for x, y in batches(20):
        for _ in range(steps):
            opts[1].zero_grad()
            F.cross_entropy(whole(x), y).backward()
            opts[1].first_step()
        opts[1].zero_grad()
        F.cross_entropy(whole(x), y).backward()
        opts[1].second_step()
        if closure:

            def accumulated(x=x, y=y):
                opts[0].zero_grad()
                accumulate(model, x, y)

            opts[0].step(accumulated)
            continue
        for _ in range(steps):
            opts[0].zero_grad()
            accumulate(model, x, y)
            opts[0].first_step()
        opts[0].zero_grad()
        accumulate(model, x, y)
        opts[0].second_step()
    assert_equal_weights(model, whole)


def test_v_of_one_micro_batch_and_the_update_of_all(model):
    by_hand = copy.deepcopy(model)
    base = SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    opt = AWP(model.parameters(), SGD, gamma=GAMMA, lr=0.1, momentum=0.9)
    for x, y in batches(20):
        there = copy.deepcopy(by_hand)
        loss = F.cross_entropy(there(x[: 8 // PARTS]), y[: 8 // PARTS])
        for p, g in zip(there.parameters(), torch.autograd.grad(loss, list(there.parameters()))):
            if p.ndim > 1:
                p.data += GAMMA * p.data.norm() * g / g.norm()
        loss = F.cross_entropy(there(x), y)
        grads = torch.autograd.grad(loss, list(there.parameters()))
        for p, g in zip(by_hand.parameters(), grads):
            p.grad = g
        base.step()

        F.cross_entropy(model(x[: 8 // PARTS]), y[: 8 // PARTS]).backward()
        opt.first_step(zero_grad=True)
        accumulate(model, x, y)
        opt.second_step(zero_grad=True)
    assert_equal_weights(model, by_hand)


def test_the_sum_over_micro_batches_gives_the_same_v_as_their_mean(model):
    (x, y), *_ = batches(1)
    opt = AWP(model.parameters(), SGD, gamma=GAMMA, lr=0.1)
    found = []
    for factor in (1, PARTS):
        for micro_x, micro_y in zip(x.chunk(PARTS), y.chunk(PARTS)):
            (F.cross_entropy(model(micro_x), micro_y) / factor).backward()
        with opt.perturbed(zero_grad=True):
            found.append(opt.perturbation())
    for p, v in found[0].items():
        torch.testing.assert_close(v, found[1][p], rtol=1e-12, atol=0)


def test_gradients_left_from_the_ascent_are_in_the_update(model):
    """What goes wrong without zero_grad in between: as with any optimizer, gradients add up."""
    (x, y), *_ = batches(1)
    left, zeroed = model, copy.deepcopy(model)
    for m, zero_grad in ((left, False), (zeroed, True)):
        opt = AWP(m.parameters(), SGD, gamma=GAMMA, lr=0.1)
        accumulate(m, x, y)
        opt.first_step(zero_grad=zero_grad)
        accumulate(m, x, y)
        opt.second_step()
    assert not torch.allclose(left[0].weight, zeroed[0].weight, rtol=1e-3)
