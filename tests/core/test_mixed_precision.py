"""Autocast, and one GradScaler for several losses and several optimizers.

The single loss and the single optimizer, with and without clipping, are in test_optimizer.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from awp_optim import AWP

GAMMA = 0.05
SGD = torch.optim.SGD


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))


def batches(n):
    """Five clusters to tell apart."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(5, 16, generator=generator)
    for _ in range(n):
        y = torch.randint(5, (32,), generator=generator)
        yield weights[y] + 0.5 * torch.randn(32, 16, generator=generator), y


def two_steps(model, opt, x, y, dtype):
    for step in (opt.first_step, opt.second_step):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        step(zero_grad=True)
    return loss.item()


def test_passes_in_bfloat16_give_a_v_in_float32():
    model = network()
    opt = AWP(model.parameters(), SGD, gamma=GAMMA, lr=0.1)
    (x, y), *_ = batches(1)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            F.cross_entropy(model(x), y).backward()
        size = {p: GAMMA * p.detach().norm() for p in model.parameters()}
        with opt.perturbed(zero_grad=True):
            found.append(opt.perturbation())
    assert len(found[0]) == 2
    for p, v in found[0].items():
        assert v.dtype == torch.float32
        torch.testing.assert_close(v.norm(), size[p])
        assert F.cosine_similarity(v.flatten(), found[1][p].flatten(), 0) > 0.999
        assert not torch.equal(v, found[1][p])


def test_training_in_bfloat16_comes_to_the_same():
    losses = []
    for dtype in (torch.bfloat16, None):
        model = network()
        opt = AWP(model.parameters(), SGD, gamma=GAMMA, lr=0.1, momentum=0.9)
        losses.append([two_steps(model, opt, x, y, dtype) for x, y in batches(40)])
        assert all(p.dtype == torch.float32 for p in model.parameters())
    for loss in losses:
        assert sum(loss[-5:]) < 0.1 * sum(loss[:5])
    assert losses[0] != losses[1]
    assert sum(losses[0][:10]) == pytest.approx(sum(losses[1][:10]), rel=0.02)


def test_the_loss_scale_cancels_in_v_to_the_last_bit():
    model = network()
    opt = AWP(model.parameters(), SGD, gamma=GAMMA, lr=0.1)
    (x, y), *_ = batches(1)
    found = []
    for scale in (1.0, 2.0**16):
        (F.cross_entropy(model(x), y) * scale).backward()
        with opt.perturbed(zero_grad=True):
            found.append(opt.perturbation())
    assert all(torch.equal(v, found[1][p]) for p, v in found[0].items())


@pytest.mark.parametrize("clip", [None, 0.1])
def test_several_losses_add_up_under_one_scale(clip):
    scaled, plain = network(), network()
    opts = [AWP(m.parameters(), SGD, gamma=GAMMA, lr=0.1) for m in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x, y in batches(10):
        for last in (False, True):
            scaler.scale(F.cross_entropy(scaled(x[:16]), y[:16])).backward()
            scaler.scale(scaled(x[16:]).square().mean()).backward()
            loss = F.cross_entropy(plain(x[:16]), y[:16]) + plain(x[16:]).square().mean()
            loss.backward()
            if not last:
                for opt in opts:
                    opt.first_step(zero_grad=True)
        if clip is not None:
            scaler.unscale_(opts[0])
            for model in (scaled, plain):
                nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(opts[0])
        scaler.update()
        opts[1].second_step()
        for opt in opts:
            opt.zero_grad()
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("place", ["ascent", "descent"])
@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_of_one_optimizer_is_none_of_the_others(place, unscale):
    """Two AWPs and a plain optimizer under one GradScaler."""
    models = [network(seed) for seed in range(3)]
    opts = [AWP(m.parameters(), SGD, gamma=GAMMA, lr=0.1) for m in models[:2]]
    opts.append(SGD(models[2].parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    (x, y), *_ = batches(1)
    weights = [copy.deepcopy(m.state_dict()) for m in models]

    def backward(i, factor=1.0):
        scaler.scale(F.cross_entropy(models[i](x), y) * factor).backward()

    for i in range(2):
        backward(i, float("inf") if i == 0 and place == "ascent" else 1.0)
        opts[i].first_step(zero_grad=True)
    for i in range(3):
        backward(i, float("inf") if i == 0 and place == "descent" else 1.0)
    for opt in opts:
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
    scaler.update()

    moved = [
        any(not torch.equal(p, start[n]) for n, p in m.state_dict().items())
        for m, start in zip(models, weights)
    ]
    # An overflow in the ascent means no perturbation; only one at w + v skips the update.
    assert moved == [place == "ascent", True, True]
    assert not any(opt.is_perturbed for opt in opts[:2])
    assert scaler.get_scale() == (2.0**9 if place == "descent" else 2.0**10)
    assert all(p.isfinite().all() for m in models for p in m.parameters())
