"""Gradients accumulated over micro-batches: v from all of them, or from one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from awp_optim import AWP
from tests.core.toolbox import SGD, assert_close, backward, flat_batches, mlp, train

GAMMA, PARTS = 0.05, 4


def accumulate(model, x, y):
    """The mean of the losses of all micro-batches, one at a time."""
    for micro_batch in zip(x.chunk(PARTS), y.chunk(PARTS)):
        backward(model, *micro_batch, 1 / PARTS)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("closure", [False, True])
def test_v_from_all_micro_batches_is_that_of_the_large_batch(steps, norm, closure):
    model, other, data = mlp(), mlp(), flat_batches(20)
    settings = {"gamma": GAMMA, "ascent_steps": steps, "norm": norm, "lr": 0.1, "momentum": 0.9}
    opt = AWP(model.parameters(), SGD, **settings)
    train(other, AWP(other.parameters(), SGD, **settings), data)
    for x, y in data:

        def passes(x=x, y=y):
            opt.zero_grad()
            accumulate(model, x, y)

        if closure:
            opt.step(passes)
            continue
        for _ in range(steps):
            passes()
            opt.first_step()
        passes()
        opt.second_step()
    assert_close(model, other, rtol=1e-10, atol=1e-12)


def test_v_from_one_micro_batch_and_the_update_from_all():
    model, by_hand = mlp(), mlp()
    base = SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    opt = AWP(model.parameters(), SGD, gamma=GAMMA, lr=0.1, momentum=0.9)
    for x, y in flat_batches(20):
        micro_batch = x[: 8 // PARTS], y[: 8 // PARTS]
        perturbed = copy.deepcopy(by_hand)
        perturbed.zero_grad()
        backward(perturbed, *micro_batch)
        for p in perturbed.parameters():
            if p.ndim > 1:
                p.data += GAMMA * p.data.norm() * p.grad / p.grad.norm()
        perturbed.zero_grad()
        backward(perturbed, x, y)
        for p, q in zip(by_hand.parameters(), perturbed.parameters()):
            p.grad = q.grad
        base.step()

        backward(model, *micro_batch)
        opt.first_step(zero_grad=True)
        accumulate(model, x, y)
        opt.second_step(zero_grad=True)
    assert_close(model, by_hand, rtol=1e-10, atol=1e-12)


def test_gradients_left_from_the_ascent_are_part_of_the_update():
    """What goes wrong without zero_grad in between: as with any optimizer, gradients add up."""
    model, ((x, y),) = mlp(), flat_batches(1)
    opt, w = AWP(model.parameters(), SGD, gamma=GAMMA, lr=1.0), model[0].weight
    backward(model, x, y)
    before, at_w = w.detach().clone(), w.grad.clone()
    opt.first_step()
    (at_w_plus_v,) = torch.autograd.grad(F.cross_entropy(model(x), y), w)
    backward(model, x, y)
    opt.second_step()
    torch.testing.assert_close(w.detach(), before - at_w - at_w_plus_v)
