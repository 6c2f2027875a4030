"""PGD against worst cases known in closed form, and against the plainest PGD written out."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from awp_optim._utils.checks import DTYPES
from awp_optim.attacks import CW, PGD
from awp_optim.attacks.losses import LOSSES, compares_with_clean

from .conftest import plain_pgd, radius, seeded

EPS = {"linf": 0.05, "l2": 0.3}
norms = pytest.mark.parametrize("norm", EPS)


# A linear model: logits s, -s and a constant far below, s = w.x + b. The lower s, the worse for
# class 0; the higher, the worse for class 1, under every loss.

D = 24
W = torch.linspace(-1, 1.25, D, dtype=torch.float64)


def linear(x):
    s = x.flatten(1) @ W - 0.5 * W.sum()
    return torch.stack([s, -s, torch.full_like(s, -20.0)], dim=1)


def toward(y):
    return torch.where(y == 0, -1.0, 1.0).double()[:, None] * W


def unit(d, norm):
    return d.sign() if norm == "linf" else d / d.norm(dim=1, keepdim=True)


Y = torch.tensor([0, 1, 0, 1, 1])


@norms
@pytest.mark.parametrize("loss", ["ce", "cw", "dlr"])
def test_reaches_the_worst_case_of_a_linear_model(norm, loss):
    eps = EPS[norm]
    x = torch.rand(5, D, dtype=torch.float64) * 0.2 + 0.4
    for random_start in (True, False):
        attack = PGD(eps, eps, steps=60, norm=norm, loss=loss, random_start=random_start)
        worst = x + eps * unit(toward(Y), norm)
        torch.testing.assert_close(attack(linear, x, Y), worst, atol=1e-9, rtol=0)
    x = x.round()  # at the edge of the box
    x[:, ::3] = 0.02
    if norm == "linf":
        worst = (x + eps * toward(Y).sign()).clamp(0, 1)
        out = PGD(eps, eps / 4, steps=30, loss=loss)(linear, x, Y)
        torch.testing.assert_close(out, worst, atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", ["ce", "cw", "dlr"])
def test_reaches_nearly_the_worst_case_at_the_edge_of_the_box_in_l2(loss):
    # Elements that cannot move outward stay; the others share the full radius.
    x = torch.full((5, D), 0.5, dtype=torch.float64)
    x[:, :6] = (toward(Y)[:, :6] > 0).double()
    eps = 0.3
    free = toward(Y).clone()
    free[:, :6] = 0
    worst = x + eps * free / free.norm(dim=1, keepdim=True)
    out = PGD(eps, eps / 100, steps=400, norm="l2", loss=loss, random_start=False)(linear, x, Y)
    # The projection shares a step's length with elements that the box then takes back.
    torch.testing.assert_close(out, worst, atol=2e-3, rtol=0)


@norms
def test_kl_goes_to_the_end_that_it_starts_toward(norm):
    x = torch.full((40, D), 0.5, dtype=torch.float64)  # s = 0: both ends are equally bad
    eps = EPS[norm]
    start = seeded(5, PGD(eps, steps=0, norm=norm, loss="kl"), linear, x, None)
    side = ((start - x) @ W).sign()
    assert set(side.tolist()) == {-1.0, 1.0}
    out = seeded(5, PGD(eps, eps, steps=60, norm=norm, loss="kl"), linear, x, None)
    worst = x + eps * side[:, None] * unit(W[None], norm)
    torch.testing.assert_close(out, worst, atol=1e-9, rtol=0)


@norms
def test_kl_with_restarts_finds_the_worse_end(norm):
    # From s > 0 the farther divergence is downward (over the boundary), whatever the label says.
    x = torch.full((30, D), 0.5, dtype=torch.float64) + 0.01 * W
    eps = EPS[norm]
    ends = [x + side * eps * unit(W[None], norm) for side in (-1, 1)]
    clean = linear(x)
    down, up = (LOSSES["kl"](linear(end), clean) for end in ends)
    assert bool((down > up).all())
    out = PGD(eps, eps, steps=60, norm=norm, loss="kl", restarts=15)(linear, x, None)
    torch.testing.assert_close(out, ends[0], atol=1e-9, rtol=0)


def random_start(x, norm, eps):
    if norm == "linf":
        return (x + torch.empty_like(x).uniform_(-1, 1) * eps).clamp(0, 1)
    d = torch.empty_like(x).normal_()
    r = torch.empty(len(x), dtype=x.dtype).uniform_(0, 1)
    d = torch.stack([di / di.norm() * ri * eps for di, ri in zip(d, r, strict=True)])
    return (x + d).clamp(0, 1)


@norms
@pytest.mark.parametrize("is_random", [True, False])
@pytest.mark.parametrize("loss", ["ce", "kl", "score", "cw", "dlr", "mixed"])
def test_is_plain_pgd_from_the_same_start(norm, loss, is_random, cnn64, batch64):
    x, y = batch64
    eps = EPS[norm]
    if compares_with_clean(loss) and not is_random:
        pytest.skip("refused")
    function = mixed_loss if loss == "mixed" else LOSSES[loss]
    if loss == "mixed":
        loss, y = "ce", mixed_labels(len(x), 5)
    target = cnn64(x).detach() if compares_with_clean(loss) else y
    torch.manual_seed(7)
    start = random_start(x, norm, eps) if is_random else x
    expected = plain_pgd(cnn64, x, target, function, norm, eps, eps / 4, 7, start)
    out = seeded(7, PGD(eps, eps / 4, 7, norm, loss, is_random), cnn64, x, y)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


def test_in_train_mode_batch_statistics_are_used(cnn64, batch64):
    x, y = batch64
    cnn64[6].p = 0.0  # dropout would draw random numbers
    model, expected = copy.deepcopy(cnn64).train(), x
    for _ in range(3):
        leaf = expected.clone().requires_grad_()
        cross_entropy(model(leaf), y, reduction="sum").backward()
        expected = (expected + 2 / 255 * leaf.grad.sign()).clamp(x - 8 / 255, x + 8 / 255)
        expected = expected.clamp(0, 1)
    before = cnn64[1].running_mean.clone()
    evaluated = PGD(steps=3, random_start=False)(cnn64, x, y)
    assert torch.equal(cnn64[1].running_mean, before)
    out = PGD(steps=3, random_start=False, model_mode="train")(cnn64, x, y)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    assert torch.equal(cnn64[1].running_mean, model[1].running_mean)
    assert cnn64[1].num_batches_tracked == model[1].num_batches_tracked
    assert not torch.allclose(out, evaluated)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(EPS)),
    st.sampled_from(list(LOSSES)),
    st.sampled_from(DTYPES),
    st.floats(1e-5, 2.0),
    st.floats(1e-3, 10.0),
    st.integers(1, 3),
    st.sampled_from([(0.0, 1.0), (0.0, 0.7), (-1.0, 2.0), None]),
    st.integers(0, 10**6),
)
def test_the_result_is_in_the_ball_and_the_box(norm, loss, dtype, eps, rate, steps, clip, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, 5, generator=g).mul(1.4).sub(0.2).clamp(0, 0.69).to(dtype)
    w = torch.randn(10, 4, generator=g).to(dtype)
    if norm == "linf" and clip:
        eps = min(eps, clip[1] - clip[0])
    attack = PGD(eps, eps * rate, steps, norm, loss, clip=clip)
    x_adv = attack(lambda x: torch.sin(x.flatten(1) * 3) @ w, x, torch.tensor([0, 1, 3]))
    assert bool((radius(x, x_adv, norm) <= eps + 1e-15).all())
    lo, hi = clip or (-torch.inf, torch.inf)
    assert bool(((x_adv >= lo) & (x_adv <= hi)).all())


@norms
def test_a_huge_neighbor_does_not_drown_an_example(norm):
    # In float32, a mean over the batch or a shared norm would lose the small gradient.
    x, y = torch.full((2, D), 0.5), torch.tensor([0, 0])
    scale = torch.tensor([1e30, 1e-30])

    def model(x):
        return linear(x.double()).float() * scale[:, None]

    out = PGD(EPS[norm], EPS[norm], 1, norm, "cw", random_start=False)(model, x, y)
    torch.testing.assert_close(out[0], out[1])
    assert not torch.equal(out[0], x[0])


def test_without_steps_it_is_the_random_start(batch):
    x, y = batch
    start = PGD(steps=0)(lambda x: pytest.fail("called"), x, y)
    assert not torch.equal(start, x)
    plain = PGD(steps=0, random_start=False)(lambda x: pytest.fail("called"), x, y)
    assert torch.equal(plain, x)


def test_kl_ignores_labels(cnn, batch):
    x, y = batch
    attack = PGD(loss="kl", restarts=2)
    expected = seeded(0, attack, cnn, x, None)
    for labels in (y, mixed_labels(len(x), 5)):
        assert torch.equal(seeded(0, attack, cnn, x, labels), expected)


@norms
@pytest.mark.parametrize("loss", ["ce", "kl", "score", "cw", "dlr", "mixed"])
def test_restarts_keep_the_worst_of_each_example(norm, loss, cnn, batch):
    x, y = batch
    eps = EPS[norm] / (3 if loss == "mixed" else 1)
    if loss == "mixed":
        loss, y = "ce", mixed_labels(len(x), 5).float()
    once = PGD(eps, eps / 4, 2, norm, loss)
    torch.manual_seed(9)
    tries = [once(cnn, x, y) for _ in range(6)]
    with torch.no_grad():
        target = cnn(x) if compares_with_clean(loss) else y
        logits = [cnn(t).double() for t in tries]
    values = torch.stack([LOSSES[loss](z, target) for z in logits])
    classes = y.argmax(1) if y.is_floating_point() else y
    fooled = torch.stack([z.argmax(1) != classes for z in logits])
    best = (values + (0 if compares_with_clean(loss) else 1e6 * fooled)).argmax(0)
    assert len(set(best.tolist())) > 1  # the test would be empty otherwise
    expected = torch.stack([tries[k][i] for i, k in enumerate(best.tolist())])
    torch.manual_seed(9)
    assert torch.equal(PGD(eps, eps / 4, 2, norm, loss, restarts=6)(cnn, x, y), expected)


def test_being_fooled_beats_a_higher_loss():
    # Two basins: left of 0.5 the loss is high but the label right, right of it the reverse.
    x, y = torch.full((64, 1), 0.5), torch.zeros(64, dtype=torch.long)

    def model(x):
        left = x[:, 0] < 0.5
        right_class = torch.where(left, 0.01, -0.01)
        others = torch.where(left, 0.0, -5.0)  # many rivals just below make cross-entropy high
        rivals = others[:, None].expand(-1, 50)
        return torch.cat([right_class[:, None], 0 * x, rivals], dim=1) + 0 * x

    left, right = model(torch.tensor([[0.4], [0.6]])).split(1)
    zero = torch.zeros(1, dtype=torch.long)
    assert cross_entropy(left, zero) > cross_entropy(right, zero)
    assert (left.argmax().item(), right.argmax().item()) == (0, 1)
    for labels in (y, torch.eye(52)[y]):
        out = PGD(0.1, steps=0, restarts=12)(model, x, labels)
        assert bool((out >= 0.5).all())


def test_a_restart_that_is_not_a_number_loses():
    x, y = torch.full((64, 1), 0.5), torch.zeros(64, dtype=torch.long)

    def model(x):
        z = torch.where(x < 0.5, torch.nan, 1.0)
        return torch.cat([z, 0 * z - 1], dim=1) + 0 * x

    # argmax takes the NaN in column 0 for the largest, so that both sides count as right.
    out = PGD(0.1, steps=0, restarts=12)(model, x, y)
    assert bool((out >= 0.5).all())


# Labels that are probabilities. The mixed loss of a linear model is convex in its input, so its
# maximum over a cube is at a corner: with few dimensions, all can be tried.

A = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 8


def affine(x):
    return x @ A.T


def mixed_labels(n=12, classes=3, seed=3):
    g = torch.Generator().manual_seed(seed)
    one_hot = torch.eye(classes, dtype=torch.float64)
    first, second = (one_hot[torch.randint(classes, (n,), generator=g)] for _ in range(2))
    share = torch.rand(n, 1, generator=g, dtype=torch.float64) * 0.4 + 0.55
    return share * first + (1 - share) * second


def mixed_loss(z, q):
    """sum_k q_k (-log p_k), written out."""
    return (q * (z.exp().sum(1, keepdim=True).log() - z)).sum(1)


def test_with_mixed_labels_it_reaches_the_worst_corner():
    x, q = torch.rand(12, 6, dtype=torch.float64) * 0.6 + 0.2, mixed_labels()
    eps = 0.1
    corners = torch.cartesian_prod(*[torch.tensor([-eps, eps], dtype=torch.float64)] * 6)
    losses = torch.stack([mixed_loss(affine(x + corner), q) for corner in corners])
    worst, at = losses.max(0)
    x_adv = PGD(eps, eps / 4, steps=20, restarts=20)(affine, x, q)
    # Being fooled comes first: where it has a choice, the loss may be less than the worst.
    fooled = affine(x_adv).argmax(1) != q.argmax(1)
    all_fooled = affine(x + corners[at]).argmax(1) != q.argmax(1)
    assert bool((fooled | ~all_fooled).all())
    same = fooled == all_fooled
    assert same.sum() >= 10
    torch.testing.assert_close(mixed_loss(affine(x_adv), q)[same], worst[same])
    torch.testing.assert_close(x_adv[same], (x + corners[at])[same], rtol=0, atol=1e-12)
    # Neither of the two labels alone leads there.
    hard = PGD(eps, eps / 4, steps=20, restarts=20)(affine, x, q.argmax(1))
    assert bool((mixed_loss(affine(hard), q) < worst - 1e-3).any())


@pytest.mark.parametrize("model_mode", ["eval", "train"])
@pytest.mark.parametrize("loss", ["ce", "cw", "kl", "score", "mixed"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_weight_gradients_are_those_at_the_input_before_the_last_step(
    cnn64, batch64, model_mode, loss, restarts
):
    for module in cnn64.modules():
        module.p = 0.0  # no dropout
    x, y = batch64
    if loss == "mixed":
        loss, y = "ce", mixed_labels(len(x), 5)
    twin = copy.deepcopy(cnn64)
    attack = PGD(0.05, 0.02, 2, loss=loss, model_mode=model_mode, restarts=restarts)
    seen = []
    hook = cnn64[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    weights = list(cnn64.parameters())
    x_adv, gradients = seeded(5, attack.with_weight_gradients, cnn64, x, y, weights)
    hook.remove()
    torch.manual_seed(5)
    torch.testing.assert_close(x_adv, attack(copy.deepcopy(twin), x, y))
    # With restarts, one more pass judges the last iterate.
    x_before = seen[-1] if restarts == 1 else seen[-2]
    twin.train(model_mode == "train")
    target = twin(x).detach() if compares_with_clean(loss) else y
    total = LOSSES[loss](twin(x_before), target).sum()
    truth = torch.autograd.grad(total, list(twin.parameters()))
    torch.testing.assert_close(gradients, truth, rtol=1e-9, atol=1e-12)
    assert not cnn64.training
    assert all(p.grad is None for p in weights)


def test_weight_gradients_that_do_not_exist(cnn, batch):
    unused = torch.nn.Parameter(torch.ones(2))
    _, (used, not_used) = PGD(steps=1).with_weight_gradients(cnn, *batch, [cnn[0].weight, unused])
    assert used.shape == cnn[0].weight.shape
    assert not_used is None
    for attack in (PGD(eps=0), PGD(steps=0)):
        assert attack.with_weight_gradients(cnn, *batch, [unused])[1] == (None,)


@norms
def test_a_gaussian_start_beside_the_input(norm):
    x = torch.full((400, D), 0.5, dtype=torch.float64)
    attack = PGD(eps=EPS[norm], steps=0, norm=norm, start_std=0.001)
    delta = attack(linear, x, torch.zeros(400, dtype=torch.long)) - x
    assert delta.std().item() == pytest.approx(0.001, rel=0.05)
    assert delta.mean().abs() < 1e-4
    ordinary = (delta.abs() < 0.001).double().mean()
    assert ordinary.item() == pytest.approx(0.683, abs=0.02)  # of a normal distribution
    wide = PGD(eps=EPS[norm], steps=0, norm=norm, start_std=10.0, clip=None)
    x_adv = wide(linear, x, torch.zeros(400, dtype=torch.long))
    assert radius(x, x_adv, norm).max() <= EPS[norm] * (1 + 1e-12)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"step_size": 0}, ValueError, "step_size"),
        ({"step_size": float("nan")}, ValueError, "step_size"),
        ({"step_size": "1"}, TypeError, "step_size"),
        ({"steps": -1}, ValueError, "steps"),
        ({"steps": 2.0}, TypeError, "steps must be an integer"),
        ({"steps": True}, TypeError, "steps"),
        ({"restarts": 0}, ValueError, "restarts"),
        ({"random_start": 1}, TypeError, "random_start"),
        ({"random_start": False, "restarts": 2}, ValueError, "restarts"),
        ({"norm": "l1"}, ValueError, "norm"),
        ({"step_size": None}, TypeError, "step_size"),  # PGD alone from here on
        ({"random_start": False, "loss": "kl"}, ValueError, "zero gradient"),
        ({"random_start": False, "loss": "score"}, ValueError, "zero gradient"),
        ({"start_std": 0.0}, ValueError, "start_std"),
        ({"start_std": "small"}, TypeError, "start_std"),
        ({"start_std": 0.1, "random_start": False}, ValueError, "start_std"),
    ],
)
def test_bad_settings_are_refused(settings, error, match):
    of_pgd = "start_std" in settings or "loss" in settings or settings.get("step_size", 1) is None
    for make in [PGD] if of_pgd else [PGD, CW]:
        with pytest.raises(error, match=match):
            make(**settings)
