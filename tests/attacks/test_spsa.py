"""SPSA: its directions, its estimate against true gradients, its steps against torch's Adam."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from awp_optim.attacks import SPSA
from awp_optim.attacks.losses import LOSSES
from awp_optim.attacks.oracle import ModelOracle
from awp_optim.attacks.spsa import _layout, _Queries, rademacher

from .conftest import images, seeded, small_cnn

norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def estimate(model, x, y, keys, **settings):
    attack = SPSA(**settings)
    with torch.no_grad():
        return _Queries(attack, ModelOracle(model, x, y), _layout(x)).gradient(x, keys)


def gradient(model, x, y, loss="cw"):
    leaf = x.clone().requires_grad_()
    LOSSES[loss](model(leaf), y).sum().backward()
    return leaf.grad


def random_keys(n):
    return torch.randint(2**63 - 1, (n,))


class Counting(nn.Module):
    """How many images it was shown in each forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.model(x)


# ------------------------------------------------------------------------- directions


def splitmix64(seed, n):
    """The published generator, in Python's own integers."""
    mask, out = 2**64 - 1, []
    for _ in range(n):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


@pytest.mark.parametrize("key", [0, 1, 12345, 2**63 - 1, -(2**63)])
def test_signs_are_splitmix64(key):
    # The generator's first number from (key - 1) * gamma is that of the state key * gamma.
    start = splitmix64((key - 1) * 0x9E3779B97F4A7C15 & (2**64 - 1), 1)[0]
    bits = [(z >> i) & 1 for z in splitmix64(start, 4) for i in range(64)]
    assert rademacher(torch.tensor([key]), 250)[0].tolist() == [2.0 * b - 1 for b in bits[:250]]


def test_signs_are_even_and_independent():
    v = rademacher(torch.arange(2000), 500, torch.float64)
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    assert abs(v.mean()) < 4 / math.sqrt(v.numel())
    # Between elements and between keys: correlations of independent signs are about N(0, 1/n).
    for rows in (v.T, v[:500]):
        c = (rows @ rows.T / rows.shape[1]).triu(1)
        entries = c[c != 0] * math.sqrt(rows.shape[1])
        assert abs(entries.var() - 1) < 0.05
        assert entries.abs().max() < 7


def test_a_key_has_its_signs_in_any_company():
    keys = random_keys(5)
    assert torch.equal(rademacher(keys, 70)[3:], rademacher(keys[3:], 70))
    assert torch.equal(rademacher(keys, 70)[:, :9], rademacher(keys, 9))


# ------------------------------------------------------------------------- the estimate


@pytest.mark.parametrize("loss", ["cw", "ce", "dlr"])
@pytest.mark.parametrize("samples", [1, 7, 40])
def test_is_the_definition(loss, samples, cnn64, batch64):
    x, y = batch64
    keys = random_keys(len(x))
    expected = torch.zeros_like(x)
    with torch.no_grad():
        for i in range(len(x)):
            xi, yi = x[i : i + 1], y[i : i + 1]
            for s in range(samples):
                v = rademacher(keys[i : i + 1] + s, xi.numel(), x.dtype).view_as(xi)
                up, down = (LOSSES[loss](cnn64(xi + side * 0.01 * v), yi) for side in (1, -1))
                expected[i] += ((up - down) / 0.02 * v[0]) / samples
    g = estimate(cnn64, x, y, keys, loss=loss, samples=samples, delta=0.01, batch_size=6)
    torch.testing.assert_close(g, expected, atol=1e-11, rtol=1e-9)


def test_the_mean_over_all_directions_is_the_gradient_of_a_quadratic():
    # Over every sign vector, E[v v^T] = 1, and the two sides cancel what is even: exact.
    d, y = 6, torch.tensor([0])
    a = torch.randn(d, d, dtype=torch.float64)
    b = torch.randn(d, dtype=torch.float64)

    def model(x):
        f = ((x @ a) * x).sum(1) + x @ b
        return torch.stack([torch.zeros_like(f), f], 1)

    x = torch.rand(1, d, dtype=torch.float64)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * d).double()
    queries = _Queries(SPSA(delta=0.3, samples=1), ModelOracle(model, x, y), _layout(x))
    change = queries.difference(x, y, corners[None])
    g = (change.unsqueeze(1) * corners).mean(0) / 0.6
    torch.testing.assert_close(g, gradient(model, x, y)[0], atol=1e-12, rtol=0)


