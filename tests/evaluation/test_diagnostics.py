"""Defenses that mask gradients on purpose are flagged, an honest one is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from awp_optim.attacks import FGSM, PGD
from awp_optim.attacks.base import Attack
from awp_optim.evaluation import EvaluationWarning, evaluate
from awp_optim.evaluation.diagnostics import compare, probe

pytestmark = [
    pytest.mark.filterwarnings("ignore::awp_optim.evaluation.EvaluationWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


@pytest.fixture(scope="module")
def honest(digits) -> dict[str, nn.Module]:
    """Networks trained on digits, plainly and adversarially."""

    def train(adversarially: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        attack = PGD(eps=0.15, step_size=0.05, steps=5)
        x, y = digits[0][:1200], digits[1][:1200]
        for _ in range(150):
            z = attack(model, x, y) if adversarially else x
            optimizer.zero_grad()
            F.cross_entropy(model(z), y).backward()
            optimizer.step()
        return model.eval()

    with torch.random.fork_rng():
        return {"natural": train(False), "adversarial": train(True)}


def checks(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> set[str]:
    return {finding.check for finding in probe(model, x, y)}


@pytest.mark.parametrize("how", ["natural", "adversarial"])
def test_an_honest_network_is_not_flagged(how, honest, digits):
    model, x, y = honest[how], digits[0][1200:], digits[1][1200:]
    eps = 0.1
    attacks = {
        "fgsm": FGSM(eps),
        "pgd20": PGD(eps, eps / 4, 20),
        "pgd100": PGD(eps, eps / 4, 100),
        "restarts": PGD(eps, eps / 4, 20, restarts=3),
    }
    r = evaluate(model, (x, y), attacks)  # a warning would be an error here
    assert r.warnings == ()
    assert r.natural > 0.85
    if how == "adversarial":
        assert r.robust["pgd20"] > 0.4
        assert r.robust["fgsm"] > r.robust["pgd20"] - 0.01


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return (z * 8).round() / 8

    @staticmethod
    def backward(ctx, g):
        return g


HONEST = {
    "log-probabilities": lambda m: lambda z: m(z).log_softmax(1),
    "inputs without influence": lambda m: lambda z: m(z * (torch.arange(64) % 2)),
    "rounding with a straight-through gradient": lambda m: lambda z: m(Round.apply(z)),
}


@pytest.mark.parametrize("name", HONEST)
def test_what_attacks_see_through_is_not_flagged(name, honest, digits):
    assert not checks(HONEST[name](honest["natural"]), digits[0][:64], digits[1][:64])


DEFENSES = {
    "quantized input": (lambda m: lambda z: m((z * 8).round() / 8), {"vanishing", "unbounded"}),
    "saturated softmax": (lambda m: lambda z: m(z) * 1e3, {"saturated"}),
    "probabilities": (lambda m: lambda z: m(z).softmax(1), {"probabilities"}),
    "saturated probabilities": (
        lambda m: lambda z: (m(z) * 1e3).softmax(1),
        {"probabilities", "vanishing", "unbounded"},
    ),
    "no gradient": (lambda m: lambda z: m(z.detach()), {"no_gradient"}),
    "noise": (lambda m: lambda z: m(z + 0.1 * torch.randn_like(z)), {"random"}),
    "dropout": (lambda m: lambda z: m(F.dropout(z, 0.3)), {"random", "random_gradient"}),
    "sign": (lambda m: lambda z: m(z.sub(0.5).sign()), {"vanishing", "unbounded"}),
    "not finite": (
        lambda m: lambda z: m(z) + (z - z.detach()).abs().sqrt().sum(1, True),
        {"not_finite"},
    ),
}


@pytest.mark.parametrize("name", DEFENSES)
def test_a_masked_gradient_is_flagged(name, honest, digits):
    defend, expected = DEFENSES[name]
    found = checks(defend(honest["natural"]), digits[0][:64], digits[1][:64])
    assert expected <= found
    if name in ("saturated softmax", "probabilities", "no gradient"):
        assert found == expected


def test_evaluate_says_it(honest, digits):
    model = honest["natural"]
    with pytest.warns(EvaluationWarning, match="vanishing.*BPDA"):
        r = evaluate(
            lambda z: model((z * 8).round() / 8),
            (digits[0][:100], digits[1][:100]),
            {"pgd": PGD(0.2, 0.05, 10)},
        )
    assert r.robust["pgd"] > 0.5  # which looks fine
    assert {"vanishing", "unbounded"} <= {f.check for f in r.warnings}
    quiet = evaluate(
        lambda z: model((z * 8).round() / 8), (digits[0][:9], digits[1][:9]), {}, checks=False
    )
    assert quiet.warnings == ()


class Blind(Attack):
    """An attack without gradients."""

    uses_gradients = False
    clip, model_mode, eps, norm = (0, 1), "eval", 0.1, "linf"

    def run(self, oracle, x, y):
        raise NotImplementedError


class Did:
    """An outcome on a hundred examples: the first and the last of those broken."""

    def __init__(self, lo: int, hi: int, attacked: int = 100) -> None:
        at = np.arange(100)
        self.attacked = at < attacked
        self.fooled = (at >= lo) & (at < hi)


def compared(**attacks) -> list[str]:
    return [
        f.check
        for f in compare(
            {k: a for k, (a, _) in attacks.items()}, {k: o for k, (_, o) in attacks.items()}
        )
    ]


PGD20, PGD100 = PGD(0.1, 0.01, 20), PGD(0.1, 0.01, 100)


@pytest.mark.parametrize(
    ("attacks", "expected"),
    [
        ({"fgsm": (FGSM(0.1), Did(0, 10)), "pgd": (PGD20, Did(0, 30))}, []),
        ({"fgsm": (FGSM(0.1), Did(28, 33)), "pgd": (PGD20, Did(0, 30))}, ["one_step"]),
        ({"fgsm": (FGSM(0.1), Did(28, 32)), "pgd": (PGD20, Did(0, 30))}, []),  # two are chance
        ({"fgsm": (FGSM(0.2), Did(28, 40)), "pgd": (PGD20, Did(0, 30))}, []),  # a larger ball
        ({"one": (PGD(0.1, 0.1, 1), Did(30, 40)), "pgd": (PGD20, Did(0, 30))}, ["one_step"]),
        ({"blind": (Blind(), Did(0, 20)), "pgd": (PGD20, Did(0, 30))}, []),
        ({"blind": (Blind(), Did(0, 40)), "pgd": (PGD20, Did(0, 30))}, ["black_box"]),
        # Where no gradient attack was run, nothing is known of it.
        ({"blind": (Blind(), Did(0, 40)), "pgd": (PGD20, Did(0, 30, attacked=30))}, []),
        ({"blind": (Blind(), Did(0, 40))}, []),
        ({"pgd20": (PGD20, Did(0, 30)), "pgd100": (PGD100, Did(0, 32))}, []),
        ({"pgd20": (PGD20, Did(0, 30)), "pgd100": (PGD100, Did(0, 36))}, ["steps"]),
        ({"pgd20": (PGD20, Did(0, 30)), "pgd100": (PGD100, Did(0, 10))}, []),
        (
            {"pgd": (PGD20, Did(0, 30)), "more": (PGD(0.1, 0.01, 20, restarts=5), Did(0, 36))},
            ["restarts"],
        ),
        # Of the first, more restarts alone would not be an attack.
        (
            {
                "pgd": (PGD(0.1, 0.01, 20, random_start=False), Did(0, 30)),
                "more": (PGD(0.1, 0.01, 20, restarts=5), Did(0, 36)),
            },
            [],
        ),
        ({"own": (lambda m, x, y: x, Did(0, 90)), "pgd": (PGD20, Did(0, 30))}, []),
    ],
)
def test_attacks_that_do_better_than_stronger_ones(attacks, expected):
    assert compared(**attacks) == expected
