"""A training step under torch.compile is the same training step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call

from awp_optim import AWP
from tests.core.toolbox import SGD, assert_close, backward, flat_batches, mlp, train


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def two_steps(model, opt, x, y):
    train(model, opt, [(x, y)])


def one_step(model, opt, x, y):
    def closure():
        opt.zero_grad()
        return backward(model, x, y)

    return opt.step(closure)


def in_a_with(model, opt, x, y):
    backward(model, x, y)
    with opt.perturbed(zero_grad=True):
        backward(model, x, y)
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
    eager, model = mlp(), mlp()
    settings = {"gamma": 0.05, "lr": 0.1, "momentum": 0.9, "ascent_steps": ascents}
    opts = [AWP(m.parameters(), SGD, **settings) for m in (eager, model)]
    call = torch.compile(model, backend=backend) if compiled_model else model
    compiled = torch.compile(function, backend=backend)
    start = copy.deepcopy(model)
    for x, y in flat_batches(3):
        function(eager, opts[0], x, y)
        compiled(call, opts[1], x, y)
        assert not opts[1].is_perturbed
    assert_close(model, eager, rtol=1e-12, atol=1e-12)
    assert not torch.equal(model[0].weight, start[0].weight)


def test_functional_call_sees_the_perturbation_through_the_parameters_alone():
    """Tensors passed to it are not perturbed: with copies of w, v has to be added to them."""
    model, ((x, y),) = mlp(), flat_batches(1)
    opt = AWP(model.parameters(), SGD, gamma=0.05, lr=0.1)
    copies = {n: p.detach().clone() for n, p in model.named_parameters()}
    backward(model, x, y)
    unperturbed = model(x)
    with opt.perturbed():
        v = opt.perturbation()
        perturbed = model(x)
        added = {n: copies[n] + v.get(p, 0) for n, p in model.named_parameters()}
        for tensors, output in [
            (dict(model.named_parameters()), perturbed),
            (copies, unperturbed),
            (added, perturbed),
        ]:
            torch.testing.assert_close(functional_call(model, tensors, x), output)
    assert not torch.allclose(unperturbed, perturbed)
