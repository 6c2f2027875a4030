"""What the tests of the optimizer share: small networks, their data, and the textbook."""

import torch
from torch import nn
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


def batches(n, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(5, (n, 8), generator=generator)
    return list(zip(x, y))


def mlp():
    """A network for ``[(x.flatten(1), y) for x, y in batches(n)]``."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(72, 10), nn.Tanh(), nn.Linear(10, 5)).double()


def flat_batches(n):
    return [(x.flatten(1), y) for x, y in batches(n, torch.float64)]


def ready(net, base=SGD, **settings):
    """An AWP whose parameters have gradients, their batch and a copy of the weights."""
    opt = AWP(net.parameters(), base, **{"gamma": 0.1, "lr": 0.1, **settings})
    batch = batches(1)[0]
    start = snapshot(net.parameters())
    backward(net, *batch)
    return opt, batch, start


def snapshot(params):
    return [p.detach().clone() for p in params]


def assert_same_bits(params, expected):
    for p, e in zip(params, expected, strict=True):
        assert p.dtype == e.dtype
        bits = [t.detach().reshape(-1).view(torch.uint8) for t in (p, e)]
        assert torch.equal(*bits)


def assert_same_weights(net, other):
    assert_same_bits(net.parameters(), list(other.parameters()))


def assert_close(net, other, **tolerances):
    weights = (list(model.parameters()) for model in (net, other))
    torch.testing.assert_close(*weights, **tolerances)


def assert_restored(opt, start):
    """The weights of an optimizer with one group are the unperturbed ones, bit for bit."""
    assert not opt.is_perturbed
    assert_same_bits(opt.param_groups[0]["params"], start)


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


def train_plainly(model, optimizer, data, scheduler=None):
    for x, y in data:
        optimizer.zero_grad()
        backward(model, x, y)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


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
