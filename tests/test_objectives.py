"""Objectives against their formulas in float64 and the limits that must hold."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from awp_optim.attacks import PGD
from awp_optim.objectives import AT, GKL, MART, SCORE, TRADES, at, gkl, mart, score, trades


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
    if name == "gkl":
        return naive_gkl(*map(torch.tensor, (adv, nat, q)), 4.0, 20.0, s=s).item()
    if name == "score":
        target = (1 - s) * q + s / q.shape[1]
        return (((p_nat - target) ** 2).sum(1) + 4.0 * ((p - p_nat) ** 2).sum(1)).mean()
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


def naive_gkl(adv, nat, q, alpha, beta, weights=None, s=0.0):
    """As the authors write it: with the N x C x C differences of logits and products of weights."""
    n, classes = nat.shape
    weights = torch.ones(classes, classes) / classes if weights is None else weights
    w = q.double() @ weights.double()
    pairs = w[:, :, None] * w[:, None, :]
    of_nat, of_adv = (z[:, :, None] - z[:, None, :] for z in (nat, adv))
    mse = 0.25 * (pairs * (of_nat - of_adv) ** 2).sum() / pairs.sum()
    imitation = -(nat.detach().softmax(1) * adv.log_softmax(1)).sum() / n
    smooth = (1 - s) * q + s / classes
    natural = -(smooth * nat.log_softmax(1)).sum() / n
    return natural + alpha * imitation + beta * mse


OBJECTIVES = {"at": AT, "trades": TRADES, "mart": MART}
EVERY = {**OBJECTIVES, "gkl": GKL, "score": SCORE}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
every_one = pytest.mark.parametrize("name", EVERY)


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
@every_one
def test_certainty_is_the_index(case, name, s):
    adv, nat, y = tensors(*case)
    objective = EVERY[name](label_smoothing=s)
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
@every_one
def test_probabilities_of_any_dtype_go_with_logits_of_any(name, precision, dtype):
    torch.manual_seed(0)
    adv, nat = torch.randn(2, 7, 4)
    if precision != "float32":
        adv, nat = adv.bfloat16(), nat.bfloat16()
    q = (torch.randint(4, (7, 8, 1)) == torch.arange(4)).double().mean(1).to(dtype)  # exact in all
    leaves = adv.requires_grad_(), nat.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss = EVERY[name](label_smoothing=0.1)(*leaves, q)
    loss.backward()
    assert loss.dtype == torch.float32
    expected = reference(name, *(t.detach().double() for t in leaves), q.double(), s=0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert all(t.grad is None or t.grad.dtype == t.dtype for t in leaves)


@pytest.mark.parametrize("soft", [False, True])
def test_mart_where_two_classes_are_tied(soft):
    z = torch.tensor([[2.0, 2.0, 0.0]], dtype=torch.float64)
    p = softmax(z.numpy())[0]
    for k in range(3):
        y = torch.eye(3, dtype=torch.float64)[[k]] if soft else torch.tensor([k])
        expected = -np.log(p[k]) - np.log(1 - p[0])
        np.testing.assert_allclose(mart(z, z, y).item(), expected, rtol=1e-12)


@every_one
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
            EVERY[name]()(*logits, q)


@pytest.mark.parametrize("s", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@every_one
def test_a_smoothing_out_of_range_is_refused(case, name, s):
    adv, nat, y = tensors(*case)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got"):
        EVERY[name](label_smoothing=s)
    call = {
        "at": lambda: at(adv, y, label_smoothing=s),
        "trades": lambda: trades(adv, nat, y, label_smoothing=s),
        "mart": lambda: mart(adv, nat, y, label_smoothing=s),
        "gkl": lambda: gkl(adv, nat, y, label_smoothing=s),
        "score": lambda: score(adv, nat, y, label_smoothing=s),
    }[name]
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got"):
        call()


# --- GKL and SCORE ----------------------------------------------------------------------------


def class_weights(classes=4, power=1.0):
    """Uneven, and with a power that leaves rows of different sums."""
    return torch.tensor(np.random.default_rng(5).dirichlet(np.ones(classes), classes)) ** power


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("alpha", "beta"), [(4.0, 20.0), (0.0, 1.0), (1.0, 0.0)])
def test_gkl_and_its_gradients_are_those_of_all_pairs(case, alpha, beta, soft, power):
    """gradcheck cannot tell: a constant of the loss depends on the natural logits."""
    adv, nat, y = tensors(*case)
    y, weights = torch.tensor(labels()) if soft else y, class_weights(power=power)
    q = y if soft else torch.eye(4, dtype=torch.float64)[y]
    results = []
    for loss in (
        lambda a, n: GKL(alpha, beta, 0.1, weights)(a, n, y),
        lambda a, n: naive_gkl(a, n, q, alpha, beta, weights, 0.1),
    ):
        a, n = adv.clone().requires_grad_(), nat.clone().requires_grad_()
        value = loss(a, n)
        results.append((value.detach(), *torch.autograd.grad(value, (a, n))))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_gkl_with_equal_logits_is_two_cross_entropies(case):
    _, nat, y = tensors(*case)
    p = nat.softmax(1)
    expected = F.cross_entropy(nat, y) - 4 * (p * p.log()).sum(1).mean()
    torch.testing.assert_close(gkl(nat, nat, y), expected)
    # A shift of all logits of an example is no difference between two of them.
    torch.testing.assert_close(gkl(nat + 7, nat, y), expected)


def test_gkl_reads_the_weights_that_were_written_last(case):
    adv, nat, y = tensors(*case)
    probs = torch.full((4, 4), 0.25, dtype=torch.float64)
    objective = GKL(class_probs=probs)
    assert objective(adv, nat, y) == gkl(adv, nat, y)
    probs.copy_(class_weights())
    assert objective(adv, nat, y) == gkl(adv, nat, y, class_probs=class_weights())


@pytest.mark.parametrize("shape", [(4,), (3, 3), (4, 5), (1, 4)])
def test_gkl_wants_weights_for_every_class(case, shape):
    with pytest.raises(ValueError, match=r"class_probs .* 4 classes, shape \(4, 4\)"):
        gkl(*tensors(*case), class_probs=torch.ones(shape))


@pytest.mark.parametrize("s", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("beta", "c"), [(4.0, 0.0), (2.0, 0.1), (0.0, 0.0)])
def test_score_is_its_equation_with_its_gradients(case, beta, c, soft, s):
    adv, nat, y = case
    q = labels() if soft else np.eye(4)[y]
    p, p_nat, target = softmax(adv), softmax(nat), (1 - s) * q + s / 4
    change = ((p - p_nat) ** 2).sum(1)
    assert (change > c).any()
    assert c == 0 or (change < c).any()
    expected = ((p_nat - target) ** 2).sum(1) + beta * np.maximum(change - c, 0)
    adv, nat, y = tensors(adv, nat, q if soft else y)
    ours = score(adv, nat, y, beta, c, label_smoothing=s)
    np.testing.assert_allclose(ours.item(), expected.mean(), rtol=1e-12)
    objective = SCORE(beta, c, s)
    assert objective(adv, nat, y) == ours
    inputs = adv.requires_grad_(), nat.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, n: objective(a, n, y), inputs)


def test_score_of_soft_labels_is_the_expectation_but_for_a_constant(case):
    adv, nat, _ = tensors(*case)
    q = torch.tensor(labels())
    one_by_one = [
        sum(q[i, k] * score(adv[[i]], nat[[i]], torch.tensor([k])) for k in range(4))
        for i in range(7)
    ]
    constant = (1 - q.square().sum(1)).mean()
    torch.testing.assert_close(score(adv, nat, q) + constant, sum(one_by_one) / 7)


def test_limits(case):
    adv, nat, y = tensors(*case)
    assert trades(adv, nat, y, beta=0.0) == F.cross_entropy(nat, y)
    torch.testing.assert_close(trades(nat, nat, y), F.cross_entropy(nat, y))
    torch.testing.assert_close(mart(nat, nat, y), mart(nat, nat, y, lam=0.0))


@pytest.mark.parametrize("s", [0.0, 0.1])
@pytest.mark.parametrize("y", [[1, 0], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], [[0.3, 0.7, 0.0]] * 2])
@pytest.mark.parametrize("loss", [trades, mart, gkl, score])
def test_saturated_logits_give_finite_losses_and_gradients(loss, y, s):
    adv = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]], requires_grad=True)
    nat = torch.tensor([[200.0, -200.0, 0.0], [200.0, -200.0, 0.0]], requires_grad=True)
    value = loss(adv, nat, torch.tensor(y), label_smoothing=s)
    value.backward()
    assert value.isfinite()
    assert adv.grad.isfinite().all()
    assert nat.grad.isfinite().all()


def test_each_names_what_its_step_must_know():
    known = {AT(): "ce", TRADES(): "kl", MART(): "ce", GKL(): "kl", SCORE(): "score"}
    assert {o: PGD(loss=o.attack_loss).loss for o in known} == known
    assert [o for o in known if not o.needs_natural] == [AT()]
    assert TRADES(3.0, 0.1) == TRADES(beta=3.0, label_smoothing=0.1) != TRADES(3.0)
    assert hash(MART(3.0, 0.1)) == hash(MART(lam=3.0, label_smoothing=0.1))
    assert AT(0.1) == AT(label_smoothing=0.1) != AT()
    assert GKL(4.0, 20.0) == GKL() != GKL(5.0)
    assert SCORE(4.0, 0.0) == SCORE() != SCORE(4.0, 0.1)
