"""A whole training step under torch.compile is the same training step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from awp_optim import AWP


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5)).double()


def batches(n):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        yield x, torch.randint(5, (8,), generator=generator)


def two_steps(model, opt, x, y):
    for _ in range(opt.ascent_steps):
        F.cross_entropy(model(x), y).backward()
        opt.first_step(zero_grad=True)
    F.cross_entropy(model(x), y).backward()
    opt.second_step(zero_grad=True)


def one_step(model, opt, x, y):
    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return opt.step(closure)


def in_a_with(model, opt, x, y):
    F.cross_entropy(model(x), y).backward()
    with opt.perturbed(zero_grad=True):
        F.cross_entropy(model(x), y).backward()
        opt.second_step(zero_grad=True)


@pytest.mark.parametrize(
    ("function", "ascents", "backend", "compiled_model"),
    [
        (two_steps, 2, "eager", True),
        (two_steps, 1, "aot_eager", False),
        (one_step, 2, "eager", False),
        (in_a_with, 1, "aot_eager", True),
    ],
)
def test_a_compiled_function_with_both_steps(function, ascents, backend, compiled_model):
    eager, model = network(), network()
    settings = {"gamma": 0.05, "lr": 0.1, "momentum": 0.9, "ascent_steps": ascents}
    opts = [AWP(m.parameters(), torch.optim.SGD, **settings) for m in (eager, model)]
    call = torch.compile(model, backend=backend) if compiled_model else model
    compiled = torch.compile(function, backend=backend)
    start = copy.deepcopy(model.state_dict())
    for x, y in batches(3):
        function(eager, opts[0], x, y)
        compiled(call, opts[1], x, y)
        assert not opts[1].is_perturbed
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert not torch.equal(p, start[name])


def test_an_error_in_a_compiled_step_leaves_the_weights_unperturbed():
    model = network()
    opt = AWP(model.parameters(), torch.optim.SGD, gamma=0.05, lr=0.1)
    start = copy.deepcopy(model.state_dict())
    (x, y), *_ = batches(1)
    calls = 0

    def failing():
        nonlocal calls
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        calls += 1
        if calls == 2:
            raise OSError("the disk is full")
        return loss

    with pytest.raises(OSError, match="the disk is full"):
        torch.compile(opt.step, backend="eager")(failing)
    assert not opt.is_perturbed
    assert all(torch.equal(p, start[name]) for name, p in model.state_dict().items())


def test_functional_call_sees_the_perturbation_through_the_parameters_alone():
    """Tensors handed in are used as they are: with copies of w, v has to be added to them."""
    model = network()
    opt = AWP(model.parameters(), torch.optim.SGD, gamma=0.05, lr=0.1)
    copies = {n: p.detach().clone() for n, p in model.named_parameters()}
    (x, y), *_ = batches(1)
    F.cross_entropy(model(x), y).backward()
    unperturbed = model(x)
    with opt.perturbed():
        v = opt.perturbation()
        perturbed = model(x)
        added = {n: copies[n] + v.get(p, 0) for n, p in model.named_parameters()}
        torch.testing.assert_close(
            functional_call(model, dict(model.named_parameters()), x), perturbed
        )
        torch.testing.assert_close(functional_call(model, copies, x), unperturbed)
        torch.testing.assert_close(functional_call(model, added, x), perturbed)
    assert not torch.allclose(unperturbed, perturbed)
