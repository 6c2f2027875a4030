"""AWP under GradScaler."""

import copy

import pytest
import torch
from torch import nn

from awp_optim import AWP
from tests.core.toolbox import (
    SGD,
    assert_same_bits,
    backward,
    batches,
    snapshot,
    train,
)


def amp_step(net, opt, scaler, x, y, overflow=(), clip=None):
    backward(net, x, y, scaler.scale(torch.ones(())) * (float("inf") if 1 in overflow else 1))
    opt.first_step(zero_grad=True)
    backward(net, x, y, scaler.scale(torch.ones(())) * (float("inf") if 2 in overflow else 1))
    if clip is not None:
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_gradscaler_trains_as_without_it(net, fused, clip):
    net.double()
    other = copy.deepcopy(net)
    opt = AWP(net.parameters(), torch.optim.Adam, gamma=0.02, lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = AWP(other.parameters(), torch.optim.Adam, gamma=0.02, lr=1e-2)
    for x, y in batches(4, torch.float64):
        amp_step(net, opt, scaler, x, y, clip=clip)
        backward(other, x, y)
        plain.first_step(zero_grad=True)
        backward(other, x, y)
        if clip is not None:
            nn.utils.clip_grad_norm_(other.parameters(), clip)
        plain.second_step(zero_grad=True)
        opt.zero_grad()
    assert not hasattr(opt, "found_inf")
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflow", [(2,), (1, 2)])
def test_an_overflow_at_the_perturbed_weights_skips_the_update(net, overflow, fused, clip):
    opt = AWP(net.parameters(), torch.optim.Adam, gamma=0.02, lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = batches(3)
    amp_step(net, opt, scaler, *data[0], clip=clip)
    opt.zero_grad()
    start = snapshot(net.parameters())
    state = copy.deepcopy(opt.state_dict())
    amp_step(net, opt, scaler, *data[1], overflow, clip)
    opt.zero_grad()
    assert not opt.is_perturbed
    assert_same_bits(net.parameters(), start)
    after = opt.state_dict()["state"]
    for key, entries in state["state"].items():
        for name, value in entries.items():
            torch.testing.assert_close(after[key][name], value, rtol=0, atol=0)
    assert scaler.get_scale() == 512.0
    amp_step(net, opt, scaler, *data[2], clip=clip)  # and training goes on
    assert all(p.isfinite().all() for p in net.parameters())
    assert not torch.equal(net[0].weight, start[0])


@pytest.mark.parametrize("base", [SGD, torch.optim.Adam])
def test_an_overflow_in_the_very_first_step_makes_no_state(net, base):
    """A fused SGD left to skip by itself would go on with a momentum it never wrote."""
    kwargs = {"momentum": 0.9} if base is SGD else {}
    opt = AWP(net.parameters(), base, gamma=0.02, lr=1e-2, fused=True, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    (x, y), *_ = batches(1)
    amp_step(net, opt, scaler, x, y, overflow=(2,))
    assert len(opt.state) == 0
    opt.zero_grad()
    amp_step(net, opt, scaler, x, y)
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in net.parameters())


def test_gradscaler_without_any_gradient(net):
    opt = AWP(net.parameters(), SGD, gamma=0.02, direction="random", lr=1e-2)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    start = snapshot(net.parameters())
    opt.first_step()
    scaler.step(opt)
    assert_same_bits(net.parameters(), start)


def test_a_disabled_gradscaler_and_misuse_of_an_enabled_one(net):
    opt = AWP(net.parameters(), SGD, gamma=0.02, lr=1e-2)
    (x, y), *_ = batches(1)
    amp_step(net, opt, torch.amp.GradScaler("cpu", enabled=False), x, y)
    scaler = torch.amp.GradScaler("cpu")
    opt.zero_grad()
    scaler.scale(backward(net, x, y))
    with pytest.raises(RuntimeError, match="plain step without perturbation"):
        scaler.step(opt)
    assert not hasattr(opt, "found_inf")  # torch leaves it behind on an error
    scaler = torch.amp.GradScaler("cpu")
    opt.zero_grad()
    scaler.scale(backward(net, x, y))
    with pytest.raises(RuntimeError, match="cannot be used with a closure"):
        scaler.step(opt, lambda: backward(net, x, y))
    train(net, opt, [(x, y)])


def test_half_precision_gradients_cannot_be_unscaled_and_the_weights_are_restored():
    param = nn.Parameter(torch.ones(3, 3, dtype=torch.float16))
    opt = AWP([param], SGD, gamma=0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(param.sum()).backward()
    opt.first_step()
    with pytest.raises(ValueError, match="unscale FP16"):
        scaler.step(opt)
    assert torch.equal(param, torch.ones_like(param))
