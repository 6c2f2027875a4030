"""Settings, parameter groups, and what AWP wraps."""

import copy

import pytest
import torch
from torch import nn

from awp_optim import AWP
from tests.core.toolbox import (
    SGD,
    Net,
    assert_same_bits,
    backward,
    batches,
    snapshot,
    train,
)


def test_groups_keep_their_own_settings(net):
    first, *rest = net.parameters()
    groups = [
        {"params": [first], "gamma": 0.5, "norm": "l1", "lr": 1.0},
        {"params": rest, "min_ndim": 1},
    ]
    opt = AWP(groups, SGD, gamma=0.01, lr=0.1)
    assert [g["gamma"] for g in opt.param_groups] == [0.5, 0.01]
    assert [g["norm"] for g in opt.param_groups] == ["l1", "l2"]
    assert [g["min_ndim"] for g in opt.param_groups] == [2, 1]
    assert [g["lr"] for g in opt.param_groups] == [1.0, 0.1]
    assert "gamma" not in groups[1]  # the caller's dictionaries are left alone
    start = snapshot(net.parameters())
    (x, y), *_ = batches(1)
    backward(net, x, y)
    opt.first_step()
    for i, (p, c) in enumerate(zip(net.parameters(), start, strict=True)):
        v = p.detach() - c
        order, gamma = (1, 0.5) if i == 0 else (2, 0.01)
        expected = gamma * c.norm(order) if p.grad.norm() > 0 else torch.zeros(())
        torch.testing.assert_close(v.norm(order), expected, rtol=1e-3, atol=1e-6)


def test_min_ndim_leaves_biases_and_norms_unperturbed(net):
    (x, y), *_ = batches(1)
    start = snapshot(net.parameters())
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    backward(net, x, y)
    opt.first_step()
    for p, c in zip(net.parameters(), start, strict=True):
        assert torch.equal(p, c) == (p.ndim < 2)


def test_named_parameters_keep_their_names(net):
    opt = AWP(net.named_parameters(), SGD, lr=0.1)
    assert opt.param_groups[0]["param_names"] == [n for n, _ in net.named_parameters()]
    assert opt.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_add_param_group_reaches_the_base_with_both_kinds_of_settings(net):
    first, *rest = net.parameters()
    opt = AWP([first], SGD, gamma=0.1, lr=0.1, momentum=0.9)
    opt.add_param_group({"params": rest, "gamma": 0.3})
    opt.base_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    assert [g["gamma"] for g in opt.param_groups] == [0.1, 0.3, 0.1]
    assert [g["momentum"] for g in opt.base_optimizer.param_groups] == [0.9, 0.9, 0.9]
    with pytest.raises(ValueError, match="gamma must be finite"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "gamma": -1.0})
    assert len(opt.param_groups) == 3
    start = snapshot(rest)
    (x, y), *_ = batches(1)
    backward(Net(), x, y)
    for p in rest:
        p.grad = torch.randn_like(p)
    opt.first_step()
    for p, c in zip(rest, start, strict=True):
        if p.ndim > 1:
            torch.testing.assert_close((p - c).norm(), 0.3 * c.norm())


def test_wrap_takes_an_optimizer_already_built(net):
    data = batches(6)
    other = copy.deepcopy(net)
    whole = AWP(other.parameters(), SGD, gamma=0.02, lr=0.05, momentum=0.9)
    train(other, whole, data)

    sgd = SGD(net.parameters(), lr=0.05, momentum=0.9)
    opt = AWP.wrap(sgd, gamma=0.02)
    train(net, opt, data)
    assert opt.base_optimizer is sgd
    assert opt.param_groups is sgd.param_groups
    assert opt.state is sgd.state
    assert_same_bits(net.parameters(), snapshot(other.parameters()))


