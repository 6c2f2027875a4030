"""Settings, parameter groups, and what AWP wraps."""

import copy

import pytest
import torch
from torch import nn

from awp_optim import AWP
from tests.core.toolbox import (
    SGD,
    assert_restored,
    assert_same_weights,
    backward,
    batches,
    ready,
    snapshot,
    train,
    train_plainly,
)

NAN, INF = float("nan"), float("inf")


def test_groups_keep_their_own_settings(net):
    first, *rest = net.parameters()
    groups = [
        {"params": [first], "gamma": 0.5, "norm": "l1", "lr": 1.0},
        {"params": rest, "min_ndim": 1},
    ]
    opt = AWP(groups, SGD, gamma=0.01, lr=0.1)
    names = ("gamma", "norm", "min_ndim", "lr")
    settings = [tuple(group[name] for name in names) for group in opt.param_groups]
    assert settings == [(0.5, "l1", 2, 1.0), (0.01, "l2", 1, 0.1)]
    assert "gamma" not in groups[1]  # the caller's dictionaries are left alone
    start = snapshot(net.parameters())
    backward(net, *batches(1)[0])
    opt.first_step()
    for i, (p, w) in enumerate(zip(net.parameters(), start, strict=True)):
        order, gamma = (1, 0.5) if i == 0 else (2, 0.01)
        expected = gamma * w.norm(order) if p.grad.norm() > 0 else torch.zeros(())
        torch.testing.assert_close((p - w).norm(order), expected, rtol=1e-3, atol=1e-6)


def test_named_parameters_keep_their_names(net):
    opt = AWP(net.named_parameters(), SGD, lr=0.1)
    names = [n for n, _ in net.named_parameters()]
    assert opt.state_dict()["param_groups"][0]["param_names"] == names


def test_add_param_group_reaches_the_base_with_both_kinds_of_settings(net):
    first, *rest = net.parameters()
    opt = AWP([first], SGD, gamma=0.1, lr=0.1, momentum=0.9)
    opt.add_param_group({"params": rest, "gamma": 0.3})
    opt.base_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    assert [g["gamma"] for g in opt.param_groups] == [0.1, 0.3, 0.1]
    assert [g["momentum"] for g in opt.base_optimizer.param_groups] == [0.9, 0.9, 0.9]
    with pytest.raises(ValueError, match="gamma"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "gamma": -1.0})
    assert len(opt.param_groups) == 3
    backward(net, *batches(1)[0])
    opt.first_step()
    v = opt.perturbation()
    opt.restore()
    for p in rest:
        if p.ndim > 1:
            torch.testing.assert_close(v[p].norm(), 0.3 * p.detach().norm())


def test_wrap_keeps_the_optimizer_its_state_and_its_groups(net):
    data, other = batches(4), copy.deepcopy(net)
    plain = SGD(other.parameters(), lr=0.05, momentum=0.9)
    train_plainly(other, plain, data[:2])
    built = AWP(other.parameters(), SGD, 0.02, norm="l1", ascent_steps=2, lr=0.05, momentum=0.9)
    built.load_state_dict(plain.state_dict())
    train(other, built, data[2:])

    sgd = SGD(net.parameters(), lr=0.05, momentum=0.9)
    train_plainly(net, sgd, data[:2])
    opt = AWP.wrap(sgd, gamma=0.02, norm="l1", ascent_steps=2)
    train(net, opt, data[2:])
    assert opt.base_optimizer is sgd
    assert opt.param_groups is sgd.param_groups
    assert opt.state is sgd.state
    assert_same_weights(net, other)


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


def test_a_base_whose_zero_grad_takes_no_argument(net):
    """As apex's and DeepSpeed's."""

    class Fused(SGD):
        def zero_grad(self):
            super().zero_grad()

    opt = AWP(net.parameters(), Fused, lr=0.1)
    backward(net, *batches(1)[0])
    opt.first_step(zero_grad=True)
    assert opt.is_perturbed
    assert all(p.grad is None for p in net.parameters())
    backward(net, *batches(1)[0])
    with pytest.raises(TypeError, match="set_to_none"):
        opt.zero_grad(set_to_none=False)
    opt.second_step(zero_grad=True)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("way", ["first_step", "restored"])
def test_a_zero_grad_that_fails_leaves_the_weights_unperturbed(net, way):
    class Failing(SGD):
        def zero_grad(self, set_to_none=True):
            raise OSError("no")

    opt = AWP(net.parameters(), Failing, lr=0.1)
    start = snapshot(net.parameters())
    backward(net, *batches(1)[0])
    with pytest.raises(OSError, match="no"):
        if way == "first_step":
            opt.first_step(zero_grad=True)
        else:
            with opt.perturbed(zero_grad=True):
                pass
    assert_restored(opt, start)


@pytest.mark.parametrize(
    ("error", "name", "values"),
    [
        (ValueError, "gamma", [-0.1, NAN, INF, torch.ones(2), torch.tensor(-0.1)]),
        (TypeError, "gamma", ["0.1", True]),
        (ValueError, "norm", ["linf"]),
        (ValueError, "direction", ["up"]),
        (ValueError, "min_ndim", [-1]),
        (ValueError, "ascent_steps", [0, 1.5]),
        (ValueError, "lr", [-1.0]),
        (TypeError, "no_such_setting", [1]),
    ],
)
def test_bad_settings_are_named(net, error, name, values):
    for value in values:
        with pytest.raises(error, match="learning rate" if name == "lr" else name):
            AWP(net.parameters(), SGD, **{"lr": 0.1, name: value})


class WithGamma(SGD):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.defaults["gamma"] = 0.9


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda ps: AWP(ps, SGD(ps)), TypeError, r"AWP\.wrap"),
        (lambda ps: AWP(ps, "sgd"), TypeError, "class"),
        (lambda ps: AWP.wrap(SGD), TypeError, "AWP"),
        (lambda ps: AWP.wrap(SGD(ps), lr=0.3), TypeError, "lr"),
        (lambda ps: AWP(ps, lambda groups: None), TypeError, r"torch\.optim\.Optimizer"),
        (lambda ps: AWP(ps, torch.optim.LBFGS), TypeError, "LBFGS.*closure"),
        (lambda ps: AWP([], SGD), ValueError, "empty"),
        (lambda ps: AWP(ps[0], SGD), TypeError, "iterable"),
        (lambda ps: AWP.wrap(AWP(ps, SGD)), TypeError, "already"),
        (lambda ps: AWP.wrap(AWP(ps, SGD).base_optimizer), TypeError, "already"),
        (lambda ps: AWP(ps, WithGamma), ValueError, r"WithGamma.*\['gamma'\]"),
    ],
)
def test_bad_bases_are_refused_with_a_hint(net, make, error, match):
    with pytest.raises(error, match=match):
        make(list(net.parameters()))


@pytest.mark.parametrize("bad", [{"gamma": NAN}, {"gamma": -0.1}, {"norm": "max"}])
def test_a_group_setting_gone_bad_is_found_before_anything_changes(net, bad):
    opt, batch, start = ready(net)
    opt.param_groups[0].update(bad)
    with pytest.raises(ValueError, match=next(iter(bad))):
        opt.first_step()
    with pytest.raises(ValueError, match=next(iter(bad))):
        opt.step(lambda: (opt.zero_grad(), backward(net, *batch)))
    with pytest.raises(RuntimeError, match="plain step"):  # never a silent plain step
        opt.step()
    assert_restored(opt, start)
