"""The losses, against formulas written out in float64 for one example at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from awp_optim._utils.checks import DTYPES
from awp_optim.attacks.losses import LOSSES, ce, compares_with_clean, cw, dlr, kl


def log_softmax(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def ref_ce(z, y):
    return -log_softmax(z)[y]


def ref_kl(z, clean):
    p, q = log_softmax(clean), log_softmax(z)
    return (np.exp(p) * (p - q)).sum()


def ref_score(z, clean):
    return ((np.exp(log_softmax(z)) - np.exp(log_softmax(clean))) ** 2).sum()


def ref_cw(z, y):
    return np.delete(z, y).max() - z[y]


def ref_dlr(z, y):
    s = np.sort(z)[::-1]
    rival = s[1] if z[y] == s[0] else s[0]
    return -(z[y] - rival) / (s[0] - s[2] + 1e-12)


REFERENCES = {"ce": ref_ce, "kl": ref_kl, "score": ref_score, "cw": ref_cw, "dlr": ref_dlr}


def data(name, n=40, classes=6, dtype=torch.float64, scale=5.0):
    z = torch.randn(n, classes, dtype=torch.float64).mul(scale).to(dtype)
    if compares_with_clean(name):
        return z, torch.randn(n, classes, dtype=torch.float64).mul(scale).to(dtype)
    return z, torch.arange(n) % classes


def by_hand(name, z, target):
    z, target = z.double().numpy(), target.numpy()
    return torch.tensor([REFERENCES[name](a, b) for a, b in zip(z, target, strict=True)])


@pytest.mark.parametrize("scale", [0.01, 5.0, 1000.0])
@pytest.mark.parametrize("name", LOSSES)
def test_is_the_formula(name, scale):
    z, target = data(name, scale=scale)
    torch.testing.assert_close(LOSSES[name](z, target), by_hand(name, z, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_logits_are_raised_to_float32(name, dtype):
    z, target = data(name, dtype=dtype)
    loss = LOSSES[name](z, target)
    assert loss.dtype == torch.float32
    target = target.double() if compares_with_clean(name) else target
    torch.testing.assert_close(loss.double(), by_hand(name, z, target), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*LOSSES, "ce of probabilities"])
def test_gradients_are_right(name):
    z, target = data(name, n=5) if name in LOSSES else (data("ce", n=5)[0], probabilities(n=5))
    loss = LOSSES.get(name, ce)
    assert gradcheck(lambda z: loss(z, target), z.requires_grad_())
    if compares_with_clean(name):  # none flows into the clean logits
        assert not loss(z.detach(), target.requires_grad_()).requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_one_number_for_each_example(name):
    z, target = data(name, n=7)
    losses = LOSSES[name](z, target)
    assert losses.shape == (7,)
    alone = torch.cat([LOSSES[name](z[i : i + 1], target[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(losses, alone)
    assert LOSSES[name](z[:0], target[:0]).shape == (0,)


@pytest.mark.parametrize("loss", [cw, dlr])
def test_margins_are_positive_exactly_when_fooled(loss):
    z, y = data("cw", n=200)
    assert torch.equal(loss(z, y) > 0, z.argmax(1) != y)


def test_dlr_does_not_see_scale_or_shift_and_survives_equal_logits():
    z, y = data("dlr")
    torch.testing.assert_close(dlr(7 * z - 3, y), dlr(z, y))
    z = torch.ones(1, 4, requires_grad=True)
    loss = dlr(z, torch.tensor([2]))
    assert loss.item() == 0
    loss.sum().backward()
    assert bool(z.grad.isfinite().all())


@pytest.mark.parametrize("name", ["kl", "score"])
def test_is_zero_and_flat_at_the_clean_logits(name):
    z = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    loss = LOSSES[name](z, z.detach().clone())
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    loss.sum().backward()
    assert z.grad.abs().max() < 1e-15


def test_extreme_logits_stay_finite():
    z = torch.tensor([[1e4, -1e4, 0.0]])
    assert ce(z, torch.tensor([1])).item() == 2e4
    assert bool(kl(-z, z).isfinite().all())


def probabilities(n=40, classes=6, dtype=torch.float64):
    return torch.rand(n, classes, dtype=torch.float64).softmax(1).to(dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("of_labels", DTYPES)
@pytest.mark.parametrize("of_logits", DTYPES)
def test_ce_of_probabilities_is_the_expectation_in_float32_at_least(of_logits, of_labels, autocast):
    z, _ = data("ce", dtype=of_logits)
    q = probabilities(dtype=of_labels)
    by_class = torch.stack([by_hand("ce", z, torch.full((40,), k)) for k in range(6)], dim=1)
    expected = (q.double() * by_class).sum(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = ce(z, q)
    assert loss.dtype == (torch.float64 if of_logits == torch.float64 else torch.float32)
    exact = of_logits == torch.float64
    rtol = 1e-12 if exact else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ce_of_certainty_is_ce_of_the_index_bit_for_bit(dtype):
    z, y = data("ce", dtype=dtype)
    results = []
    for target in (y, torch.eye(6)[y]):
        leaf = z.clone().requires_grad_()
        loss = ce(leaf, target)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    assert all(map(torch.equal, *results))