def test_wrap_keeps_the_state_there_was(net):
    sgd = SGD(net.parameters(), lr=0.05, momentum=0.9)
    (x, y), *_ = batches(1)
    backward(net, x, y)
    sgd.step()
    buffers = [s["momentum_buffer"] for s in sgd.state.values()]
    assert len(buffers) > 0
    opt = AWP.wrap(sgd, gamma=0.02, norm="l1", ascent_steps=2)
    assert [s["momentum_buffer"] for s in opt.state.values()] == buffers
    assert opt.param_groups[0]["norm"] == "l1"
    assert opt.ascent_steps == 2


@pytest.mark.parametrize("foreach", [True, False])
def test_foreach_is_passed_to_a_base_that_has_it(net, foreach):
    opt = AWP(net.parameters(), SGD, lr=0.1, foreach=foreach)
    assert opt.param_groups[0]["foreach"] is foreach

    class Bare(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        def step(self, closure=None):
            pass

    assert AWP(net.parameters(), Bare, lr=0.1, foreach=foreach).foreach is foreach


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"gamma": -0.1}, ValueError, "gamma must be finite and >= 0"),
        ({"gamma": float("nan")}, ValueError, "gamma must be finite"),
        ({"gamma": float("inf")}, ValueError, "gamma must be finite"),
        ({"gamma": "0.1"}, TypeError, "gamma must be a number"),
        ({"gamma": True}, TypeError, "gamma must be a number"),
        ({"gamma": torch.ones(2)}, ValueError, "0-d"),
        ({"gamma": torch.tensor(-0.1)}, ValueError, "gamma must be finite and >= 0"),
        ({"norm": "linf"}, ValueError, r"norm must be one of \('l1', 'l2'\)"),
        (
            {"direction": "up"},
            ValueError,
            r"direction must be one of",
        ),
        ({"min_ndim": -1}, ValueError, "min_ndim must be an integer"),
        ({"ascent_steps": 0}, ValueError, "ascent_steps must be an integer >= 1"),
        ({"ascent_steps": 1.5}, ValueError, "ascent_steps must be an integer >= 1"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"no_such_setting": 1}, TypeError, "no_such_setting"),
    ],
)
def test_bad_settings_are_named(net, kwargs, error, match):
    with pytest.raises(error, match=match):
        AWP(net.parameters(), SGD, **{"lr": 0.1, **kwargs})


def test_bad_bases_are_told_what_to_do(net):
    sgd = SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"use AWP\.wrap"):
        AWP(net.parameters(), sgd)
    with pytest.raises(TypeError, match="a class such as"):
        AWP(net.parameters(), "sgd")
    with pytest.raises(TypeError, match="use AWP"):
        AWP.wrap(SGD)
    with pytest.raises(TypeError, match="lr"):
        AWP.wrap(sgd, lr=0.3)
    with pytest.raises(TypeError, match=r"must return a torch\.optim\.Optimizer"):
        AWP(net.parameters(), lambda groups: None)
    with pytest.raises(TypeError, match="closure several times"):
        AWP(net.parameters(), torch.optim.LBFGS)
    with pytest.raises(ValueError, match="empty parameter list"):
        AWP([], SGD)
    with pytest.raises(TypeError, match="iterable"):
        AWP(torch.ones(3), SGD)
    wrapped = AWP.wrap(sgd)
    for again in (sgd, wrapped):
        with pytest.raises(TypeError, match="already wrapped"):
            AWP.wrap(again)

    class WithGamma(SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            self.defaults["gamma"] = 0.9

    with pytest.raises(ValueError, match=r"WithGamma has settings of its own named \['gamma'\]"):
        AWP(net.parameters(), WithGamma, lr=0.1)


def test_a_group_setting_gone_bad_is_found_before_anything_changes(net):
    opt = AWP(net.parameters(), SGD, lr=0.1)
    (x, y), *_ = batches(1)
    backward(net, x, y)
    start = snapshot(net.parameters())
    opt.param_groups[0]["norm"] = "max"
    with pytest.raises(ValueError, match="norm must be one of"):
        opt.first_step()
    assert not opt.is_perturbed
    assert_same_bits(net.parameters(), start)
