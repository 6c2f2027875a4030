"""The baseline trains as the library does, and is as wasteful as it claims."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from awp_optim import AWP, AdversarialStep
from awp_optim.attacks import PGD
from benchmarks.reference import ReferenceStep

ATTACK = {"eps": 0.1, "step_size": 0.03, "steps": 4, "random_start": False}


def convolutional() -> nn.Sequential:
    """With BatchNorm, a bias, and in float64."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.Softplus(),
        nn.Conv2d(5, 6, 3, bias=False),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(6 * 16, 4),
    ).double()


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(6, 3, 8, 8, generator=g, dtype=torch.float64),
            torch.randint(4, (6,), generator=g),
        )
        for _ in range(n)
    ]


def ours(model: nn.Module, gamma: float, **settings: float) -> AdversarialStep:
    make = AWP(model.parameters(), SGD, gamma=gamma, **settings)
    return AdversarialStep(model, make, PGD(**ATTACK))


def reference(model: nn.Module, gamma: float, **settings: float) -> ReferenceStep:
    return ReferenceStep(model, SGD(model.parameters(), **settings), gamma=gamma, **ATTACK)


@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_without_weight_decay_it_trains_as_the_library_does(gamma):
    """To 1e-12: the reference takes v from a difference of nearly equal weights, which rounds."""
    model = convolutional()
    other = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    settings = {"lr": 0.1, "momentum": 0.9}
    a, b = ours(model, gamma, **settings), reference(other, gamma, **settings)
    for x, y in batches(5):
        out, loss = a(x, y), b(x, y)
        torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=1e-12)
    for (name, p), q in zip(model.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    moved = max((p - w).abs().max().item() for p, w in zip(model.parameters(), start))
    assert moved > 1e-2


def test_awp_moves_the_weights_elsewhere_than_at():
    """Otherwise the comparison above would say nothing about v."""
    model = convolutional()
    other = copy.deepcopy(model)
    for gamma, net in ((0.0, model), (0.01, other)):
        step = reference(net, gamma, lr=0.1)
        for x, y in batches(5):
            step(x, y)
    differences = [
        (p - q).abs().max().item() for p, q in zip(model.parameters(), other.parameters())
    ]
    assert max(differences) > 1e-4


def test_weight_decay_acts_on_the_perturbed_weights():
    """By lr * decay * v, with v as AWP itself computes it."""
    lr, decay, gamma = 0.1, 0.5, 0.01
    model = convolutional()
    other = copy.deepcopy(model)
    ((x, y),) = batches(1)
    step = ours(model, gamma, lr=lr, weight_decay=decay)
    w = [p.detach().clone() for p in model.parameters()]
    perturbed = []
    model.register_forward_pre_hook(
        lambda module, args: perturbed.append([p.detach().clone() for p in module.parameters()])
    )
    step(x, y)
    reference(other, gamma, lr=lr, weight_decay=decay)(x, y)
    v = [p - q for p, q in zip(perturbed[-1], w)]  # the last pass is the one at w + v
    assert max(d.abs().max().item() for d in v) > 1e-4
    for p, q, d in zip(model.parameters(), other.parameters(), v):
        torch.testing.assert_close(p - q, lr * decay * d, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_every_pass_computes_weight_gradients(gamma):
    """4 steps of the attack and the training pass in the model, the ascent's pass in the proxy."""
    model = convolutional()
    step = reference(model, gamma, lr=0.1)
    computed = []
    model[0].weight.register_hook(lambda g: computed.append("model"))
    if gamma:
        step.proxy[0].weight.register_hook(lambda g: computed.append("proxy"))
    else:
        assert not hasattr(step, "proxy")
    step(*batches(1)[0])
    assert computed == ["model"] * 4 + ["proxy"] * bool(gamma) + ["model"]


def test_a_zero_gradient_leaves_its_layer_unperturbed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        model[1].bias.fill_(-100)  # nothing comes through the ReLU
    before = model[1].weight.detach().clone()
    reference(model, 0.01, lr=0.1)(*batches(1)[0])
    assert torch.equal(model[1].weight, before)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_attack_stays_in_the_ball_and_the_box_and_leaves_train_mode():
    model = convolutional()
    step = ReferenceStep(model, SGD(model.parameters(), lr=0.1), gamma=0, eps=0.1, steps=3)
    ((x, y),) = batches(1)
    x_adv = step._attack(x, y)
    assert 0.09 < (x_adv - x).abs().max() <= 0.1 + 1e-12
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not torch.equal(x_adv, step._attack(x, y))  # the start is random
    assert all(m.training for m in model.modules())
