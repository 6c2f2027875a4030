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


def divergence(p, q):
    return (p * np.log(p / q)).sum(1)


def reference(name, adv, nat, q, weight=6.0, s=0.0):
    """The expectation over labels q of each loss, class by class; -log p_k smoothed by s."""
    adv, nat, q = (np.asarray(a, dtype=np.float64) for a in (adv, nat, q))
    p, p_nat = softmax(adv), softmax(nat)
    kl = divergence(p_nat, p)

    def smooth(p, k):
        return -(1 - s) * np.log(p[:, k]) - s * np.log(p).mean(1)

    def loss(k):
        if name == "at":
            return smooth(p, k)
        if name == "trades":
            return smooth(p_nat, k) + weight * kl
        rest = 1 - np.delete(p, k, axis=1).max(1)
        return smooth(p, k) - np.log(rest) + weight * kl * (1 - p_nat[:, k])

    return sum(q[:, k] * loss(k) for k in range(q.shape[1])).mean()


OBJECTIVES = {"at": AT, "trades": TRADES, "mart": MART}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def labels(n=7, classes=4, seed=1):
    """Spread over all classes, over two, certain, and uniform."""
    rng = np.random.default_rng(seed)
    q = rng.dirichlet(np.ones(classes), size=n)
    q[1] = np.eye(classes)[0] * 0.3 + np.eye(classes)[-1] * 0.7
    q[2] = np.eye(classes)[1]
    q[3] = 1 / classes
    return q