def test_a_linear_model_s_gradient_is_met_within_the_spread_of_theory():
    # g_i - g* = sum_{j != i} g*_j v_i v_j averaged over the samples: variance |g*|^2 / samples.
    w = torch.randn(2, 50, dtype=torch.float64)
    x, y = torch.rand(40, 50, dtype=torch.float64), torch.randint(2, (40,))
    true = w[1 - y] - w[y]
    g = estimate(lambda x: x @ w.T, x, y, random_keys(40), samples=400)
    z = (g - true) / (true.norm(dim=1, keepdim=True) / math.sqrt(400))
    assert abs(z.mean()) < 0.1
    assert abs(z.var() - 1) < 0.1


@pytest.mark.parametrize("samples", [8, 64, 512])
def test_cosine_with_the_gradient_is_that_of_theory(samples, cnn64, batch64):
    x, y = batch64
    true = gradient(cnn64, x, y).flatten(1)
    cosines = []
    for _ in range(3):
        g = estimate(cnn64, x, y, random_keys(len(x)), samples=samples, delta=1e-5).flatten(1)
        cosines.append(nn.functional.cosine_similarity(g, true))
    mean = torch.cat(cosines).mean()
    assert abs(mean - math.sqrt(samples / (samples + x[0].numel() - 1))) < 0.05


@pytest.mark.parametrize("batch_size", [2, 3, 8, 30, 64, 1000])
def test_batch_size_changes_nothing_but_the_memory(batch_size, cnn64, batch64):
    x, y = batch64
    keys = random_keys(len(x))
    expected = estimate(cnn64, x, y, keys, samples=10)
    model = Counting(cnn64)
    g = estimate(model, x, y, keys, samples=10, batch_size=batch_size)
    torch.testing.assert_close(g, expected, atol=1e-11, rtol=1e-9)
    assert max(model.sizes) <= batch_size
    assert sum(model.sizes) == 2 * 10 * len(x)
    model.sizes.clear()
    a = seeded(0, SPSA(steps=2, samples=10, batch_size=batch_size), model, x, y)
    assert max(model.sizes) <= batch_size
    b = seeded(0, SPSA(steps=2, samples=10), cnn64, x, y)
    torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


# ------------------------------------------------------------------------- the climb


@norms
def test_is_adam_on_the_estimate_projected(norm, cnn64, batch64):
    x, y = batch64
    eps = {"linf": 0.02, "l2": 0.3}[norm]
    attack = SPSA(eps, steps=5, samples=16, norm=norm, lr=0.003, drop_fooled=False)
    ours = seeded(2, attack, cnn64, x, y)
    keys = seeded(2, random_keys, len(x))
    delta = torch.zeros_like(x, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=0.003, maximize=True)
    iterates = [x]
    for i in range(5):
        at = x + delta.detach()
        delta.grad = estimate(cnn64, at, y, keys + 16 * i, samples=16)
        adam.step()
        with torch.no_grad():
            if norm == "linf":
                delta.clamp_(-eps, eps)
            else:
                delta *= (eps / delta.flatten(1).norm(dim=1)).clamp_max(1)[:, None, None, None]
            delta.copy_((x + delta).clamp(0, 1) - x)
        iterates.append(x + delta.detach())
    with torch.no_grad():
        scores = []
        for z in iterates:
            logits = cnn64(z)
            scores.append(LOSSES["cw"](logits, y) + 1e3 * (logits.argmax(1) != y))
    best = torch.stack(scores).argmax(0)
    expected = torch.stack(iterates)[best, torch.arange(len(x))]
    assert best.max() > 2
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)


def test_reaches_the_worst_case_of_a_linear_model():
    w = torch.tensor([[1.0, -1, 2, 1.5], [-1, 2, -1, 0.5]], dtype=torch.float64)
    x, y = torch.rand(8, 4, dtype=torch.float64), torch.randint(2, (8,))
    worst = (x + 0.05 * (w[1 - y] - w[y]).sign()).clamp(0, 1)
    out = SPSA(0.05, 40, drop_fooled=False)(lambda x: x @ w.T, x, y)
    torch.testing.assert_close(out, worst, atol=1e-9, rtol=0)


