"""Auto-PGD against the authors' implementation, the paper's schedule and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awp_optim.attacks import APGD, Captured
from awp_optim.attacks.apgd import _Halving, _Sparse, _State, checkpoints
from awp_optim.attacks.balls import BALLS
from awp_optim.attacks.losses import LOSSES, dlr_targeted

from .conftest import images, radius, seeded, small_cnn, wrong

EPS = {"linf": 0.012, "l2": 0.1, "l1": 0.5}
NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class TestSchedule:
    def test_of_the_paper(self):
        """Section 3.1: p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06), from 0 and 0.22."""
        p = [0, 22]
        while p[-1] + max(p[-1] - p[-2] - 3, 6) <= 100:
            p.append(p[-1] + max(p[-1] - p[-2] - 3, 6))
        assert checkpoints(100) == p[1:] == [22, 41, 57, 70, 80, 87, 93, 99]

    @pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 50, 1000])
    def test_of_any_length(self, steps):
        at = checkpoints(steps)
        assert 1 <= at[0] <= max(1, 0.22 * steps)
        assert at[-1] <= steps
        periods = [b - a for a, b in zip([0, *at], at)]
        assert periods == sorted(periods, reverse=True)
        assert min(periods) >= 1


def state(**fields) -> _State:
    """Of four examples of three elements, at 0.5; the best point is at 0.6 in one element."""
    x = torch.full((4, 3), 0.5)
    s = _State.at(x, torch.zeros(4).long(), torch.zeros(4).long(), x + 0.3)
    s.best = x + torch.tensor([0.1, 0, 0])
    for name, value in fields.items():
        setattr(s, name, torch.tensor(value))
    return s


class TestStep:
    def test_is_halved_where_it_does_not_help(self):
        """By 12 rises of 16 steps at rho 0.75; or if nothing was gained since it was not halved."""
        s = state(
            step=[1.0] * 4,
            rises=[12.0, 13.0, 16.0, 16.0],
            not_halved=[False, True, True, False],
            checkpoint_loss=[1.0, 1.0, 2.0, 2.0],
            best_loss=[2.0] * 4,
        )
        rule = _Halving(BALLS["linf"], 0.1, 100, 0.75)
        rule.check(s, 57)  # 41 was the checkpoint before
        assert s.step.tolist() == [0.5, 1.0, 0.5, 1.0]
        assert s.not_halved.tolist() == [False, True, False, True]
        assert s.checkpoint_loss.tolist() == [2.0] * 4
        assert s.rises.tolist() == [0.0] * 4
        back = (s.x_adv == s.best).all(1)
        assert back.tolist() == [True, False, True, False]

    def test_in_l1_starts_again_where_the_best_point_got_sparser(self):
        s = state(step=[1.0, 0.9, 1.0, 0.1], changed=[3.0, 2.0, 1.0, 1.0])
        _Sparse(1.0, 100).check(s, 4)
        torch.testing.assert_close(s.step, torch.tensor([1.0, 1.0, 1 / 1.5, 0.1]))
        assert s.changed.tolist() == [1.0] * 4
        torch.testing.assert_close(s.sparsity, torch.full((4,), 1 / 3 / 1.5))
        back = (s.x_adv == s.best).all(1)
        assert back.tolist() == [True, True, False, False]


def by_the_authors(model, x: Tensor, y: Tensor, norm: str, eps: float, loss: str) -> Tensor:
    """100 steps of their attack from seed 3, which draws a start for what the model gets right."""
    autopgd = pytest.importorskip("pyautoattack.autopgd_base")
    common = {"n_iter": 100, "norm": NORM[norm], "eps": eps, "seed": 3, "device": "cpu"}
    common |= {"use_largereps": norm == "l1"}
    if loss == "dlr-targeted":
        attack = autopgd.APGDAttack_targeted(model, n_target_classes=1, **common)
    else:
        attack = autopgd.APGDAttack(model, loss=loss, **common)
    return attack.perturb(x, y).detach()


def as_the_authors_count(monkeypatch) -> None:
    """Their first checkpoint compares the first loss with zero, not with the one at the start."""
    begin = _Halving.begin

    def begin_at_zero(self, s):
        begin(self, s)
        s.loss = torch.zeros_like(s.loss)

    monkeypatch.setattr(_Halving, "begin", begin_at_zero)


@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
@pytest.mark.parametrize("norm", EPS)
def test_equals_the_authors(norm, loss, solid, monkeypatch):
    """From one seed, the same images are fooled, at the same points but for rounding.

    In L1 the points differ: the authors count elements that rounding changed.
    """
    model, x, y = solid()
    right = ~wrong(model, x, y)
    x, y = x[right], y[right]
    reference = by_the_authors(model, x, y, norm, EPS[norm], loss)
    fooled = wrong(model, reference, y)
    assert 0.2 < fooled.float().mean() < 0.9
    ours = seeded(3, APGD(EPS[norm], 100, norm, loss, targets=1), model, x, y)
    assert (wrong(model, ours, y) != fooled).sum() <= 1
    if norm == "l1":
        return
    as_the_authors_count(monkeypatch)
    ours = seeded(3, APGD(EPS[norm], 100, norm, loss, targets=1), model, x, y)
    assert torch.equal(wrong(model, ours, y), fooled)
    apart = (ours - reference).abs().flatten(1).amax(1)[fooled]
    # A few move apart: the sign of a gradient near zero is that of its rounding.
    assert (apart < 1e-4).float().mean() > 0.75, apart


class TestClosedForms:
    """Where every loss falls with w.x, the optimum is known."""

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize("loss", ["ce", "cw"])
    def test_of_a_linear_model(self, norm, loss):
        g = torch.Generator().manual_seed(0)
        w = torch.randn(10, generator=g, dtype=torch.float64)
        x = torch.rand(7, 10, generator=g, dtype=torch.float64)
        if norm == "l2":
            x = 0.4 + 0.2 * x  # the box out of reach
        found = APGD(0.3, 100, norm, loss)(always_0(w), x, torch.zeros(7).long()) @ w
        best = (x - 0.3 * w.sign()).clamp(0, 1) @ w if norm == "linf" else x @ w - 0.3 * w.norm()
        torch.testing.assert_close(found, best, atol=1e-6, rtol=0)

    def test_of_a_linear_model_in_l1(self):
        """The steepest coordinates first, as far as the box lets them; sparse steps get near."""
        g = torch.Generator().manual_seed(0)
        w = torch.randn(300, generator=g, dtype=torch.float64)
        x = torch.rand(7, 300, generator=g, dtype=torch.float64)
        y = torch.zeros(7).long()
        found = APGD(3.0, 100, "l1")(always_0(w, 140), x, y) @ w
        best = torch.stack([l1_least(w, row, 3.0) for row in x])
        assert (found >= best - 1e-9).all()
        reached = (x @ w - found) / (x @ w - best)
        assert (reached > 0.85).all()

    def test_of_a_linear_model_in_l1_as_the_authors(self, monkeypatch):
        autopgd = pytest.importorskip("pyautoattack.autopgd_base")
        g = torch.Generator().manual_seed(0)
        w, x = torch.randn(60, generator=g), torch.rand(7, 60, generator=g)
        model, y = always_0(w, 60), torch.zeros(7).long()
        # They return x itself where nothing is fooled.
        monkeypatch.setattr(autopgd.APGDAttack, "attack_single_run", best_for_fooled(autopgd))
        theirs = by_the_authors(model, x, y, "l1", 1.0, "ce") @ w
        ours = seeded(3, APGD(1.0, 100, "l1"), model, x, y) @ w
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def best_for_fooled(autopgd):
    """Their run, saying that all are fooled, at the best points."""
    run = autopgd.APGDAttack.attack_single_run

    def patched(self, x, y, x_init=None):
        best, acc, loss, _ = run(self, x, y, x_init)
        return best, torch.zeros_like(acc), loss, best

    return patched


def always_0(w: Tensor, margin: float = 8):
    """Always class 0, less surely as w.x falls; flat enough for a cross-entropy that is not 0."""
    return lambda z: 0.1 * torch.stack([z @ w + margin, 0 * (z @ w)], 1)


def l1_least(w: Tensor, x: Tensor, eps: float) -> Tensor:
    z, left = x.clone(), eps
    for i in w.abs().argsort(descending=True):
        room = x[i] if w[i] > 0 else 1 - x[i]
        move = min(left, float(room))
        z[i] -= move * w[i].sign()
        left -= move
    return z @ w


class TestContract:
    @pytest.mark.parametrize("norm", EPS)
    def test_what_is_misclassified_already_is_returned_unchanged(self, norm, solid):
        model, x, y = solid()
        x_adv = APGD(EPS[norm], 5, norm)(model, x, y)
        assert torch.equal(x_adv[-2:], x[-2:])

    @pytest.mark.parametrize("norm", EPS)
    @pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
    def test_dropping_fools_the_same(self, norm, loss, solid):
        model, x, y = solid()
        ends = []
        for drop in (False, True):
            attack = APGD(EPS[norm], 20, norm, loss, restarts=2, drop_fooled=drop)
            ends.append(seeded(0, attack, model, x, y))
        every, fewer = ends
        fooled = wrong(model, every, y)
        assert 0.2 < fooled.float().mean() < 0.95
        assert torch.equal(wrong(model, fewer, y), fooled)
        torch.testing.assert_close(fewer[~fooled], every[~fooled], atol=1e-6, rtol=0)

    def test_dropping_saves_passes(self, solid):
        model, x, y = solid()
        shown = []
        model.register_forward_pre_hook(lambda m, inputs: shown.append(len(inputs[0])))
        APGD(0.012, 20)(model, x, y)
        every = sum(shown)
        assert every == len(x) * (1 + 20 + 1)
        shown.clear()
        APGD(0.012, 20, drop_fooled=True)(model, x, y)
        assert sum(shown) < 0.8 * every

    @pytest.mark.parametrize("norm", EPS)
    def test_no_example_depends_on_the_others(self, norm, monkeypatch, solid):
        model, x, y = solid(6)
        model, x = model.double(), x.double()
        start = torch.randn(6, 3, 8, 8, dtype=torch.float64)
        attack = APGD(EPS[norm], 15, norm)
        together = run_from(monkeypatch, attack, model, x, y, start)
        alone = [
            run_from(monkeypatch, attack, model, *e)
            for e in zip(*(t.split(1) for t in (x, y, start)))
        ]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-9, rtol=0)

    def test_more_restarts_never_lose_an_example(self, solid):
        model, x, y = solid()
        one, three = (
            wrong(model, seeded(0, APGD(0.01, 8, restarts=n), model, x, y), y) for n in (1, 3)
        )
        assert (three | ~one).all()

    def test_of_the_others_it_keeps_the_highest_loss(self, solid):
        model, x, y = solid()
        seen = []

        def watched(z: Tensor) -> Tensor:
            logits = model(z)
            seen.append(LOSSES["ce"](logits.detach(), y))
            return logits

        x_adv = APGD(0.003, 20)(watched, x, y)
        stood = ~wrong(model, x_adv, y)
        assert stood.any()
        best = torch.stack(seen[1:]).amax(0)  # the first is of x itself
        with torch.no_grad():
            got = LOSSES["ce"](model(x_adv), y)
        torch.testing.assert_close(got[stood], best[stood])

    def test_captured(self, cpu_graphs, solid):
        model, x, y = solid(6)
        attack = Captured(APGD(0.03, 12, "linf", "dlr-targeted", targets=2))
        for _ in range(5):
            x_adv = attack(model, x, y)
            assert (radius(x, x_adv, "linf") <= 0.03 * (1 + 1e-6)).all()
        assert (cpu_graphs.captures, cpu_graphs.replays) == (1, 3)

    @pytest.mark.parametrize("norm", EPS)
    @pytest.mark.parametrize("kind", ["nan", "inf", "zero"])
    def test_dropping_from_a_model_that_blows_up(self, norm, kind):
        w, x, y = torch.randn(12, 5), torch.rand(4, 12), torch.tensor([0, 1, 2, 0])
        scale = {"nan": torch.nan, "inf": torch.inf, "zero": 0.0}[kind]
        x_adv = APGD(0.1, 10, norm, "dlr-targeted", drop_fooled=True)(lambda z: z @ w * scale, x, y)
        assert ((x_adv >= 0) & (x_adv <= 1)).all()
        assert (radius(x, x_adv, norm) <= 0.1 * (1 + 1e-6)).all()

    @pytest.mark.parametrize("order", [(torch.nan, 1.0), (1.0, torch.nan)])
    def test_the_best_point_is_never_one_of_a_loss_that_is_not_a_number(self, order):
        s = _State.at(
            torch.zeros(1, 3), torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1, 3)
        )
        for loss in order:
            s.x_adv = torch.full((1, 3), loss)
            s.update(torch.tensor([[1.0, 0.0]]), torch.tensor([loss]), s.x_adv)
        for found in (s.best, s.best_g, s.best_loss):
            assert (found == 1).all()


def run_from(monkeypatch, attack: APGD, model, x, y, start: Tensor) -> Tensor:
    """From a start of one's own."""
    with monkeypatch.context() as m:
        scale = attack.eps / radius(x, x + start, attack.norm).view(-1, 1, 1, 1)
        m.setattr(APGD, "_start", lambda self, x: start * scale)
        return attack(model, x, y)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "error", "words"),
        [
            ({"steps": 0}, ValueError, "steps"),
            ({"steps": 2, "norm": "l1"}, ValueError, "steps.*3"),
            ({"restarts": 0}, ValueError, "restarts"),
            ({"targets": 0}, ValueError, "targets"),
            ({"rho": 1.5}, ValueError, "rho"),
            ({"loss": "kl"}, ValueError, "loss"),
            ({"norm": "l0"}, ValueError, "norm.*'l1'"),
            ({"drop_fooled": 1}, TypeError, "drop_fooled"),
        ],
    )
    def test_wrong_ones(self, settings, error, words):
        with pytest.raises(error, match=words):
            APGD(**settings)

    def test_as_many_targets_as_there_are_wrong_classes(self):
        model, (x, _) = small_cnn(classes=4), images(3)
        calls = []
        model.register_forward_hook(lambda *a: calls.append(1))
        APGD(loss="dlr-targeted", steps=5, targets=9)(model, x, model(x).argmax(1))
        assert len(calls) == 1 + 1 + 3 * 6


class TestTargetedLoss:
    def test_is_the_formula(self):
        z = torch.randn(9, 6, dtype=torch.float64)
        y, t = torch.randint(6, (9,)), torch.randint(6, (9,))
        top = z.sort(1, descending=True).values
        n = torch.arange(9)
        expected = -(z[n, y] - z[n, t]) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2)
        torch.testing.assert_close(dlr_targeted(z, y, t), expected)
        torch.testing.assert_close(dlr_targeted(3 * z + 5, y, t), expected)
