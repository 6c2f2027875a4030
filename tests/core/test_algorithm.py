"""AWP against a textbook implementation that shares nothing with the package."""

import copy

import pytest
import torch
from torch.nn import functional as F

from awp_optim import AWP
from tests.core.toolbox import (
    SGD,
    assert_same_bits,
    backward,
    batches,
    snapshot,
    textbook,
    train,
)

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
    start = snapshot(net.parameters())
    opt.first_step(zero_grad=True)
    v = [p.detach() - c for p, c in zip(net.parameters(), start, strict=True)]
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
