"""AWP against a textbook implementation, and as a well-behaved torch optimizer."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from awp_optim import AWP

SGD = torch.optim.SGD
ORDER = {"l1": 1, "l2": 2}


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),  # its gradient would be rounding noise
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.Flatten(),
            nn.Linear(4 * 16, 5),
        )


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def batches(n, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(5, (n, 8), generator=generator)
    return list(zip(x, y))


def snapshot(params):
    return [p.detach().clone() for p in params]


def assert_same_bits(params, expected):
    for p, e in zip(params, expected, strict=True):
        assert p.dtype == e.dtype
        bits = [t.detach().reshape(-1).view(torch.uint8) for t in (p, e)]
        assert torch.equal(*bits)


def backward(model, x, y, scale=1.0):
    loss = F.cross_entropy(model(x), y) * scale
    loss.backward()
    return loss


def train(model, opt, data, scheduler=None):
    """The loop of the README."""
    for x, y in data:
        for _ in range(opt.ascent_steps):
            opt.zero_grad()
            backward(model, x, y)
            opt.first_step()
        opt.zero_grad()
        backward(model, x, y)
        opt.second_step()
        if scheduler is not None:
            scheduler.step()


# ---------------------------------------------------------------- against independent truths


def textbook(model, data, make_base, group_of, steps, norm):
    """Eq. (10), (11), (15) with w and v kept apart, nothing shared with the package.

    ``group_of`` maps a parameter's name to (index of its group, gamma).
    """
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    groups = [[], []]
    for n, t in w.items():
        groups[group_of(n)[0]].append(t)
    base = make_base([{"params": g} for g in groups if g])

    def gradient(v, x, y):
        at = {n: (t + v[n]).requires_grad_() for n, t in w.items()}
        loss = F.cross_entropy(functional_call(model, at, (x,)), y)
        return dict(zip(at, torch.autograd.grad(loss, list(at.values())), strict=True))

    def size(t):
        return t.abs().pow(ORDER[norm]).sum() ** (1 / ORDER[norm])

    for x, y in data:
        v = {n: torch.zeros_like(t) for n, t in w.items()}
        for _ in range(steps):
            g = gradient(v, x, y)
            for n, t in w.items():
                gamma = group_of(n)[1]
                if t.ndim > 1 and gamma > 0:
                    v[n] = v[n] + gamma / steps * size(t) * g[n] / size(g[n])
                    if size(v[n]) > gamma * size(t):
                        v[n] = gamma * size(t) / size(v[n]) * v[n]
        g = gradient(v, x, y)
        for n, t in w.items():
            t.grad = g[n]
        base.step()
    return w


BASES = {
    "sgd": lambda groups: SGD(groups, lr=0.05, momentum=0.9, weight_decay=5e-3),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=1e-2),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, momentum=0.5),
}


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("base", list(BASES))
def test_twenty_steps_equal_the_textbook_in_float64(net, base, steps, norm, foreach):
    net = net.double()
    data = batches(20, torch.float64)

    def group_of(name):
        return (0, 0.02) if name.startswith("0.") else (1, 0.05)

    expected = textbook(copy.deepcopy(net), data, BASES[base], group_of, steps, norm)
    split = [
        [p for n, p in net.named_parameters() if n.startswith("0.")],
        [p for n, p in net.named_parameters() if not n.startswith("0.")],
    ]
    groups = [{"params": split[0], "gamma": 0.02}, {"params": split[1]}]
    opt = AWP(
        groups, BASES[base], gamma=0.05, ascent_steps=steps, norm=norm, min_ndim=2, foreach=foreach
    )
    start = snapshot(net.parameters())
    train(net, opt, data)
    for (name, p), before in zip(net.named_parameters(), start, strict=True):
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-10, atol=1e-10)
        assert not torch.equal(p, before)


def proxy_network_training(model, data, make_base, gamma):
    """AWP with a proxy network, written from the description of the authors' scripts.

    The copy takes a gradient ascent step of any size; what changed in a layer is scaled to the
    layer's norm; gamma times that is added to the weights before the update and taken away after.
    """
    proxy = copy.deepcopy(model)
    base = make_base(model.parameters())
    for x, y in data:
        proxy.load_state_dict(model.state_dict())
        ascent = SGD(proxy.parameters(), lr=0.01)
        ascent.zero_grad()
        (-F.cross_entropy(proxy(x), y)).backward()
        ascent.step()
        difference = {}
        for (name, old), new in zip(model.named_parameters(), proxy.parameters(), strict=True):
            if old.ndim > 1:
                change = (new - old).detach()
                difference[name] = old.detach().norm() / (change.norm() + 1e-20) * change
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in difference:
                    p.add_(gamma * difference[name])
        base.zero_grad()
        backward(model, x, y)
        base.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in difference:
                    p.sub_(gamma * difference[name])


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_equals_the_proxy_network_implementation_without_weight_decay(net, name):
    make = {
        "sgd": lambda ps: SGD(ps, lr=0.05, momentum=0.9),
        "adam": lambda ps: torch.optim.Adam(ps, lr=1e-3),
    }[name]
    data = batches(10)
    other = copy.deepcopy(net)
    proxy_network_training(other, data, make, gamma=0.01)
    train(net, AWP(net.parameters(), make, gamma=0.01), data)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=3e-5)


def test_differs_from_the_proxy_network_by_the_decay_of_v(net):
    """With weight decay theirs decays w + v, ours w: a difference of lr * decay * v a step."""
    net = net.double()
    lr, decay = 0.1, 0.5
    data = batches(1, torch.float64)
    other = copy.deepcopy(net)
    make = lambda ps: SGD(ps, lr=lr, weight_decay=decay)  # noqa: E731
    proxy_network_training(other, data, make, gamma=0.01)
    opt = AWP(net.parameters(), make, gamma=0.01)
    backward(net, *data[0])
    centre = snapshot(net.parameters())
    opt.first_step(zero_grad=True)
    v = [p.detach() - c for p, c in zip(net.parameters(), centre, strict=True)]
    backward(net, *data[0])
    opt.second_step()
    for p, q, d in zip(net.parameters(), other.parameters(), v, strict=True):
        torch.testing.assert_close(p - q, lr * decay * d, rtol=1e-6, atol=1e-9)


def test_ascends_the_loss_more_than_a_random_direction_of_the_same_size(net):
    (x, y), *_ = batches(1)
    net.eval()

    def rise(direction):
        torch.manual_seed(0)
        opt = AWP(net.parameters(), SGD, gamma=0.05, direction=direction, lr=0.1)
        before = backward(net, x, y)
        with opt.perturbed(), torch.no_grad():
            after = F.cross_entropy(net(x), y)
        opt.zero_grad()
        return (after - before).item()

    assert rise("gradient") > 5 * abs(rise("random")) > 0


# ---------------------------------------------------------------- settings and groups


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
    centre = snapshot(net.parameters())
    (x, y), *_ = batches(1)
    backward(net, x, y)
    opt.first_step()
    for i, (p, c) in enumerate(zip(net.parameters(), centre, strict=True)):
        v = p.detach() - c
        order, gamma = (1, 0.5) if i == 0 else (2, 0.01)
        expected = gamma * c.norm(order) if p.grad.norm() > 0 else torch.zeros(())
        torch.testing.assert_close(v.norm(order), expected, rtol=1e-3, atol=1e-6)


def test_min_ndim_leaves_biases_and_norms_unperturbed(net):
    (x, y), *_ = batches(1)
    centre = snapshot(net.parameters())
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    backward(net, x, y)
    opt.first_step()
    for p, c in zip(net.parameters(), centre, strict=True):
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
    centre = snapshot(rest)
    (x, y), *_ = batches(1)
    backward(Net(), x, y)
    for p in rest:
        p.grad = torch.randn_like(p)
    opt.first_step()
    for p, c in zip(rest, centre, strict=True):
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
    with pytest.raises(TypeError, match="where it is built"):
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
    centre = snapshot(net.parameters())
    opt.param_groups[0]["norm"] = "max"
    with pytest.raises(ValueError, match="norm must be one of"):
        opt.first_step()
    assert not opt.is_perturbed
    assert_same_bits(net.parameters(), centre)


# ---------------------------------------------------------------- the state machine


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("calls", [1, 4])
def test_the_centre_comes_back_bit_for_bit(dtype, foreach, calls):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(s).to(dtype)) for s in [(5, 7), (3, 2, 3, 3), (1, 1)]]
    with torch.no_grad():
        tiny = torch.finfo(dtype).smallest_normal / 2  # subnormal
        params[0].view(-1)[:4] = torch.tensor([-0.0, tiny, -tiny, torch.finfo(dtype).max / 4])
    centre = snapshot(params)
    opt = AWP(params, SGD, gamma=0.3, lr=0.1, foreach=foreach)
    for _ in range(calls):
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        opt.first_step()
    assert not torch.equal(params[1], centre[1])
    opt.restore()
    assert_same_bits(params, centre)


def test_an_exception_inside_perturbed_brings_the_centre_back(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    (x, y), *_ = batches(1)
    backward(net, x, y)
    centre = snapshot(net.parameters())
    with pytest.raises(KeyboardInterrupt), opt.perturbed():
        assert opt.is_perturbed
        assert not torch.equal(net[0].weight, centre[0])
        raise KeyboardInterrupt
    assert not opt.is_perturbed
    assert_same_bits(net.parameters(), centre)


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


def test_an_exception_in_the_ascent_brings_the_centre_back(net, monkeypatch):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1, ascent_steps=2)
    (x, y), *_ = batches(1)
    backward(net, x, y)
    centre = snapshot(net.parameters())

    def fails_half_way(params, *args, **kwargs):
        params[0].mul_(2)
        raise RuntimeError("out of memory")

    opt.first_step()
    monkeypatch.setattr("awp_optim.optimizer.ascend_", fails_half_way)
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.first_step()
    assert not opt.is_perturbed
    assert_same_bits(net.parameters(), centre)


def test_misuse_is_an_error_that_says_what_to_do(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    (x, y), *_ = batches(1)
    backward(net, x, y)
    centre = snapshot(net.parameters())
    with pytest.raises(RuntimeError, match=r"needs a first_step\(\) before"):
        opt.second_step()
    with pytest.raises(RuntimeError, match="plain step without perturbation"):
        opt.step()
    opt.restore()  # does nothing at the centre
    assert_same_bits(net.parameters(), centre)
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
    assert_same_bits(net.parameters(), centre)


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
        centre = snapshot(net.parameters())
        with pytest.raises(RuntimeError, match=r"call zero_grad\(\) in it"):
            opt.step(lambda: F.cross_entropy(net(x), y).backward())
        assert not opt.is_perturbed
        assert_same_bits(net.parameters(), centre)
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
def test_a_hook_that_fails_leaves_the_centre(net, finish):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    opt.register_step_pre_hook(lambda *_: 1 / 0)
    (x, y), *_ = batches(1)
    centre = snapshot(net.parameters())
    backward(net, x, y)
    if finish == "closure":
        with pytest.raises(ZeroDivisionError):
            opt.step(lambda: backward(net, x, y))
    else:
        opt.first_step()
        with pytest.raises(ZeroDivisionError):
            getattr(opt, finish)()
    assert not opt.is_perturbed
    assert_same_bits(net.parameters(), centre)


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
    centre = snapshot(net.parameters())
    with torch.inference_mode(), opt.perturbed():
        net(data[0][0])
    train(net, opt, data)
    assert not torch.equal(net[0].weight, centre[0])


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


def test_a_closure_that_fails_at_the_perturbed_weights_leaves_the_centre(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    (x, y), *_ = batches(1)
    centre = snapshot(net.parameters())
    calls = []

    def closure():
        if calls:
            raise RuntimeError("the loader's worker died")
        calls.append(1)
        return backward(net, x, y)

    with pytest.raises(RuntimeError, match="worker died"):
        opt.step(closure)
    assert not opt.is_perturbed
    assert_same_bits(net.parameters(), centre)


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
    centre = snapshot(net.parameters())
    draws = []
    for _ in range(2):
        opt.first_step()
        for p, c in zip(net.parameters(), centre, strict=True):
            size = 0.1 * c.norm() if p.ndim > 1 and p.requires_grad else torch.zeros(())
            torch.testing.assert_close((p.detach() - c).norm(), size, rtol=1e-4, atol=1e-6)
        draws.append(net[5].weight.detach() - centre[5])
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
    assert calls == [True]  # no pass at the centre is needed


def test_buffers_are_allocated_once(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    pointers = []
    for x, y in batches(3):
        train(net, opt, [(x, y)])
        pointers.append([b.data_ptr() for b in opt.backup.buffers.values()])
    assert pointers[0] == pointers[1] == pointers[2]
    perturbed = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert sum(b.numel() for b in opt.backup.buffers.values()) == perturbed


# ---------------------------------------------------------------- odd gradients and parameters


@pytest.mark.parametrize("foreach", [True, False, None])
def test_gradients_none_zero_infinite_and_nan_give_no_perturbation(foreach):
    params = [nn.Parameter(torch.randn(3, 3)) for _ in range(5)]
    params[4].requires_grad_(False)
    centre = snapshot(params)
    opt = AWP(params, SGD, gamma=0.1, lr=0.1, foreach=foreach)
    params[0].grad = torch.zeros(3, 3)
    params[1].grad = torch.full((3, 3), float("inf"))
    params[2].grad = torch.randn(3, 3)
    params[2].grad[0, 0] = float("nan")
    for _ in range(2):
        opt.first_step()
        assert_same_bits(params, centre)
    params[1].grad = torch.randn(3, 3)
    params[3].grad = torch.randn(3, 3)  # had no gradient in the first ascents
    opt.first_step()
    for i, (p, c) in enumerate(zip(params, centre, strict=True)):
        size = 0.1 * c.norm() if i in (1, 3) else torch.zeros(())
        torch.testing.assert_close((p.detach() - c).norm(), size, rtol=1e-5, atol=0)
    opt.restore()
    assert_same_bits(params, centre)


@pytest.mark.parametrize("foreach", [True, False])
def test_sparse_gradients_are_those_of_the_dense_embedding(foreach):
    torch.manual_seed(0)
    dense, sparse = nn.Embedding(9, 4), nn.Embedding(9, 4, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    for model in (dense, sparse):
        opt = AWP(model.parameters(), SGD, gamma=0.1, lr=0.1, foreach=foreach)
        for tokens in torch.tensor([[1, 2, 2], [8, 0, 1]]):
            model(tokens).pow(2).sum().backward()
            opt.first_step(zero_grad=True)
            model(tokens).pow(2).sum().backward()
            opt.second_step(zero_grad=True)
    torch.testing.assert_close(sparse.weight, dense.weight)


def test_scalars_empty_and_complex_parameters():
    params = [
        nn.Parameter(torch.tensor(2.0)),
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.randn(3, 3, dtype=torch.complex64)),
    ]
    centre = snapshot(params)
    for foreach in (True, False):
        opt = AWP(params, SGD, gamma=0.5, min_ndim=0, lr=0.1, foreach=foreach)
        sum(p.abs().pow(2).sum() for p in params).backward()
        opt.first_step(zero_grad=True)
        assert params[0].item() == pytest.approx(3.0)
        torch.testing.assert_close(params[2].detach(), 1.5 * centre[2])  # g is parallel to w
        opt.restore()
        assert_same_bits(params, centre)
    sum(p.abs().pow(2).sum() for p in params).backward()
    opt.first_step()
    opt.second_step()
    torch.testing.assert_close(params[0].detach(), torch.tensor(2.0 - 0.1 * 4.0))


def test_a_tied_parameter_is_perturbed_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    opt = AWP(model.parameters(), SGD, gamma=0.1, lr=0.1)
    centre = first.weight.detach().clone()
    model(torch.randn(3, 4)).sum().backward()
    opt.first_step()
    torch.testing.assert_close((first.weight - centre).norm(), 0.1 * centre.norm())
    opt.restore()
    assert torch.equal(first.weight, centre)


def test_parameters_that_share_memory_come_back_bit_for_bit():
    flat = torch.randn(4, 4)
    params = [nn.Parameter(flat), nn.Parameter(flat.t()), nn.Parameter(flat[:2])]
    centre = flat.clone()
    opt = AWP([{"params": [p]} for p in params], SGD, gamma=0.1, lr=0.1)
    for p in params:
        p.grad = torch.randn_like(p)
    opt.first_step()
    opt.first_step()
    opt.restore()
    assert torch.equal(flat, centre)


class Labelled(Tensor):
    """A subclass as libraries make them."""


@pytest.mark.parametrize("foreach", [True, False, None])
def test_tensor_subclasses_are_perturbed_as_others(foreach):
    plain = nn.Parameter(torch.randn(3, 3))
    labelled = nn.Parameter(plain.detach().clone().as_subclass(Labelled))
    grad = torch.randn(3, 3)
    for p in (plain, labelled):
        p.grad = grad.clone()
        opt = AWP([p], SGD, gamma=0.1, lr=0.1, foreach=foreach)
        opt.first_step()
    torch.testing.assert_close(labelled.as_subclass(Tensor), plain.detach())
    opt.second_step()


def test_dtypes_and_memory_formats_mix_in_one_optimizer():
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(6, 4).t()),
        nn.Parameter(torch.randn(5, 5, dtype=torch.float64)),
        nn.Parameter(torch.randn(5, 5, dtype=torch.bfloat16)),
    ]
    centre = snapshot(params)
    for foreach in (True, False):
        opt = AWP(params, SGD, gamma=0.2, lr=0.1, foreach=foreach)
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype)
        opt.first_step()
        for p, c in zip(params, centre, strict=True):
            size = (p.detach() - c).float().norm()
            torch.testing.assert_close(size, 0.2 * c.float().norm(), rtol=5e-3, atol=0)
        opt.restore()
        for p, c in zip(params, centre, strict=True):
            assert torch.equal(p, c)


def test_the_perturbation_is_seen_inside_one_autocast_region(net):
    """Autocast keeps half-precision copies of the weights, which an ascent must not leave stale."""
    opt = AWP(net.parameters(), SGD, gamma=0.5, lr=0.1)
    (x, y), *_ = batches(1)
    net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        backward(net, x, y)
        plain = net(x).detach()
        opt.first_step()
        perturbed = net(x).detach()
        opt.restore()
        restored = net(x).detach()
    assert torch.equal(plain, restored)
    assert (perturbed - plain).abs().max() > 0.1 * plain.abs().max()


# ---------------------------------------------------------------- mixed precision


def amp_step(net, opt, scaler, x, y, overflow=(), clip=None):
    backward(net, x, y, scaler.scale(torch.ones(())) * (float("inf") if 1 in overflow else 1))
    opt.first_step(zero_grad=True)
    backward(net, x, y, scaler.scale(torch.ones(())) * (float("inf") if 2 in overflow else 1))
    if clip is not None:
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_gradscaler_trains_as_without_it(net, fused, clip):
    net.double()
    other = copy.deepcopy(net)
    opt = AWP(net.parameters(), torch.optim.Adam, gamma=0.02, lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = AWP(other.parameters(), torch.optim.Adam, gamma=0.02, lr=1e-2)
    for x, y in batches(4, torch.float64):
        amp_step(net, opt, scaler, x, y, clip=clip)
        backward(other, x, y)
        plain.first_step(zero_grad=True)
        backward(other, x, y)
        if clip is not None:
            nn.utils.clip_grad_norm_(other.parameters(), clip)
        plain.second_step(zero_grad=True)
        opt.zero_grad()
    assert not hasattr(opt, "found_inf")
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflow", [(2,), (1, 2)])
def test_an_overflow_at_the_perturbed_weights_skips_the_update(net, overflow, fused, clip):
    opt = AWP(net.parameters(), torch.optim.Adam, gamma=0.02, lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = batches(3)
    amp_step(net, opt, scaler, *data[0], clip=clip)
    opt.zero_grad()
    centre = snapshot(net.parameters())
    state = copy.deepcopy(opt.state_dict())
    amp_step(net, opt, scaler, *data[1], overflow, clip)
    opt.zero_grad()
    assert not opt.is_perturbed
    assert_same_bits(net.parameters(), centre)
    after = opt.state_dict()["state"]
    for key, entries in state["state"].items():
        for name, value in entries.items():
            torch.testing.assert_close(after[key][name], value, rtol=0, atol=0)
    assert scaler.get_scale() == 512.0
    amp_step(net, opt, scaler, *data[2], clip=clip)  # and training goes on
    assert all(p.isfinite().all() for p in net.parameters())
    assert not torch.equal(net[0].weight, centre[0])


@pytest.mark.parametrize("base", [SGD, torch.optim.Adam])
def test_an_overflow_in_the_very_first_step_makes_no_state(net, base):
    """A fused SGD left to skip by itself would go on with a momentum it never wrote."""
    kwargs = {"momentum": 0.9} if base is SGD else {}
    opt = AWP(net.parameters(), base, gamma=0.02, lr=1e-2, fused=True, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    (x, y), *_ = batches(1)
    amp_step(net, opt, scaler, x, y, overflow=(2,))
    assert len(opt.state) == 0
    opt.zero_grad()
    amp_step(net, opt, scaler, x, y)
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in net.parameters())


def test_gradscaler_without_any_gradient(net):
    opt = AWP(net.parameters(), SGD, gamma=0.02, direction="random", lr=1e-2)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    centre = snapshot(net.parameters())
    opt.first_step()
    scaler.step(opt)
    assert_same_bits(net.parameters(), centre)


def test_a_disabled_gradscaler_and_misuse_of_an_enabled_one(net):
    opt = AWP(net.parameters(), SGD, gamma=0.02, lr=1e-2)
    (x, y), *_ = batches(1)
    amp_step(net, opt, torch.amp.GradScaler("cpu", enabled=False), x, y)
    scaler = torch.amp.GradScaler("cpu")
    opt.zero_grad()
    scaler.scale(backward(net, x, y))
    with pytest.raises(RuntimeError, match="plain step without perturbation"):
        scaler.step(opt)
    assert not hasattr(opt, "found_inf")  # torch leaves it behind on an error
    scaler = torch.amp.GradScaler("cpu")
    opt.zero_grad()
    scaler.scale(backward(net, x, y))
    with pytest.raises(RuntimeError, match="cannot be used with a closure"):
        scaler.step(opt, lambda: backward(net, x, y))
    train(net, opt, [(x, y)])


def test_half_precision_gradients_cannot_be_unscaled_and_the_centre_comes_back():
    param = nn.Parameter(torch.ones(3, 3, dtype=torch.float16))
    opt = AWP([param], SGD, gamma=0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(param.sum()).backward()
    opt.first_step()
    with pytest.raises(ValueError, match="unscale FP16"):
        scaler.step(opt)
    assert torch.equal(param, torch.ones_like(param))


# ---------------------------------------------------------------- as any torch optimizer


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
    other = copy.deepcopy(net)
    opt = AWP(net.parameters(), SGD, gamma=1e-9, lr=0.1, momentum=0.9)
    sgd = SGD(other.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = make(opt), make(sgd)
        for x, y in batches(5):
            train(net, opt, [(x, y)], ours)
            sgd.zero_grad()
            backward(other, x, y)
            sgd.step()
            theirs.step()
            assert opt.base_optimizer.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
            assert opt.param_groups[0]["momentum"] == sgd.param_groups[0]["momentum"]
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_zero_grad_resets_as_torch_does(net):
    opt = AWP(net.parameters(), SGD, lr=0.1)
    (x, y), *_ = batches(1)
    backward(net, x, y)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad.eq(0).all() for p in net.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    backward(net, x, y)
    opt.first_step(zero_grad=True)
    assert all(p.grad is None for p in net.parameters())
    backward(net, x, y)
    opt.second_step(zero_grad=True)
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
def test_training_resumed_is_identical_to_training_that_went_on(net, copied_by):
    settings = {"gamma": 0.02, "lr": 0.05, "momentum": 0.9, "ascent_steps": 2}
    opt = AWP(net.parameters(), SGD, **settings)
    data = batches(8)
    train(net, opt, data[:4])
    opt.param_groups[0]["gamma"] = 0.03  # a change of a setting is part of the state
    if copied_by == "checkpoint":
        other = Net()
        other.load_state_dict(net.state_dict())
        twin = AWP(other.parameters(), SGD, **settings)
        twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif copied_by == "deepcopy":
        other, twin = copy.deepcopy((net, opt))
    else:
        other, twin = pickle.loads(pickle.dumps((net, opt)))
    assert twin.param_groups is twin.base_optimizer.param_groups
    assert twin.param_groups[0]["params"][0] is next(iter(other.parameters()))
    train(net, opt, data[4:])
    train(other, twin, data[4:])
    assert_same_bits(other.parameters(), snapshot(net.parameters()))


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
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=1e-4)


def test_a_model_may_change_its_dtype_between_steps(net):
    opt = AWP(net.parameters(), SGD, gamma=0.02, lr=0.05)
    train(net, opt, batches(1))
    net.double()
    opt.zero_grad()
    train(net, opt, batches(1, torch.float64))
    assert all(b.dtype == torch.float64 for b in opt.backup.buffers.values())


def test_a_plain_optimizers_checkpoint_loads_and_keeps_our_settings(net):
    sgd = SGD(net.parameters(), lr=0.3, momentum=0.9)
    (x, y), *_ = batches(1)
    backward(net, x, y)
    sgd.step()
    opt = AWP(net.parameters(), SGD, gamma=0.02, norm="l1", lr=0.1, momentum=0.5)
    opt.load_state_dict(sgd.state_dict())
    group = opt.param_groups[0]
    assert (group["lr"], group["gamma"], group["norm"]) == (0.3, 0.02, "l1")
    opt.base_optimizer.load_state_dict(sgd.state_dict())
    assert opt.param_groups is opt.base_optimizer.param_groups  # never a stale list


def test_an_optimizer_no_longer_used_is_freed(net):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1)
    train(net, opt, batches(1))
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------- other directions


@pytest.mark.parametrize("maximize", [False, True])
def test_ascends_along_given_tensors_instead_of_the_gradients(net, maximize):
    opt = AWP(net.parameters(), SGD, gamma=0.1, lr=0.1, maximize=maximize)
    (x, y), *_ = batches(1)
    backward(net, x, y)
    w = net[3].weight
    given = torch.randn_like(w)
    opt.first_step(along={w: given})
    ((moved, v),) = opt.perturbation().items()
    assert moved is w
    opt.restore()
    torch.testing.assert_close(v, 0.1 * w.detach().norm() * given / given.norm())
    before = snapshot(net.parameters())
    with pytest.raises(ValueError, match="along holds a tensor of shape"):
        opt.first_step(along={w: given[0]})
    assert_same_bits(net.parameters(), before)
    assert not opt.is_perturbed
