"""Losses of the user's own: embeddings, regression, and what they must return."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from awp_optim.attacks import APGD, CW, FGSM, PGD, SPSA, Captured

from .conftest import plain_pgd, seeded


def distance(z, target):
    """|z - target|^2 over all but the first dimension."""
    return (z - target).flatten(1).square().sum(1)


def squared_error(output, target):
    return (output.squeeze(1) - target).square()


def own_ce(logits, y):
    return cross_entropy(logits, y, reduction="none")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["embedding", "feature map", "regression"])
def test_is_the_plain_loop(kind, norm, cnn64, batch64):
    """As in FARE (Schlarmann et al., ICML 2024): embeddings, away from the original model's."""
    x = batch64[0]
    loss, model = distance, cnn64
    if kind == "regression":
        model, target = nn.Sequential(cnn64, nn.Linear(5, 1).double()), torch.randn(6).double()
        loss = squared_error
    else:
        model = cnn64[:4] if kind == "feature map" else cnn64
        with torch.no_grad():
            target = copy.deepcopy(model)(x)
            model[0].weight += 0.1 * torch.randn_like(model[0].weight)
    eps = 0.05 if norm == "linf" else 0.3
    attack = PGD(eps, eps / 4, 6, norm, loss, start_std=0.01)
    start = (x + seeded(1, torch.randn_like, x) * 0.01).clamp(0, 1)
    expected = plain_pgd(copy.deepcopy(model), x, target, loss, norm, eps, eps / 4, 6, start)
    x_adv = seeded(1, attack, model, x, target)
    torch.testing.assert_close(x_adv, expected, atol=1e-12, rtol=0)
    assert bool((loss(model(x_adv), target) > loss(model(x), target)).all())


@pytest.mark.parametrize("make", [FGSM, PGD])
def test_cross_entropy_of_ones_own_is_ce(make, cnn, batch):
    expected = seeded(0, make(loss="ce"), cnn, *batch)
    for loss in (own_ce, nn.CrossEntropyLoss(reduction="none")):
        assert torch.equal(seeded(0, make(loss=loss), cnn, *batch), expected)


def test_restarts_keep_the_highest_loss(cnn64, batch64):
    x = batch64[0]
    target = cnn64(x).detach()
    torch.manual_seed(0)
    tries = [PGD(steps=2, loss=distance)(cnn64, x, target) for _ in range(4)]
    losses = torch.stack([distance(cnn64(t), target) for t in tries])
    x_adv = seeded(0, PGD(steps=2, loss=distance, restarts=4), cnn64, x, target)
    torch.testing.assert_close(distance(cnn64(x_adv), target), losses.amax(0))


def test_weight_gradients(cnn64, batch64):
    x, target = batch64[0], torch.randn(6, 5).double()
    weights = list(cnn64.parameters())
    attack = PGD(steps=1, loss=distance, random_start=False)
    _, gradients = attack.with_weight_gradients(cnn64, x, target, weights)
    truth = torch.autograd.grad(distance(cnn64(x), target).sum(), weights)
    torch.testing.assert_close(gradients, truth)


@pytest.mark.parametrize("target", [torch.arange(6), torch.rand(6) > 0.5, torch.rand(6, 2, 3)])
def test_the_target_is_passed_on_unchanged(target, cnn, batch):
    seen = []

    def loss(output, y):
        seen.append(y)
        return output.sum(1)

    PGD(steps=2, loss=loss)(cnn, batch[0], target)
    assert len(seen) == 2
    assert all(torch.equal(y, target) and y.dtype == target.dtype for y in seen)


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda z, y: z.sum(), r"shape \(\)"),
        (lambda z, y: z, r"shape \(6, 5\)"),
        (lambda z, y: z.sum(1, keepdim=True), r"shape \(6, 1\)"),
        (lambda z, y: None, "NoneType"),
    ],
)
def test_one_number_for_each_example_or_an_error(loss, got, cnn, batch):
    with pytest.raises(ValueError, match=rf"each example.*{got}"):
        PGD(loss=loss)(cnn, *batch)


def test_targets_and_outputs_have_a_row_for_each_example(cnn, batch):
    x, y = batch
    for target in (y[:5], torch.tensor(1.0), [0] * 6):
        with pytest.raises(ValueError, match="one row for each"):
            PGD(loss=distance)(cnn, x, target)
    with pytest.raises(ValueError, match="y is None"):
        PGD(loss=distance)(cnn, x, None)
    with pytest.raises(ValueError, match="one output for each"):
        PGD(loss=distance)(lambda x: cnn(x)[:5], x, y)
    with pytest.raises(TypeError, match="floating-point"):
        PGD(loss=distance)(lambda x: cnn(x).long(), x, y)


def test_an_attack_remains_a_value():
    attack = PGD(loss=distance)
    assert attack == PGD(loss=distance) != PGD(loss=squared_error)
    assert hash(attack) == hash(PGD(loss=distance))
    assert pickle.loads(pickle.dumps(PGD(loss=own_ce))) == PGD(loss=own_ce)
    assert f"loss={__name__}.distance, random_start=True" in repr(attack)
    assert "loss=torch.nn.modules.loss.MSELoss" in repr(FGSM(loss=nn.MSELoss(reduction="none")))


def test_captured(cpu_graphs, cnn, batch):
    attack = Captured(PGD(steps=2, loss=distance, random_start=False))
    target = torch.rand(6, 5)
    expected = attack.attack(cnn, batch[0], target)
    for _ in range(4):
        torch.testing.assert_close(attack(cnn, batch[0], target), expected)
    assert cpu_graphs.replays == 2


@pytest.mark.parametrize("make", [APGD, SPSA, CW])
def test_attacks_that_judge_by_the_label_take_none(make):
    with pytest.raises((TypeError, ValueError), match="loss"):
        make(loss=distance)
    with pytest.raises(ValueError, match="loss must be one of"):
        PGD(loss="mse")
