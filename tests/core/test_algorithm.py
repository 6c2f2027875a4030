"""AWP against a textbook implementation that shares nothing with the package."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from awp_optim import AWP
from tests.core.toolbox import (
    SGD,
    assert_close,
    assert_restored,
    backward,
    batches,
    ready,
    snapshot,
    textbook,
    train,
)

BASES = {
    "sgd": partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-3),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=1e-2),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5),
}


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("base", list(BASES))
def test_twenty_steps_equal_the_textbook_in_float64(net, base, steps, norm, foreach):
    data = batches(20, torch.float64)
    gammas = {True: 0.02, False: 0.05}  # of the first layer, and of the others

    def group_of(name):
        first = name.startswith("0.")
        return int(not first), gammas[first]

    expected = textbook(copy.deepcopy(net.double()), data, BASES[base], group_of, steps, norm)
    first, *rest = net.parameters()
    groups = [{"params": [first], "gamma": gammas[True]}, {"params": rest}]
    settings = {"gamma": gammas[False], "ascent_steps": steps, "norm": norm, "foreach": foreach}
    start = snapshot(net.parameters())
    train(net, AWP(groups, BASES[base], **settings), data)
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
        proxy.zero_grad()
        backward(proxy, x, y, scale=-1.0)
        SGD(proxy.parameters(), lr=0.01).step()
        v = {}
        with torch.no_grad():
            for p, u in zip(model.parameters(), proxy.parameters(), strict=True):
                if p.ndim > 1:
                    v[p] = gamma * p.norm() / ((u - p).norm() + 1e-20) * (u - p)
                    p.add_(v[p])
        base.zero_grad()
        backward(model, x, y)
        base.step()
        with torch.no_grad():
            for p in v:
                p.sub_(v[p])


@pytest.mark.parametrize("base", [partial(SGD, lr=0.05, momentum=0.9), torch.optim.Adam])
def test_equals_the_proxy_network_implementation_without_weight_decay(net, base):
    data, other = batches(10), copy.deepcopy(net)
    proxy_network_training(other, data, base, gamma=0.01)
    train(net, AWP(net.parameters(), base, gamma=0.01), data)
    assert_close(net, other, rtol=1e-4, atol=3e-5)


def test_differs_from_the_proxy_network_by_the_decay_of_v(net):
    """With weight decay theirs decays w + v, ours w: a difference of lr * decay * v a step."""
    data, other = batches(1, torch.float64), copy.deepcopy(net.double())
    base = partial(SGD, lr=0.1, weight_decay=0.5)
    proxy_network_training(other, data, base, gamma=0.01)
    opt = AWP(net.parameters(), base, gamma=0.01)
    backward(net, *data[0])
    opt.first_step(zero_grad=True)
    v = opt.perturbation()
    backward(net, *data[0])
    opt.second_step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        expected = q.detach() + 0.1 * 0.5 * v.get(p, torch.zeros(()))
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


def test_ascends_the_loss_more_than_a_random_direction_of_the_same_size(net):
    net.eval()

    def rise(direction):
        torch.manual_seed(0)
        opt, (x, y), _ = ready(net, gamma=0.05, direction=direction)
        with torch.no_grad():
            before = F.cross_entropy(net(x), y)
            with opt.perturbed(zero_grad=True):
                return (F.cross_entropy(net(x), y) - before).item()

    assert rise("gradient") > 5 * abs(rise("random")) > 0


@pytest.mark.parametrize("maximize", [False, True])
def test_ascends_along_given_tensors_instead_of_the_gradients(net, maximize):
    opt, _, start = ready(net, maximize=maximize)
    w = net[3].weight
    given = torch.randn_like(w)
    opt.first_step(along={w: given})
    ((moved, v),) = opt.perturbation().items()
    assert moved is w
    opt.restore()
    torch.testing.assert_close(v, 0.1 * w.detach().norm() * given / given.norm())
    with pytest.raises(ValueError, match="shape"):
        opt.first_step(along={w: given[0]})
    assert_restored(opt, start)
