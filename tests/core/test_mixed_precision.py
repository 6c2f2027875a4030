"""Autocast and GradScaler."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from awp_optim import AWP
from tests.core.toolbox import (
    SGD,
    assert_close,
    assert_restored,
    assert_same_bits,
    backward,
    batches,
    ready,
    snapshot,
    train,
)

INF = float("inf")
ADAM = torch.optim.Adam
clips = pytest.mark.parametrize("clip", [None, 0.1])
fused = pytest.mark.parametrize("fused", [False, True])


def grad_scaler(scale=1024.0):
    return torch.amp.GradScaler("cpu", init_scale=scale)


def amp_step(net, opt, scaler, x, y, overflow=(), clip=None):
    """Both steps; ``overflow`` names the passes whose loss is infinite."""
    for i in (1, 2):
        backward(net, x, y, scaler.scale(torch.ones(())) * (INF if i in overflow else 1))
        if i == 1:
            opt.first_step(zero_grad=True)
    if clip is not None:
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


def test_passes_in_bfloat16_give_a_v_in_float32(net):
    found = []
    for enabled in (True, False):
        opt, (x, y), _ = ready(net, gamma=0.05)
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        sizes = {p: 0.05 * p.detach().norm() for p in net.parameters()}
        with opt.perturbed(zero_grad=True):
            found.append(opt.perturbation())
    assert len(found[0]) == 3
    for p, v in found[0].items():
        assert v.dtype == torch.float32
        torch.testing.assert_close(v.norm(), sizes[p], rtol=1e-4, atol=0)
        assert F.cosine_similarity(v.flatten(), found[1][p].flatten(), 0) > 0.99
        assert not torch.equal(v, found[1][p])


def test_the_perturbation_is_seen_inside_one_autocast_region(net):
    """Autocast keeps half-precision copies of the weights, which an ascent must not leave stale."""
    opt, (x, _), _ = ready(net.eval(), gamma=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        plain = net(x).detach()
        opt.first_step()
        perturbed = net(x).detach()
        opt.restore()
        restored = net(x).detach()
    assert torch.equal(plain, restored)
    assert (perturbed - plain).abs().max() > 0.1 * plain.abs().max()


def test_the_loss_scale_cancels_in_v_to_the_last_bit(net):
    found = []
    for scale in (1.0, 2.0**16):
        opt, batch, _ = ready(net.eval())
        opt.zero_grad()
        backward(net, *batch, scale)
        with opt.perturbed(zero_grad=True):
            found.append(list(opt.perturbation().values()))
    assert_same_bits(*found)


@clips
@fused
def test_gradscaler_trains_as_without_it(net, fused, clip):
    other, scaler = copy.deepcopy(net.double()), grad_scaler()
    opt = AWP(net.parameters(), ADAM, gamma=0.02, lr=1e-2, fused=fused)
    plain = AWP(other.parameters(), ADAM, gamma=0.02, lr=1e-2)

    def clipped(*_):
        if clip is not None:
            nn.utils.clip_grad_norm_(other.parameters(), clip)

    plain.register_step_pre_hook(clipped)
    data = batches(4, torch.float64)
    for x, y in data:
        amp_step(net, opt, scaler, x, y, clip=clip)
    train(other, plain, data)
    assert not hasattr(opt, "found_inf")
    assert_close(net, other, rtol=1e-6, atol=1e-9)


@clips
@fused
@pytest.mark.parametrize("overflow", [(2,), (1, 2)])
def test_an_overflow_at_the_perturbed_weights_skips_the_update(net, overflow, fused, clip):
    opt = AWP(net.parameters(), ADAM, gamma=0.02, lr=1e-2, fused=fused)
    data, scaler = batches(3), grad_scaler()
    amp_step(net, opt, scaler, *data[0], clip=clip)
    start, state = snapshot(net.parameters()), copy.deepcopy(opt.state_dict()["state"])
    amp_step(net, opt, scaler, *data[1], overflow, clip)
    assert_restored(opt, start)
    torch.testing.assert_close(opt.state_dict()["state"], state, rtol=0, atol=0)
    assert scaler.get_scale() == 512.0
    amp_step(net, opt, scaler, *data[2], clip=clip)
    assert all(p.isfinite().all() for p in net.parameters())
    assert not torch.equal(net[0].weight, start[0])


@pytest.mark.parametrize("base", [SGD, ADAM])
def test_an_overflow_in_the_very_first_step_makes_no_state(net, base):
    """A fused SGD left to skip by itself would later use a momentum it never wrote."""
    kwargs = {"momentum": 0.9} if base is SGD else {}
    opt = AWP(net.parameters(), base, gamma=0.02, lr=1e-2, fused=True, **kwargs)
    batch, scaler = batches(1)[0], grad_scaler(4.0)
    amp_step(net, opt, scaler, *batch, overflow=(2,))
    assert len(opt.state) == 0
    amp_step(net, opt, scaler, *batch)
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in net.parameters())


def test_gradscaler_without_any_gradient(net):
    opt, _, start = ready(net, direction="random")
    opt.zero_grad()
    scaler = grad_scaler()
    scaler.scale(torch.ones(()))
    opt.first_step()
    scaler.step(opt)
    assert_restored(opt, start)


def test_a_disabled_gradscaler_and_misuse_of_an_enabled_one(net):
    opt = AWP(net.parameters(), SGD, gamma=0.02, lr=1e-2)
    batch = batches(1)[0]
    amp_step(net, opt, torch.amp.GradScaler("cpu", enabled=False), *batch)
    for closure, error in ([], "plain step"), ([lambda: backward(net, *batch)], "GradScaler"):
        scaler = grad_scaler()
        opt.zero_grad()
        scaler.scale(backward(net, *batch))
        with pytest.raises(RuntimeError, match=error):
            scaler.step(opt, *closure)
        assert not hasattr(opt, "found_inf")  # torch leaves it behind on an error
    train(net, opt, [batch])


def test_half_precision_gradients_cannot_be_unscaled_and_the_weights_are_restored():
    param = nn.Parameter(torch.ones(3, 3, dtype=torch.float16))
    opt = AWP([param], SGD, gamma=0.1, lr=0.1)
    scaler = grad_scaler(2.0)
    scaler.scale(param.sum()).backward()
    opt.first_step()
    with pytest.raises(ValueError, match="FP16"):
        scaler.step(opt)
    assert_restored(opt, [torch.ones_like(param)])


@pytest.mark.parametrize("place", ["ascent", "descent"])
@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_of_one_optimizer_leaves_the_others_alone(net, place, unscale):
    """Two AWPs and a plain optimizer under one GradScaler."""
    models = [copy.deepcopy(net) for _ in range(3)]
    opts = [AWP(m.parameters(), SGD, gamma=0.05, lr=0.1) for m in models[:2]]
    opts.append(SGD(models[2].parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    batch = batches(1)[0]

    def backpropagate(i, overflows):
        backward(models[i], *batch, scaler.scale(torch.ones(())) * (INF if overflows else 1))

    for i in range(2):
        backpropagate(i, overflows=i == 0 and place == "ascent")
        opts[i].first_step(zero_grad=True)
    for i in range(3):
        backpropagate(i, overflows=i == 0 and place == "descent")
    for opt in opts:
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
    scaler.update()
    # An overflow in the ascent means no perturbation; only one at w + v skips the update.
    moved = [not torch.equal(m[0].weight, net[0].weight) for m in models]
    assert moved == [place == "ascent", True, True]
    assert not any(opt.is_perturbed for opt in opts[:2])
    assert scaler.get_scale() == (2.0**9 if place == "descent" else 2.0**10)
    assert all(p.isfinite().all() for m in models for p in m.parameters())