def test_the_same_examples_are_fooled_whether_dropped_or_not(solid):
    model, x, y = solid(24)
    model, x = model.double(), x.double()
    settings = {"eps": 0.02, "steps": 12, "samples": 24}
    counted = Counting(model)
    dropped = seeded(0, SPSA(**settings), counted, x, y)
    passes = sum(counted.sizes)
    counted.sizes.clear()
    climbed = seeded(0, SPSA(**settings, drop_fooled=False), counted, x, y)
    assert sum(counted.sizes) == 24 * (1 + 12 * 49)
    assert passes < 24 + 20 * 12 * 49  # also of those that were fooled on the way
    with torch.no_grad():
        a, b = model(dropped), model(climbed)
    fooled = a.argmax(1) != y
    assert torch.equal(fooled, b.argmax(1) != y)
    assert 2 < int(fooled.sum()) < 24
    assert torch.equal(dropped[-2:], x[-2:])  # misclassified as they are
    more = LOSSES["cw"](b, y) - LOSSES["cw"](a, y)
    assert more.min() > -1e-9
    assert more.max() > 1e-3
    torch.testing.assert_close(dropped[~fooled], climbed[~fooled], atol=1e-9, rtol=0)


def test_an_example_does_not_see_the_others():
    model, (x, y) = small_cnn(torch.float64), images(6, dtype=torch.float64)
    together = seeded(0, SPSA(eps=0.02, steps=4, samples=9), model, x, y)
    alone = seeded(0, SPSA(eps=0.02, steps=4, samples=9), model, x[:2], y[:2])
    torch.testing.assert_close(together[:2], alone, atol=1e-10, rtol=0)


class NoGradient(nn.Module):
    """Rounds its input to 8 bits, and hides from autograd."""

    def __init__(self):
        super().__init__()
        self.cnn = small_cnn()

    def forward(self, x):
        with torch.no_grad():
            return self.cnn(x.mul(255).round().div(255))


def test_needs_no_gradient(batch):
    x = batch[0]
    model = NoGradient()
    y = model(x).argmax(1)
    x_adv = SPSA(eps=0.1, steps=15, samples=32, delta=0.01)(model, x, y)
    assert bool((LOSSES["cw"](model(x_adv), y) > LOSSES["cw"](model(x), y)).all())


def test_a_query_that_blows_up_counts_for_nothing():
    w = torch.tensor([1.0, -2.0, 3.0, 1.0])
    x, y = torch.full((2, 4), 0.5), torch.tensor([0, 0])

    def model(x):
        s = x @ w - 5
        return torch.stack([torch.zeros_like(s), torch.where(x[:, 0] > 0.5005, math.nan, s)], 1)

    g = estimate(model, x, y, random_keys(2), samples=64)
    assert bool(g.isfinite().all())
    x_adv = SPSA(0.03, 5, samples=64)(model, x, y)
    assert bool(x_adv.isfinite().all())


def test_probabilities_and_small_settings(cnn, batch):
    x, y = batch
    attack = SPSA(steps=2, samples=6, loss="ce", drop_fooled=False)
    expected = seeded(0, attack, cnn, x, y)
    certain = seeded(0, attack, cnn, x, torch.eye(5)[y])
    torch.testing.assert_close(certain, expected, atol=1e-3, rtol=0)
    assert not torch.equal(attack(cnn, x, y), expected)  # another seed
    assert torch.equal(SPSA(steps=0)(cnn, x, y), x)
    assert SPSA(steps=1, samples=1)(cnn, x[:1], y[:1]).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_difference_that_the_dtype_cannot_hold_is_refused(dtype, batch):
    x = batch[0].to(dtype)
    with pytest.raises(ValueError, match=r"delta=0.0005 .* pass x.float\(\)"):
        SPSA(delta=0.0005)(small_cnn(dtype), x, batch[1])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("delta", 0, ValueError),
        ("lr", -1, ValueError),
        ("lr", "1", TypeError),
        ("samples", 0, ValueError),
        ("steps", -1, ValueError),
        ("batch_size", 1, ValueError),
        ("drop_fooled", None, TypeError),
        ("loss", "kl", ValueError),
    ],
)
def test_bad_settings_are_refused(name, value, error):
    with pytest.raises(error, match=name):
        SPSA(**{name: value})
