"""What must hold on every device; on a GPU as soon as there is one (marked gpu).

The meta device stands in for an accelerator where there is none: it computes nothing, so that
reading a value on the host is an error there.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from awp_optim import AWP, AdversarialStep
from awp_optim.attacks import FGSM, PGD
from tests.toolbox import batches, network

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = pytest.param("cuda", marks=NEEDS_GPU)
SGD = torch.optim.SGD


def float_network_and_batch(device):
    ((x, y),) = batches(1)
    return network(dtype=torch.float32).to(device), (x.float().to(device), y.to(device))


strict_devices = pytest.mark.parametrize("device", ["meta", CUDA])


@contextmanager
def no_synchronization(device):
    """Inside, a host synchronization is an error; on the meta device it always is."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@strict_devices
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("direction", ["gradient", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_steps_read_nothing_back(device, foreach, norm, direction, dtype):
    params = [nn.Parameter(torch.empty(s, device=device, dtype=dtype)) for s in [(3, 4), (5,)]]
    settings = {"norm": norm, "direction": direction, "foreach": foreach}
    opt = AWP(params, SGD, ascent_steps=2, lr=0.1, momentum=0.9, **settings)
    for p in params:
        p.grad = torch.empty_like(p)
    with no_synchronization(device):
        for _ in range(2):
            opt.first_step()
            opt.first_step()
            opt.second_step()
        with opt.perturbed():
            pass


@strict_devices
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "kl", "cw", "dlr"])
def test_attacks_read_nothing_back(device, norm, loss):
    model, (x, y) = float_network_and_batch(device)
    with no_synchronization(device):
        PGD(norm=norm, loss=loss, steps=2, restarts=2)(model, x, y)
        if loss != "kl":
            FGSM(norm=norm, loss=loss)(model, x, y)


@strict_devices
@pytest.mark.parametrize("kwargs", [None, {}, {"ascent": "attack"}])
@pytest.mark.parametrize("cuda_graph", [False, "auto"])
def test_a_step_reads_nothing_back(device, kwargs, cuda_graph):
    model, (x, y) = float_network_and_batch(device)
    make = SGD if kwargs is None else lambda ps, **k: AWP(ps, SGD, **k)
    opt = make(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"clip_grad_norm": 1.0, "cuda_graph": cuda_graph, **(kwargs or {})}
    step = AdversarialStep(model, opt, PGD(steps=2), **settings)
    with no_synchronization(device):
        for _ in range(8):  # several of them replays
            step(x, y)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_implementations_agree_and_restore_the_weights(device, dtype):
    torch.manual_seed(0)
    weights = [torch.randn(s).to(device, dtype) for s in [(30, 40), (2, 3, 3, 3)]]
    grads = [[torch.randn(w.shape).to(device, dtype) for w in weights] for _ in range(3)]
    grads[1][0][0, 0] = float("nan")
    results = []
    for foreach in (True, False):
        params = [nn.Parameter(w.clone()) for w in weights]
        opt = AWP(params, SGD, gamma=0.1, ascent_steps=2, foreach=foreach, lr=0.1)
        for gs in grads:
            for p, g in zip(params, gs):
                p.grad = g.clone()
            opt.first_step()
        results.append([p.detach().clone() for p in params])
        opt.restore()
        assert all(torch.equal(p, w) for p, w in zip(params, weights))
    for a, b, w in zip(*results, weights):
        assert a.isfinite().all()
        assert not torch.equal(a, w)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("overflow", [(), (1,), (2,), (1, 2)])
def test_gradscaler_with_half_precision_autocast(device, overflow):
    model, (x, y) = float_network_and_batch(device)
    opt = AWP(model.parameters(), SGD, gamma=0.02, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    before = copy.deepcopy(model.state_dict())

    def backward(number):
        with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if number in overflow else 1.0)).backward()

    backward(1)
    opt.first_step(zero_grad=True)
    backward(2)
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(opt)
    scaler.update()
    assert not opt.is_perturbed
    same = [torch.equal(p, before[n]) for n, p in model.named_parameters()]
    is_skipped = 2 in overflow  # an overflow in the ascent gives v = 0 and skips nothing
    assert all(same) if is_skipped else not any(same)
    assert len(opt.state) == (0 if is_skipped else 5)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_checkpoint_moves_between_devices(device):
    data = batches(1)[0]  # on a GPU, float32 convolutions may compute in TF32
    model = network()
    lr = 0.125  # exact in float32, to which a step on a GPU rounds it
    opt = AWP(model.parameters(), SGD, gamma=0.02, lr=lr, momentum=0.9)
    step = AdversarialStep(model, opt, PGD(steps=2, random_start=False))
    for _ in range(3):
        step(*data)
    other = network(device)
    other.load_state_dict(model.state_dict())
    twin = AWP(other.parameters(), SGD, gamma=0.5, lr=0.9, momentum=0.1)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert {s["momentum_buffer"].device.type for s in twin.state.values()} == {device}
    twin_step = AdversarialStep(other, twin, PGD(steps=2, random_start=False))
    for _ in range(2):
        step(*data)
        twin_step(*(t.to(device) for t in data))
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", [CUDA])
def test_several_devices_in_one_optimizer(device):
    params = [nn.Parameter(torch.randn(4, 4, device=d)) for d in ("cpu", device)]
    weights = [p.detach().clone() for p in params]
    opt = AWP(params, SGD, gamma=0.1, lr=0.1)
    for p in params:
        p.grad = torch.randn_like(p)
    opt.first_step()
    for p, w in zip(params, weights):
        torch.testing.assert_close((p.detach() - w).norm(), 0.1 * w.norm())
    opt.restore()
    assert all(torch.equal(p, w) for p, w in zip(params, weights))
