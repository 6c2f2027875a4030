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
    assert_same_bits,
    backward,
    batches,
    snapshot,
    train,
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
    assert_same_bits(params, start)


def test_an_exception_inside_perturbed_restores_the_weights(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    (x, y), *_ = batches(1)
    backward(net, x, y)
    start = snapshot(net.parameters())
    with pytest.raises(KeyboardInterrupt), opt.perturbed():
        assert opt.is_perturbed
        assert not torch.equal(net[0].weight, start[0])
        raise KeyboardInterrupt
    assert not opt.is_perturbed
    assert_same_bits(net.parameters(), start)


def test_perturbed_takes_the_first_step_unless_it_was_taken(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    (x, y), *_ = batches(1)
    backward(net, x, y)
    with opt.perturbed():
        once = snapshot(net.parameters())
    opt.first_step()
    with opt.perturbed(zero_grad=True):
        assert_same_bits(net.parameters(), once)
        assert net[0].weight.grad is None
        backward(net, x, y)
        opt.second_step()
    assert not opt.is_perturbed


def test_an_exception_in_the_ascent_restores_the_weights(net, monkeypatch):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1, ascent_steps=2)
    (x, y), *_ = batches(1)
    backward(net, x, y)
    start = snapshot(net.parameters())

    def fails_half_way(params, *args, **kwargs):
        params[0].mul_(2)
        raise RuntimeError("out of memory")

    opt.first_step()
    monkeypatch.setattr("awp_optim.optimizer.ascend_", fails_half_way)
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.first_step()
    assert not opt.is_perturbed
    assert_same_bits(net.parameters(), start)


def test_misuse_is_an_error_that_says_what_to_do(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    (x, y), *_ = batches(1)
    backward(net, x, y)
    start = snapshot(net.parameters())
    with pytest.raises(RuntimeError, match=r"needs a first_step\(\) before"):
        opt.second_step()
    with pytest.raises(RuntimeError, match="plain step without perturbation"):
        opt.step()
    opt.restore()  # does nothing
    assert_same_bits(net.parameters(), start)
    opt.first_step()
    for call in (
        opt.state_dict,
        lambda: opt.load_state_dict({}),
        lambda: copy.deepcopy(opt),
        lambda: pickle.dumps(opt),
    ):
        with pytest.raises(RuntimeError, match=r"second_step\(\) or restore\(\) first"):
            call()
    assert opt.is_perturbed
    opt.restore()
    assert_same_bits(net.parameters(), start)


def test_a_closure_after_a_first_step_is_the_second_pass(net):
    other, (x, y) = copy.deepcopy(net), batches(1)[0]
    for model, with_closure in ((net, True), (other, False)):
        opt = AWP(model.parameters(), SGD, gamma=0.1, lr=0.1)
        backward(model, x, y)
        opt.first_step(zero_grad=True)
        if with_closure:
            calls = []
            opt.step(lambda: calls.append(backward(model, x, y)))  # noqa: B023
            assert len(calls) == 1
        else:
            backward(model, x, y)
            opt.second_step()
        assert not opt.is_perturbed
    assert_same_bits(net.parameters(), snapshot(other.parameters()))


class TestWhatAClosureZeroes:
    """Gradients of several calls must not add up, at w and at w + v."""

    @pytest.fixture
    def opt(self, net):
        return AWP(net.parameters(), SGD, gamma=0.1, lr=0.1, momentum=0.9)

    @pytest.mark.parametrize("accumulated", [False, True])
    def test_nothing(self, net, opt, accumulated):
        (x, y), (x2, y2) = batches(2)
        if accumulated:
            backward(net, x2, y2)
        start = snapshot(net.parameters())
        with pytest.raises(RuntimeError, match=r"call zero_grad\(\) in it"):
            opt.step(lambda: F.cross_entropy(net(x), y).backward())
        assert not opt.is_perturbed
        assert_same_bits(net.parameters(), start)
        assert all(p.grad is None for p in net.parameters())

    @pytest.mark.parametrize("way", ["none", "in place", "by hand", "same memory"])
    def test_in_any_way(self, net, opt, way):
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
        for x, y in data:

            def closure():
                zero()
                loss = F.cross_entropy(net(x), y)  # noqa: B023
                loss.backward()
                return loss

            opt.step(closure)
        theirs = AWP(other.parameters(), SGD, gamma=0.1, lr=0.1, momentum=0.9)
        train(other, theirs, data)
        assert_same_bits(net.parameters(), snapshot(other.parameters()))

    def test_nothing_where_there_is_no_perturbation_is_the_base_optimizers_affair(self, net):
        other, (x, y) = copy.deepcopy(net), batches(1)[0]
        opt = AWP(net.parameters(), SGD, gamma=0.0, lr=0.1)
        theirs = SGD(other.parameters(), lr=0.1)
        for _ in range(2):
            opt.step(lambda: F.cross_entropy(net(x), y).backward())
            theirs.step(lambda: F.cross_entropy(other(x), y).backward())
        assert_same_bits(net.parameters(), snapshot(other.parameters()))

    def test_an_exception_before_it_zeroes_leaves_the_gradients(self, net, opt):
        backward(net, *batches(1)[0])
        grads = [p.grad.clone() for p in net.parameters()]
        with pytest.raises(ZeroDivisionError):
            opt.step(lambda: 1 / 0)
        assert_same_bits([p.grad for p in net.parameters()], grads)


@pytest.mark.parametrize("finish", ["second_step", "step", "closure"])
def test_a_hook_that_fails_leaves_the_weights_unperturbed(net, finish):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    opt.register_step_pre_hook(lambda *_: 1 / 0)
    (x, y), *_ = batches(1)
    start = snapshot(net.parameters())
    backward(net, x, y)
    if finish == "closure":
        with pytest.raises(ZeroDivisionError):
            opt.step(lambda: backward(net, x, y))
    else:
        opt.first_step()
        with pytest.raises(ZeroDivisionError):
            getattr(opt, finish)()
    assert not opt.is_perturbed
    assert_same_bits(net.parameters(), start)


def test_a_base_that_maximizes_is_perturbed_towards_less(net):
    (x, y), *_ = batches(1)
    net.eval()
    opt = AWP(net.parameters(), SGD, gamma=0.05, lr=0.1, maximize=True)
    gain = -F.cross_entropy(net(x), y)
    gain.backward()
    with opt.perturbed(), torch.no_grad():
        assert -F.cross_entropy(net(x), y) < gain


def test_a_gamma_gone_bad_is_never_a_plain_step(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    (x, y), *_ = batches(1)
    for bad in (float("nan"), -0.1):
        opt.param_groups[0]["gamma"] = bad
        backward(net, x, y)
        with pytest.raises(RuntimeError, match="plain step without perturbation"):
            opt.step()
        with pytest.raises(ValueError, match="gamma must be finite"):
            opt.step(lambda: (opt.zero_grad(), backward(net, x, y)))


def test_buffers_made_in_inference_mode_serve_afterwards(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    data = batches(2)
    backward(net, *data[0])
    start = snapshot(net.parameters())
    with torch.inference_mode(), opt.perturbed():
        net(data[0][0])
    train(net, opt, data)
    assert not torch.equal(net[0].weight, start[0])


def test_compiled_code_around_the_optimizer_changes_nothing(net):
    other = copy.deepcopy(net)
    data = batches(3)
    train(other, AWP(other.parameters(), SGD, gamma=0.05, lr=0.1), data)
    opt = AWP(net.parameters(), SGD, gamma=0.05, lr=0.1)
    first, second = (
        torch.compile(step, backend="eager") for step in (opt.first_step, opt.second_step)
    )
    compiled = torch.compile(net, backend="eager")
    for x, y in data:
        backward(compiled, x, y)
        first(zero_grad=True)
        assert opt.is_perturbed
        backward(compiled, x, y)
        second(zero_grad=True)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_step_without_closure_is_the_second_step_while_perturbed(net):
    other = copy.deepcopy(net)
    (x, y), *_ = batches(1)
    for model, finish in ((net, "second_step"), (other, "step")):
        opt = AWP(model.parameters(), SGD, gamma=0.1, lr=0.1)
        backward(model, x, y)
        opt.first_step(zero_grad=True)
        backward(model, x, y)
        getattr(opt, finish)()
    assert_same_bits(net.parameters(), snapshot(other.parameters()))


@pytest.mark.parametrize("steps", [1, 3])
def test_step_with_a_closure_is_the_loop_and_returns_the_first_loss(net, steps):
    other = copy.deepcopy(net)
    data = batches(4)
    train(other, AWP(other.parameters(), SGD, gamma=0.05, ascent_steps=steps, lr=0.1), data)
    opt = AWP(net.parameters(), SGD, gamma=0.05, ascent_steps=steps, lr=0.1)
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
    assert_same_bits(net.parameters(), snapshot(other.parameters()))


def test_a_closure_that_fails_at_the_perturbed_weights_leaves_the_weights_unperturbed(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    (x, y), *_ = batches(1)
    start = snapshot(net.parameters())
    calls = []

    def closure():
        if calls:
            raise RuntimeError("the loader's worker died")
        calls.append(1)
        return backward(net, x, y)

    with pytest.raises(RuntimeError, match="worker died"):
        opt.step(closure)
    assert not opt.is_perturbed
    assert_same_bits(net.parameters(), start)


@pytest.mark.parametrize("way", ["steps", "closure", "step alone"])
def test_gamma_zero_is_the_base_optimizer(net, way):
    other = copy.deepcopy(net)
    opt = AWP(net.parameters(), SGD, gamma=0.0, lr=0.1, momentum=0.9)
    sgd = SGD(other.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches(3):
        sgd.zero_grad()
        backward(other, x, y)
        sgd.step()
        if way == "closure":
            calls = []

            def closure(x=x, y=y, calls=calls):
                calls.append(1)
                opt.zero_grad()
                return backward(net, x, y)

            opt.step(closure)
            assert len(calls) == 1
        else:
            opt.zero_grad()
            backward(net, x, y)
            if way == "steps":
                opt.first_step()
                opt.second_step()
            else:
                opt.step()
    assert_same_bits(net.parameters(), snapshot(other.parameters()))


def test_the_random_direction_needs_no_gradient(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, direction="random", lr=0.1)
    net[0].weight.requires_grad_(False)
    start = snapshot(net.parameters())
    draws = []
    for _ in range(2):
        opt.first_step()
        for p, c in zip(net.parameters(), start, strict=True):
            size = 0.1 * c.norm() if p.ndim > 1 and p.requires_grad else torch.zeros(())
            torch.testing.assert_close((p.detach() - c).norm(), size, rtol=1e-4, atol=1e-6)
        draws.append(net[5].weight.detach() - start[5])
        opt.restore()
    assert not torch.equal(*draws)
    direction = F.normalize(draws[0].flatten(), dim=0) * draws[0].numel() ** 0.5
    assert abs(direction.mean()) < 0.2  # looks standard normal
    assert 0.2 < (direction.abs() < 0.5).float().mean() < 0.55
    (x, y), *_ = batches(1)
    calls = []

    def closure():
        calls.append(opt.is_perturbed)
        return backward(net, x, y)

    opt.step(closure)
    assert calls == [True]  # no pass at w is needed


def test_buffers_are_allocated_once(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    pointers = []
    for x, y in batches(3):
        train(net, opt, [(x, y)])
        pointers.append([b.data_ptr() for b in opt.backup.buffers.values()])
    assert pointers[0] == pointers[1] == pointers[2]
    perturbed = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert sum(b.numel() for b in opt.backup.buffers.values()) == perturbed
