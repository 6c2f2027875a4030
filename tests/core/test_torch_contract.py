"""AWP is used like any other torch optimizer."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch

from awp_optim import AWP
from tests.core.toolbox import (
    SGD,
    assert_close,
    assert_same_weights,
    backward,
    batches,
    ready,
    train,
    train_plainly,
)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=6),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    ],
)
def test_schedulers_drive_the_base_and_do_not_warn(net, make):
    other, data = copy.deepcopy(net), batches(5)
    opt = AWP(net.parameters(), SGD, gamma=1e-9, lr=0.1, momentum=0.9)
    sgd = SGD(other.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = make(opt), make(sgd)
        for batch in data:
            train(net, opt, [batch], ours)
            train_plainly(other, sgd, [batch], theirs)
            for name in ("lr", "momentum"):
                assert opt.base_optimizer.param_groups[0][name] == sgd.param_groups[0][name]
    assert_close(net, other, rtol=1e-4, atol=1e-5)


def test_zero_grad_resets_as_torch_does(net):
    opt, batch, _ = ready(net)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad.eq(0).all() for p in net.parameters())
    for zero in (
        opt.zero_grad,
        *(partial(f, zero_grad=True) for f in (opt.first_step, opt.second_step)),
    ):
        backward(net, *batch)
        zero()
        assert all(p.grad is None for p in net.parameters())


def test_hooks_run_once_a_step(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    calls = []
    opt.register_step_pre_hook(lambda o, a, k: calls.append(("pre", o, o.is_perturbed)))
    opt.register_step_post_hook(lambda o, a, k: calls.append(("post", o, o.is_perturbed)))
    opt.base_optimizer.register_step_pre_hook(lambda o, a, k: calls.append(("base", o, None)))
    train(net, opt, batches(1))
    base = opt.base_optimizer
    assert calls == [("pre", opt, True), ("base", base, None), ("post", opt, False)]

    def add(o, state_dict):
        state_dict["note"] = "ours"

    opt.register_state_dict_pre_hook(lambda o: calls.append("saving"))
    opt.register_state_dict_post_hook(add)
    opt.register_load_state_dict_pre_hook(lambda o, s: {k: v for k, v in s.items() if k != "note"})
    opt.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    state = opt.state_dict()
    assert state["note"] == "ours"
    opt.load_state_dict(state)
    assert calls[-2:] == ["saving", "loaded"]


def test_repr_names_the_base_and_the_settings(net):
    text = repr(AWP(net.parameters(), SGD, gamma=0.125, lr=0.1, ascent_steps=2))
    for part in ("AWP of SGD", "ascent_steps=2", "gamma: 0.125", "lr: 0.1", "norm: l2"):
        assert part in text


def test_state_dict_is_the_base_optimizers_and_holds_no_backup(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1, momentum=0.9)
    train(net, opt, batches(2))
    state = opt.state_dict()
    assert {name for entry in state["state"].values() for name in entry} == {"momentum_buffer"}
    group = state["param_groups"][0]
    assert (group["gamma"], group["norm"], group["direction"]) == (0.1, "l2", "gradient")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("copied_by", ["checkpoint", "deepcopy", "pickle"])
def test_training_resumed_is_identical_to_training_without_a_stop(net, copied_by):
    settings = {"gamma": 0.02, "lr": 0.05, "momentum": 0.9, "ascent_steps": 2}
    opt, data = AWP(net.parameters(), SGD, **settings), batches(8)
    train(net, opt, data[:4])
    opt.param_groups[0]["gamma"] = 0.03  # a change of a setting is part of the state
    if copied_by == "checkpoint":
        other = copy.deepcopy(net)
        twin = AWP(other.parameters(), SGD, **settings)
        twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif copied_by == "deepcopy":
        other, twin = copy.deepcopy((net, opt))
    else:
        other, twin = pickle.loads(pickle.dumps((net, opt)))
    assert twin.param_groups is twin.base_optimizer.param_groups
    assert twin.param_groups[0]["params"][0] is next(other.parameters())
    train(net, opt, data[4:])
    train(other, twin, data[4:])
    assert_same_weights(net, other)


def test_a_checkpoint_loads_into_another_dtype(net):
    opt = AWP(net.parameters(), SGD, gamma=0.02, lr=0.05, momentum=0.9)
    train(net, opt, batches(3))
    other = copy.deepcopy(net).double()
    twin = AWP(other.parameters(), SGD, gamma=0.5, lr=0.5, momentum=0.5)
    twin.load_state_dict(opt.state_dict())
    assert (twin.param_groups[0]["gamma"], twin.param_groups[0]["lr"]) == (0.02, 0.05)
    assert next(iter(twin.state.values()))["momentum_buffer"].dtype == torch.float64
    train(net, opt, batches(2))
    train(other, twin, batches(2, torch.float64))
    assert_close(net.double(), other, rtol=1e-3, atol=1e-4)


def test_a_plain_optimizers_checkpoint_loads_and_keeps_our_settings(net):
    sgd = SGD(net.parameters(), lr=0.3, momentum=0.9)
    train_plainly(net, sgd, batches(1))
    opt = AWP(net.parameters(), SGD, gamma=0.02, norm="l1", lr=0.1, momentum=0.5)
    opt.load_state_dict(sgd.state_dict())
    group = opt.param_groups[0]
    assert (group["lr"], group["gamma"], group["norm"]) == (0.3, 0.02, "l1")
    opt.base_optimizer.load_state_dict(sgd.state_dict())
    assert opt.param_groups is opt.base_optimizer.param_groups  # never a stale list


def test_an_optimizer_no_longer_used_is_freed(net):
    opt, *_ = ready(net)
    opt.first_step()
    opt.second_step()
    reference = weakref.ref(opt)
    del opt
    gc.collect()
    assert reference() is None
