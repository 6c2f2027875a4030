"""Perturb, restore, step: whatever is called, and whatever fails."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from awp_optim import AWP
from tests.core.toolbox import (
    SGD,
    assert_restored,
    assert_same_bits,
    assert_same_weights,
    backward,
    batches,
    ready,
    snapshot,
    train,
    train_plainly,
)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("calls", [1, 4])
def test_the_weights_are_restored_bit_for_bit(dtype, foreach, calls):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(s).to(dtype)) for s in [(5, 7), (3, 2, 3, 3), (1, 1)]]
    with torch.no_grad():
        tiny = torch.finfo(dtype).smallest_normal / 2  # subnormal
        params[0].view(-1)[:4] = torch.tensor([-0.0, tiny, -tiny, torch.finfo(dtype).max / 4])
    start = snapshot(params)
    opt = AWP(params, SGD, gamma=0.3, lr=0.1, foreach=foreach)
    for _ in range(calls):
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        opt.first_step()
    assert not torch.equal(params[1], start[1])
    opt.restore()
    assert_restored(opt, start)


def test_perturbed_takes_the_first_step_unless_it_was_taken(net):
    opt, batch, _ = ready(net)
    with opt.perturbed():
        once = snapshot(net.parameters())
    opt.first_step()
    with opt.perturbed(zero_grad=True):
        assert_same_bits(net.parameters(), once)
        assert net[0].weight.grad is None
        backward(net, *batch)
        opt.second_step()
    assert not opt.is_perturbed


def test_an_exception_in_the_ascent_restores_the_weights(net, monkeypatch):
    opt, _, start = ready(net, ascent_steps=2)

    def fails_half_way(params, *args, **kwargs):
        params[0].mul_(2)
        raise RuntimeError("out of memory")

    opt.first_step()
    monkeypatch.setattr("awp_optim.optimizer.ascend_", fails_half_way)
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.first_step()
    assert_restored(opt, start)


def test_misuse_is_an_error_that_names_the_way_out(net):
    opt, _, start = ready(net)
    for call in (opt.second_step, opt.step):
        with pytest.raises(RuntimeError, match=r"first_step\(\)"):
            call()
    opt.restore()  # does nothing
    assert_restored(opt, start)
    opt.first_step()
    for call in (
        opt.state_dict,
        lambda: opt.load_state_dict({}),
        lambda: copy.deepcopy(opt),
        lambda: pickle.dumps(opt),
    ):
        with pytest.raises(RuntimeError, match=r"restore\(\)"):
            call()
    assert opt.is_perturbed
    opt.restore()
    assert_restored(opt, start)


@pytest.mark.parametrize("finish", ["step", "closure"])
def test_step_while_perturbed_is_the_second_step(net, finish):
    other, calls = copy.deepcopy(net), []
    train(other, AWP(other.parameters(), SGD, gamma=0.1, lr=0.1), batches(1))
    opt, batch, _ = ready(net)
    opt.first_step(zero_grad=True)
    if finish == "step":
        backward(net, *batch)
        opt.step()
    else:
        opt.step(lambda: calls.append(backward(net, *batch)))
        assert len(calls) == 1
    assert not opt.is_perturbed
    assert_same_weights(net, other)


@pytest.mark.parametrize("steps", [1, 3])
def test_step_with_a_closure_is_the_loop_and_returns_the_first_loss(net, steps):
    other, data = copy.deepcopy(net), batches(4)
    settings = {"gamma": 0.05, "ascent_steps": steps, "lr": 0.1}
    train(other, AWP(other.parameters(), SGD, **settings), data)
    opt = AWP(net.parameters(), SGD, **settings)
    for x, y in data:
        losses = []

        def closure(x=x, y=y, losses=losses):
            assert torch.is_grad_enabled()
            opt.zero_grad()
            losses.append(backward(net, x, y))
            return losses[-1]

        with torch.no_grad():
            assert opt.step(closure) is losses[0]
        assert len(losses) == steps + 1
    assert_same_weights(net, other)


class TestWhatAClosureZeroes:
    """Gradients of several calls must not add up, at w and at w + v."""

    @pytest.mark.parametrize("accumulated", [False, True])
    def test_nothing(self, net, accumulated):
        opt, batch, start = ready(net)
        if not accumulated:
            opt.zero_grad()
        with pytest.raises(RuntimeError, match=r"zero_grad\(\)"):
            opt.step(lambda: backward(net, *batch))
        assert_restored(opt, start)
        assert all(p.grad is None for p in net.parameters())

    @pytest.mark.parametrize("way", ["none", "in place", "by hand", "same memory"])
    def test_in_any_way(self, net, way):
        def zero():
            grads = [(p, p.grad) for p in net.parameters() if p.grad is not None]
            if way in ("none", "in place"):
                net.zero_grad(set_to_none=way == "none")
            for p, g in grads if way in ("by hand", "same memory") else ():
                g.zero_()
                if way == "same memory":  # as DistributedDataParallel's buckets
                    p.grad = None
                    p.grad = g

        other, data = copy.deepcopy(net), batches(4)
        settings = {"gamma": 0.1, "lr": 0.1, "momentum": 0.9}
        train(other, AWP(other.parameters(), SGD, **settings), data)
        opt = AWP(net.parameters(), SGD, **settings)
        for batch in data:
            opt.step(lambda batch=batch: (zero(), backward(net, *batch))[1])
        assert_same_weights(net, other)

    @pytest.mark.parametrize("set_to_none", [True, False])
    @pytest.mark.parametrize("way", ["backward", "autograd.grad", "assigned"])
    def test_passes_before_it_do_not_count(self, net, way, set_to_none):
        """Such as an attack's or a gradient penalty's: Lightning zeroes after the training step."""
        other, data = copy.deepcopy(net), batches(4)
        settings = {"gamma": 0.1, "lr": 0.1, "momentum": 0.9}
        train(other, AWP(other.parameters(), SGD, **settings), data)
        opt, params = AWP(net.parameters(), SGD, **settings), list(net.parameters())

        def closure(x, y):
            if way == "backward":
                backward(net, x, y)
            else:
                loss = F.cross_entropy(net(x), y)
                grads = torch.autograd.grad(loss, params)
            if way == "assigned":
                for p, g in zip(params, grads):
                    p.grad = g
                return loss
            opt.zero_grad(set_to_none=set_to_none)
            return backward(net, x, y)

        for batch in data:
            opt.step(lambda batch=batch: closure(*batch))
        assert_same_weights(net, other)

    @pytest.mark.parametrize("create_graph", [False, True])
    @pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
    def test_two_passes_are_refused_if_neither_zeroes(self, net, create_graph):
        opt, batch, start = ready(net)

        def closure():
            for _ in range(2):
                F.cross_entropy(net(batch[0]), batch[1]).backward(create_graph=create_graph)

        with pytest.raises(RuntimeError, match=r"zero_grad\(\)"):
            opt.step(closure)
        assert_restored(opt, start)
        assert all(p.grad is None for p in net.parameters())

    def test_nothing_where_there_is_no_perturbation_is_left_to_the_base_optimizer(self, net):
        other, batch = copy.deepcopy(net), batches(1)[0]
        opt = AWP(net.parameters(), SGD, gamma=0.0, lr=0.1)
        theirs = SGD(other.parameters(), lr=0.1)
        for _ in range(2):
            opt.step(lambda: backward(net, *batch))
            theirs.step(lambda: backward(other, *batch))
        assert_same_weights(net, other)

    def test_an_exception_before_it_zeroes_leaves_the_gradients(self, net):
        opt, _, _ = ready(net)
        grads = [p.grad.clone() for p in net.parameters()]
        with pytest.raises(ZeroDivisionError):
            opt.step(lambda: 1 / 0)
        assert_same_bits([p.grad for p in net.parameters()], grads)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_closure_that_fails_at_the_perturbed_weights_leaves_them_unperturbed(net, compiled):
    opt, batch, start = ready(net)
    calls = []

    def closure():
        opt.zero_grad()
        loss = backward(net, *batch)
        calls.append(opt.is_perturbed)
        if len(calls) == 2:
            raise OSError("the disk is full")
        return loss

    step = torch.compile(opt.step, backend="eager") if compiled else opt.step
    with pytest.raises(OSError, match="disk"):
        step(closure)
    assert calls == [False, True]
    assert_restored(opt, start)


@pytest.mark.parametrize("finish", ["second_step", "step", "closure"])
def test_a_hook_that_fails_leaves_the_weights_unperturbed(net, finish):
    opt, batch, start = ready(net)
    opt.register_step_pre_hook(lambda *_: 1 / 0)
    if finish != "closure":
        opt.first_step()
    with pytest.raises(ZeroDivisionError):
        if finish == "closure":
            opt.step(lambda: (opt.zero_grad(), backward(net, *batch)))
        else:
            getattr(opt, finish)()
    assert_restored(opt, start)


def test_a_base_that_maximizes_is_perturbed_toward_less(net):
    opt, (x, y), _ = ready(net.eval(), gamma=0.05, maximize=True)
    opt.zero_grad()
    negative_loss = backward(net, x, y, scale=-1.0)
    with opt.perturbed(), torch.no_grad():
        assert -F.cross_entropy(net(x), y) < negative_loss


@pytest.mark.parametrize("way", ["steps", "closure", "step alone"])
def test_gamma_zero_is_the_base_optimizer(net, way):
    other, data, calls = copy.deepcopy(net), batches(3), []
    train_plainly(other, SGD(other.parameters(), lr=0.1, momentum=0.9), data)
    opt = AWP(net.parameters(), SGD, gamma=0.0, lr=0.1, momentum=0.9)
    for batch in data:

        def closure(batch=batch):
            calls.append(1)
            opt.zero_grad()
            return backward(net, *batch)

        if way == "closure":
            opt.step(closure)
            continue
        closure()
        if way == "steps":
            opt.first_step()
            opt.second_step()
        else:
            opt.step()
    assert len(calls) == len(data)
    assert_same_weights(net, other)


def test_the_random_direction_needs_no_gradient(net):
    opt, batch, start = ready(net, direction="random")
    opt.zero_grad()
    net[0].weight.requires_grad_(False)
    draws, calls = [], []
    for _ in range(2):
        opt.first_step()
        for p, w in zip(net.parameters(), start, strict=True):
            size = 0.1 * w.norm() if p.ndim > 1 and p.requires_grad else torch.zeros(())
            torch.testing.assert_close((p.detach() - w).norm(), size, rtol=1e-4, atol=1e-6)
        draws.append(net[5].weight.detach() - start[5])
        opt.restore()
    assert not torch.equal(*draws)
    direction = F.normalize(draws[0].flatten(), dim=0) * draws[0].numel() ** 0.5
    assert abs(direction.mean()) < 0.2  # about standard normal
    assert 0.2 < (direction.abs() < 0.5).float().mean() < 0.55
    opt.step(lambda: (calls.append(opt.is_perturbed), backward(net, *batch))[1])
    assert calls == [True]  # no pass at w is needed
