"""Objectives against their formulas in float64 and the limits that must hold."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from awp_optim.attacks import PGD
from awp_optim.objectives import AT, MART, TRADES, at, mart, trades


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    return rng.normal(size=(7, 4)) * 3, rng.normal(size=(7, 4)) * 3, rng.integers(4, size=7)


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def tensors(*arrays):
    return [torch.tensor(a) for a in arrays]


def cross_entropy(z, y):
    return -np.log(softmax(z)[np.arange(len(y)), y])


def divergence(p, q):
    return (p * np.log(p / q)).sum(1)


def test_at_is_the_mean_cross_entropy(case):
    adv, _, y = case
    ours = at(*tensors(adv, y))
    np.testing.assert_allclose(ours.item(), cross_entropy(adv, y).mean(), rtol=1e-12)
    assert AT()(torch.tensor(adv), None, torch.tensor(y)) == ours


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_trades_is_equation_2(case, beta):
    adv, nat, y = case
    expected = cross_entropy(nat, y) + beta * divergence(softmax(nat), softmax(adv))
    ours = trades(*tensors(adv, nat, y), beta=beta)
    np.testing.assert_allclose(ours.item(), expected.mean(), rtol=1e-12)
    assert TRADES(beta)(*tensors(adv, nat, y)) == ours


@pytest.mark.parametrize("lam", [0.0, 1.0, 6.0])
def test_mart_is_equation_3(case, lam):
    adv, nat, y = case
    rows = np.arange(len(y))
    others = softmax(adv).copy()
    others[rows, y] = 0
    boosted = cross_entropy(adv, y) - np.log(1 - others.max(1))
    weight = 1 - softmax(nat)[rows, y]
    expected = boosted + lam * divergence(softmax(nat), softmax(adv)) * weight
    ours = mart(*tensors(adv, nat, y), lam=lam)
    np.testing.assert_allclose(ours.item(), expected.mean(), rtol=1e-12)
    assert MART(lam)(*tensors(adv, nat, y)) == ours


def test_limits(case):
    adv, nat, y = tensors(*case)
    assert trades(adv, nat, y, beta=0.0) == F.cross_entropy(nat, y)
    torch.testing.assert_close(trades(nat, nat, y), F.cross_entropy(nat, y))
    torch.testing.assert_close(mart(nat, nat, y), mart(nat, nat, y, lam=0.0))


@pytest.mark.parametrize("loss", [trades, mart])
def test_gradients_flow_to_both_logits_and_are_right(case, loss):
    adv, nat, y = tensors(*case)
    adv.requires_grad_()
    nat.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, n: loss(a, n, y), (adv, nat))


@pytest.mark.parametrize("loss", [trades, mart])
def test_saturated_logits_give_finite_losses_and_gradients(loss):
    adv = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]], requires_grad=True)
    nat = torch.tensor([[200.0, -200.0, 0.0], [200.0, -200.0, 0.0]], requires_grad=True)
    value = loss(adv, nat, torch.tensor([1, 0]))
    value.backward()
    assert value.isfinite()
    assert adv.grad.isfinite().all()
    assert nat.grad.isfinite().all()


def test_each_names_what_its_step_must_know():
    assert [o.needs_natural for o in (AT(), TRADES(), MART())] == [False, True, True]
    for objective in (AT(), TRADES(), MART()):
        PGD(loss=objective.attack_loss)
    assert TRADES(beta=3.0) == TRADES(beta=3.0) != TRADES()
    assert TRADES().attack_loss == "kl"