@pytest.mark.parametrize("s", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("classes", [2, 4, 9])
@every_objective
def test_the_loss_of_probabilities_is_the_expectation(name, classes, s):
    rng = np.random.default_rng(classes)
    adv, nat, q = (*rng.normal(size=(2, 60, classes)) * 3, labels(60, classes))
    for objective, weight in ((OBJECTIVES[name](label_smoothing=s), 6.0), (None, 0.5)):
        if objective is None:
            if name == "at":
                continue
            objective = OBJECTIVES[name](weight, s)
        ours = objective(*tensors(adv, nat, q))
        expected = reference(name, adv, nat, q, weight, s)
        np.testing.assert_allclose(ours.item(), expected, rtol=1e-12)


@pytest.mark.parametrize("s", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("weight", [0.0, 1.0, 6.0])
@every_objective
def test_is_the_equation(case, name, weight, s):
    """Eq. (1), (2) and (3), as functions and as objects."""
    adv, nat, y = case
    expected = reference(name, adv, nat, np.eye(4)[y], weight, s)
    adv, nat, y = tensors(adv, nat, y)
    if name == "at":
        ours, objective = at(adv, y, label_smoothing=s), AT(s)
    else:
        function = {"trades": trades, "mart": mart}[name]
        ours, objective = (
            function(adv, nat, y, weight, label_smoothing=s),
            OBJECTIVES[name](weight, s),
        )
    np.testing.assert_allclose(ours.item(), expected, rtol=1e-12)
    assert objective(adv, nat, y) == ours


@pytest.mark.parametrize("soft", [False, True])
def test_label_smoothing_is_torch_s(case, soft):
    adv, nat, y = tensors(*case)
    y = torch.tensor(labels()) if soft else y
    plain, smooth = (lambda z, s=s: F.cross_entropy(z, y, label_smoothing=s) for s in (0.0, 0.2))
    torch.testing.assert_close(at(adv, y, label_smoothing=0.2), smooth(adv))
    for loss, z in ((trades, nat), (mart, adv)):
        # It is the cross-entropy alone that changes.
        change = loss(adv, nat, y, label_smoothing=0.2) - loss(adv, nat, y)
        torch.testing.assert_close(change, smooth(z) - plain(z), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("s", [0.0, 0.1])
@every_objective
def test_certainty_is_the_index(case, name, s):
    adv, nat, y = tensors(*case)
    objective = OBJECTIVES[name](label_smoothing=s)
    results = []
    for target in (y, torch.eye(4)[y]):
        a, n = adv.clone().requires_grad_(), nat.clone().requires_grad_()
        loss = objective(a, n, target)
        loss.backward()
        results.append((loss.detach(), a.grad, n.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("s", [0.0, 0.1])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0])
@every_objective
def test_mixup_s_criterion(case, name, lam, s):
    adv, nat, a = tensors(*case)
    b = a.roll(1)
    one_hot = torch.eye(4, dtype=torch.float64)
    q = lam * one_hot[a] + (1 - lam) * one_hot[b]
    objective = OBJECTIVES[name](label_smoothing=s)
    both = lam * objective(adv, nat, a) + (1 - lam) * objective(adv, nat, b)
    torch.testing.assert_close(objective(adv, nat, q), both, rtol=1e-12, atol=0)


@pytest.mark.parametrize("s", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
@every_objective
def test_gradients_with_smoothing_and_probabilities(case, name, soft, s):
    adv, nat, y = tensors(*case)
    y = torch.tensor(labels()) if soft else y
    objective = OBJECTIVES[name](label_smoothing=s)
    inputs = adv.requires_grad_(), nat.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, n: objective(a, n, y), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@every_objective
def test_probabilities_of_any_dtype_go_with_logits_of_any(name, precision, dtype):
    torch.manual_seed(0)
    adv, nat = torch.randn(2, 7, 4)
    if precision != "float32":
        adv, nat = adv.bfloat16(), nat.bfloat16()
    q = (torch.randint(4, (7, 8, 1)) == torch.arange(4)).double().mean(1).to(dtype)  # exact in all
    leaves = adv.requires_grad_(), nat.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss = OBJECTIVES[name](label_smoothing=0.1)(*leaves, q)
    loss.backward()
    assert loss.dtype == torch.float32
    expected = reference(name, *(t.detach().double() for t in leaves), q.double(), s=0.1)
    # The labels may not, but what is computed of the logits may be rounded to their bfloat16.
    rtol = 1e-5 if precision == "float32" else 0.02
    assert loss.item() == pytest.approx(expected, rel=rtol)
    assert all(t.grad is None or t.grad.dtype == t.dtype for t in leaves)


@pytest.mark.parametrize("soft", [False, True])
def test_mart_where_two_classes_are_tied(soft):
    z = torch.tensor([[2.0, 2.0, 0.0]], dtype=torch.float64)
    p = softmax(z.numpy())[0]
    for k in range(3):
        y = torch.eye(3, dtype=torch.float64)[[k]] if soft else torch.tensor([k])
        expected = -np.log(p[k]) - np.log(1 - p[0])
        np.testing.assert_allclose(mart(z, z, y).item(), expected, rtol=1e-12)


@every_objective
def test_probabilities_of_another_shape_are_refused(case, name):
    adv, nat, y = tensors(*case)
    square = adv[:4], nat[:4]  # where a row would broadcast
    for logits, q in (
        ((adv, nat), y.double()),
        (square, y[:4].double()),
        ((adv, nat), torch.ones(7, 1)),
        ((adv, nat), torch.full((1, 4), 0.25)),
        ((adv, nat), torch.full((7, 5), 0.2)),
    ):
        with pytest.raises(ValueError, match=r"the shape of the logits, .*got shape.*y\.long\(\)"):
            OBJECTIVES[name]()(*logits, q)


@pytest.mark.parametrize("s", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@every_objective
def test_a_smoothing_out_of_range_is_refused(case, name, s):
    adv, nat, y = tensors(*case)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got"):
        OBJECTIVES[name](label_smoothing=s)
    call = {
        "at": lambda: at(adv, y, label_smoothing=s),
        "trades": lambda: trades(adv, nat, y, label_smoothing=s),
        "mart": lambda: mart(adv, nat, y, label_smoothing=s),
    }[name]
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got"):
        call()


def test_limits(case):
    adv, nat, y = tensors(*case)
    assert trades(adv, nat, y, beta=0.0) == F.cross_entropy(nat, y)
    torch.testing.assert_close(trades(nat, nat, y), F.cross_entropy(nat, y))
    torch.testing.assert_close(mart(nat, nat, y), mart(nat, nat, y, lam=0.0))


@pytest.mark.parametrize("s", [0.0, 0.1])
@pytest.mark.parametrize("y", [[1, 0], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], [[0.3, 0.7, 0.0]] * 2])
@pytest.mark.parametrize("loss", [trades, mart])
def test_saturated_logits_give_finite_losses_and_gradients(loss, y, s):
    adv = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]], requires_grad=True)
    nat = torch.tensor([[200.0, -200.0, 0.0], [200.0, -200.0, 0.0]], requires_grad=True)
    value = loss(adv, nat, torch.tensor(y), label_smoothing=s)
    value.backward()
    assert value.isfinite()
    assert adv.grad.isfinite().all()
    assert nat.grad.isfinite().all()


def test_each_names_what_its_step_must_know():
    assert [o.needs_natural for o in (AT(), TRADES(), MART())] == [False, True, True]
    assert [PGD(loss=o.attack_loss).loss for o in (AT(), TRADES(), MART())] == ["ce", "kl", "ce"]
    assert TRADES(3.0, 0.1) == TRADES(beta=3.0, label_smoothing=0.1) != TRADES(3.0)
    assert hash(MART(3.0, 0.1)) == hash(MART(lam=3.0, label_smoothing=0.1))
    assert AT(0.1) == AT(label_smoothing=0.1) != AT()
