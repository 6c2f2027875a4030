"""Landscapes against closed forms and loops of their own, and every way they can go wrong."""

from __future__ import annotations

import copy
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from awp_optim import AWP
from awp_optim.attacks import FGSM, PGD, Captured
from awp_optim.landscape import (
    LossCurve,
    LossSurface,
    awp_direction,
    filter_normalized_direction,
    loss_curve,
    loss_surface,
    rwp_direction,
)

ALPHAS = [-1.0, -0.5, 0.0, 0.25, 1.0]
ATTACK = PGD(eps=0.1, step_size=0.04, steps=4)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """In every test."""


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(64, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3),
        )  # fmt: skip
        with torch.no_grad():
            model(torch.rand(64, 2, 4, 4))  # statistics of BatchNorm
        return model.eval()


def images(n: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 2, 4, 4, generator=g), torch.randint(3, (n,), generator=g)


def gaussian(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    return filter_normalized_direction(model, torch.Generator().manual_seed(seed))


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def assert_equal(a: LossCurve | LossSurface, b: LossCurve | LossSurface) -> None:
    assert a.to_dict() == b.to_dict()


class Moved(nn.Module):
    """A copy of a model at w + alpha d: the plain way."""

    def __new__(cls, model: nn.Module, d: dict[str, Tensor], alpha: float) -> nn.Module:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p += alpha * d[name]
        return moved


# --- Directions -------------------------------------------------------------------------------


class TestFilterNormalized:
    def test_a_filter_is_as_long_as_the_models(self):
        model = network()
        d = gaussian(model)
        assert set(d) == {name for name, _ in model.named_parameters()}
        for name in ("0.weight", "4.weight", "7.weight"):
            for filter_, own in zip(d[name], model.get_parameter(name)):
                assert torch.allclose(filter_.norm(), own.norm(), rtol=1e-6)
        # and as wide: not the sign or the constant of something
        assert 0.7 < d["4.weight"].std() / model[4].weight.std() < 1.4

    def test_zero_for_biases_and_norm_layers(self):
        model = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm((4, 4)), nn.GroupNorm(2, 4),
            nn.RMSNorm((2, 4)), nn.InstanceNorm1d(4, affine=True),
        )  # fmt: skip
        d = gaussian(model)
        assert {name for name, t in d.items() if t.any()} == {"0.weight"}
        assert set(d) == {name for name, _ in model.named_parameters()}

    @pytest.mark.parametrize("groups", [1, 2])
    def test_a_filter_of_a_transposed_convolution_is_of_an_output_channel(self, groups):
        model = nn.ConvTranspose2d(4, 6, 3, groups=groups)
        d = gaussian(model)["weight"]
        each = 6 // groups
        for out in range(6):
            g, j = divmod(out, each)
            rows = slice(g * 4 // groups, (g + 1) * 4 // groups)
            assert torch.allclose(d[rows, j].norm(), model.weight[rows, j].norm(), rtol=1e-5)

    def test_the_same_seed_the_same_direction(self):
        model = network()
        first, again, other = gaussian(model), gaussian(model), gaussian(model, 1)
        assert all(torch.equal(first[k], again[k]) for k in first)
        assert not torch.equal(first["0.weight"], other["0.weight"])
        torch.manual_seed(3)
        a = filter_normalized_direction(model)
        torch.manual_seed(3)
        b = filter_normalized_direction(model)
        assert torch.equal(a["4.weight"], b["4.weight"])

    def test_zero_filters_stay_zero(self):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            model.weight[0] = 0
        d = gaussian(model)["weight"]
        assert not d[0].any()
        assert d[1].isfinite().all()
        assert d[1].any()

    def test_tied_weights_count_once(self):
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        model[1].weight = model[0].weight
        assert list(gaussian(model)) == ["0.weight"]

    def test_half_precision_gets_a_direction_in_float32(self):
        model = nn.Linear(3, 2).bfloat16()
        d = gaussian(model)["weight"]
        assert d.dtype == torch.float32
        assert torch.allclose(d.norm(dim=1), model.weight.float().norm(dim=1), rtol=1e-6)

    def test_a_model_without_weights_is_an_error(self):
        with pytest.raises(ValueError, match="zero"):
            gaussian(nn.BatchNorm1d(3))
        with pytest.raises(ValueError, match="lazy"):
            gaussian(nn.LazyLinear(3))


class TestPerturbationsOfTraining:
    def test_awp_is_eq_10(self):
        model, (x, y) = network().double(), images()
        x = x.double()
        d = awp_direction(model, (x, y), FGSM(eps=0.1), batch_size=16)
        x_adv = FGSM(eps=0.1)(model, x, y)
        F.cross_entropy(model(x_adv), y).backward()
        assert set(d) == {"0.weight", "4.weight", "7.weight"}
        for name, v in d.items():
            p = model.get_parameter(name)
            torch.testing.assert_close(v, p.norm() * p.grad / p.grad.norm(), rtol=1e-9, atol=0)

    def test_rwp_is_as_long_as_the_weights(self):
        model = network()
        d = rwp_direction(model, torch.Generator().manual_seed(0))
        assert set(d) == {"0.weight", "4.weight", "7.weight"}
        for name, v in d.items():
            assert torch.allclose(v.norm(), model.get_parameter(name).norm(), rtol=1e-5)
        again = rwp_direction(model, torch.Generator().manual_seed(0))
        assert torch.equal(d["4.weight"], again["4.weight"])

    def test_they_leave_the_model_as_it_was(self):
        model = network().train()
        model[4].eval()
        before = everything(model)
        awp_direction(model, images(), PGD(steps=1, model_mode="train"))
        rwp_direction(model)
        assert_same(model, before)
        assert model.training
        assert not model[4].training
        assert all(p.grad is None for p in model.parameters())

    def test_awp_raises_the_loss_more_than_random_directions(self):
        model, data = network(), images()
        adversarial = loss_curve(model, data, ATTACK, [0.05], awp_direction(model, data, ATTACK))
        random = loss_curve(
            model, data, ATTACK, [0.05],
            [rwp_direction(model, torch.Generator().manual_seed(i)) for i in range(5)],
        )  # fmt: skip
        assert adversarial.sharpness(0.05).mean > 2 * random.sharpness(0.05).worst > 0

    def test_the_optimizers_own_perturbation_is_a_direction(self):
        model, (x, y) = network(), images()
        opt = AWP(model.parameters(), torch.optim.SGD, gamma=0.05, lr=0.1)
        F.cross_entropy(model(x), y).backward()
        with opt.perturbed():
            v = opt.perturbation()
            with torch.no_grad():
                there = F.cross_entropy(model(x), y).item()
        c = loss_curve(model, (x, y), FGSM(eps=0.0), [1.0], v)
        assert c.nat_loss[0] == pytest.approx(there, rel=1e-6)
        assert c.adv_loss[0] == c.nat_loss[0]

    def test_frozen_weights_do_not_move(self):
        model = network()
        model[4].weight.requires_grad_(False)
        assert set(awp_direction(model, images(), ATTACK)) == {"0.weight", "7.weight"}
        for p in model.parameters():
            p.requires_grad_(False)
        with pytest.raises(ValueError, match="require gradients"):
            awp_direction(model, images(), ATTACK)

    def test_a_zero_gradient_is_an_error(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
        with torch.no_grad():
            model[1].weight.zero_()
        with pytest.raises(ValueError, match="no adversarial direction"):
            awp_direction(model, images(), FGSM(eps=0.0))


# --- Closed forms -----------------------------------------------------------------------------


class Parabola(nn.Module):
    """Its cross-entropy is 1/2 (w - b) H (w - b) + 1, whatever the input."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        a = torch.randn(6, 6, generator=g, dtype=torch.float64)
        self.H = a @ a.T
        self.b = torch.randn(6, generator=g, dtype=torch.float64)
        self.w = nn.Parameter(torch.randn(2, 3, generator=g, dtype=torch.float64))

    def loss(self, w: Tensor) -> Tensor:
        return 0.5 * (w.flatten() - self.b) @ self.H @ (w.flatten() - self.b) + 1

    def forward(self, x: Tensor) -> Tensor:
        z = self.loss(self.w).expm1().log() + 0 * x[:, :1]
        return torch.cat([torch.zeros_like(z), z], 1)  # label 0: log(1 + exp z) = the loss


def test_a_quadratic_loss_gives_its_parabola():
    model, alphas = Parabola(), np.linspace(-2, 2, 9)
    d = torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    data = torch.rand(5, 1, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    c = loss_curve(model, data, FGSM(eps=0.1), alphas, {"w": d})
    slope = (model.H @ (model.w.detach().flatten() - model.b)) @ d.flatten()
    curvature = d.flatten() @ model.H @ d.flatten()
    with torch.no_grad():
        start = model.loss(model.w).item()
    exact = start + slope.item() * alphas + curvature.item() * alphas**2 / 2
    np.testing.assert_allclose(c.nat_loss, exact, rtol=1e-12)
    np.testing.assert_allclose(c.adv_loss, exact, rtol=1e-12)
    np.testing.assert_allclose(c.rise_stderr, 0, atol=1e-12)
    assert c.adv_center == pytest.approx(start, rel=1e-14)


def test_a_quadratic_loss_gives_its_surface():
    model, alphas, betas = Parabola(), [-1.0, 0.0, 0.5], [-0.5, 0.0, 2.0, 3.0]
    g = torch.Generator().manual_seed(2)
    d, e = (torch.randn(2, 3, generator=g, dtype=torch.float64) for _ in range(2))
    data = torch.rand(5, 1, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    s = loss_surface(model, data, FGSM(eps=0.1), alphas, betas, ({"w": d}, {"w": e}))
    with torch.no_grad():
        exact = [[model.loss(model.w + a * d + b * e).item() for b in betas] for a in alphas]
        centre = model.loss(model.w).item()
    np.testing.assert_allclose(s.adv_loss, exact, rtol=1e-12)
    np.testing.assert_allclose(s.nat_loss, exact, rtol=1e-12)
    np.testing.assert_allclose(s.relative, np.abs(np.array(exact) - centre), rtol=1e-9, atol=1e-12)
    assert s.adv_loss.shape == (3, 4)


@pytest.mark.parametrize("attack", [FGSM(eps=0.1, clip=None), PGD(0.1, 0.05, 5, clip=None)])
def test_a_linear_classifier_under_linf(attack):
    """Two classes: the worst perturbation lowers the margin by eps |w_y - w_other|_1."""
    g = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(30, 4, generator=g).double(), torch.randint(2, (30,), generator=g)
    d, alphas = gaussian(model, 3), np.linspace(-3, 3, 7)
    c = loss_curve(model, (x, y), attack, alphas, d)
    for i, alpha in enumerate(alphas):
        w = model.weight.detach() + alpha * d["weight"]
        margin = (x @ (w[0] - w[1]) + model.bias[0] - model.bias[1]).detach()
        margin = torch.where(y == 0, margin, -margin)
        worst = margin - 0.1 * (w[0] - w[1]).abs().sum()
        assert c.nat_loss[i] == pytest.approx(F.softplus(-margin).mean().item(), rel=1e-12)
        losses = F.softplus(-worst)
        assert c.adv_loss[i] == pytest.approx(losses.mean().item(), rel=1e-12)
        assert c.adv_stderr[0, i] == pytest.approx(losses.std().item() / 30**0.5, rel=1e-9)


def test_the_error_of_the_rise_is_example_by_example():
    """Much smaller than that of the loss: examples that are hard are so at every alpha."""
    model, (x, y) = network(), images()
    d = gaussian(model)
    c = loss_curve(model, (x, y), FGSM(eps=0.1), [0.0, 0.3], d)
    there = Moved(model, d, 0.3)
    losses = []
    for m in (model, there):
        with torch.no_grad():
            losses.append(F.cross_entropy(m(FGSM(eps=0.1)(m, x, y)), y, reduction="none").double())
    rise = losses[1] - losses[0]
    assert c.rise_stderr[0, 1] == pytest.approx((rise.std() / 40**0.5).item(), rel=1e-4)
    assert c.rise_stderr[0, 0] == 0
    assert c.adv_loss[1] - c.adv_center == pytest.approx(rise.mean().item(), rel=1e-3)


def test_scale_invariance():
    """A ReLU layer by 10, the next by 1/10: the same function, and the same landscape."""

    def net(scale: float) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Flatten(),
            nn.Linear(4, 3),
        ).double()  # fmt: skip
        with torch.no_grad():
            model[0].weight *= scale
            model[0].bias *= scale
            model[2].weight /= scale
        return model

    x, y = images()
    curves = [
        loss_curve(m, (x.double(), y), ATTACK, ALPHAS, gaussian(m)) for m in (net(1), net(10))
    ]
    np.testing.assert_allclose(curves[0].adv_loss, curves[1].adv_loss, rtol=1e-9)
    np.testing.assert_allclose(curves[0].nat_loss, curves[1].nat_loss, rtol=1e-9)
    assert np.ptp(curves[0].adv_loss) > 0.05
    # Without filter normalisation it would not be so.
    plain = {k: torch.randn(v.shape, dtype=v.dtype) for k, v in gaussian(net(1)).items()}
    a, b = (loss_curve(m, (x.double(), y), ATTACK, [0.1], plain) for m in (net(1), net(10)))
    assert abs(a.adv_loss[0] - b.adv_loss[0]) > 0.01


def trained() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A small network that fits its images."""
    model, (x, y) = network(), images(120)
    y = (x[:, 0].mean((1, 2)) > 0.5).long() + (x[:, 1, :, :2].mean((1, 2)) > 0.5).long()
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return model.eval(), (x, y)


def test_examples_made_before_understate_the_loss():
    model, data = trained()
    directions = [gaussian(model, i) for i in range(3)]
    attack = PGD(eps=0.05, step_size=0.0125, steps=10)
    fresh = loss_curve(model, data, attack, ALPHAS, directions)
    stale = loss_curve(model, data, attack, ALPHAS, directions, pregenerated=True)
    assert fresh.adv_center == pytest.approx(stale.adv_center, rel=1e-6)
    np.testing.assert_allclose(fresh.nat_losses, stale.nat_losses)
    noise = 1e-3 * fresh.adv_losses  # of the attack's own search
    assert (fresh.adv_losses >= stale.adv_losses - noise).all()
    assert fresh.adv_loss[-1] > 1.1 * stale.adv_loss[-1]


def test_equals_a_plain_loop():
    model, (x, y) = network(), images()
    directions = [gaussian(model, i) for i in range(2)]
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    c = loss_curve(model, loader, FGSM(eps=0.05), ALPHAS, directions)
    for i, d in enumerate(directions):
        for j, alpha in enumerate(ALPHAS):
            moved = Moved(model, d, alpha)
            x_adv = FGSM(eps=0.05)(moved, x, y)
            with torch.no_grad():
                adv, nat = (F.cross_entropy(moved(z), y).item() for z in (x_adv, x))
            assert c.adv_losses[i, j] == pytest.approx(adv, rel=1e-5)
            assert c.nat_losses[i, j] == pytest.approx(nat, rel=1e-5)
    np.testing.assert_allclose(c.adv_loss, c.adv_losses.mean(0))
    assert (c.n, c.adv_losses.shape) == (40, (2, 5))
    assert c.adv_center == c.adv_losses[0, 2] == c.adv_losses[1, 2]


def test_alphas_in_any_order_and_twice():
    model, data, d = network(), images(), gaussian(network())
    c = loss_curve(model, data, ATTACK, [1.0, 0.25, 1.0], d)
    straight = loss_curve(model, data, ATTACK, [0.25, 1.0], d)
    assert c.adv_loss[0] == c.adv_loss[2] == straight.adv_loss[1]
    assert c.alphas.tolist() == [1.0, 0.25, 1.0]


def test_a_point_does_not_depend_on_the_others():
    model, data, d = network(), images(), gaussian(network())
    c = loss_curve(model, data, ATTACK, ALPHAS, d)
    for j, alpha in enumerate(ALPHAS):
        assert loss_curve(model, data, ATTACK, [alpha], d).adv_loss[0] == c.adv_loss[j]


def test_seeds():
    model, data, d = network(), images(), gaussian(network())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    c = loss_curve(model, data, ATTACK, [0.5], d)
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(c, loss_curve(model, data, ATTACK, [0.5], d))
    assert loss_curve(model, data, ATTACK, [0.5], d, seed=1).adv_loss[0] != c.adv_loss[0]
    a = loss_curve(model, data, ATTACK, [0.5], d, seed=None)
    b = loss_curve(model, data, ATTACK, [0.5], d, seed=None)
    assert a.adv_loss[0] != b.adv_loss[0]


def test_autocast_does_not_go_on_with_old_weights():
    model, data, d = network(), images(), gaussian(network())
    with torch.autocast("cpu", torch.bfloat16):
        c = loss_curve(model, data, ATTACK, ALPHAS, d)
        alone = [loss_curve(model, data, ATTACK, [a], d).adv_loss[0] for a in ALPHAS]
    assert c.adv_loss.tolist() == alone
    full = loss_curve(model, data, ATTACK, ALPHAS, d)
    np.testing.assert_allclose(c.adv_loss, full.adv_loss, atol=0.01)
    assert np.ptp(c.adv_loss) > 0.02


def test_half_precision_weights():
    model, (x, y) = network(), images()
    d = gaussian(model)
    half = copy.deepcopy(model).bfloat16()
    before = everything(half)
    c = loss_curve(half, (x.bfloat16(), y), FGSM(eps=0.1), [0.5], d)
    full = loss_curve(model, (x, y), FGSM(eps=0.1), [0.5], d)
    np.testing.assert_allclose(c.adv_loss, full.adv_loss, rtol=0.1)
    assert_same(half, before)


# --- BatchNorm --------------------------------------------------------------------------------


def test_statistics_anew():
    model, (x, y) = network(), images()
    d, alpha = gaussian(model), 0.7
    before = everything(model)
    c = loss_curve(model, (x, y), FGSM(eps=0.05), [0.0, alpha], d, recompute_bn=True, batch_size=20)
    assert_same(model, before)
    for value, a in zip(c.adv_loss, (0.0, alpha)):
        moved = Moved(model, d, a)
        update_bn([x[:20], x[20:]], moved)
        moved.eval()
        x_adv = FGSM(eps=0.05)(moved, x, y)
        with torch.no_grad():
            assert value == pytest.approx(F.cross_entropy(moved(x_adv), y).item(), rel=1e-5)
    plain = loss_curve(model, (x, y), FGSM(eps=0.05), [alpha], d)
    assert abs(plain.adv_loss[0] - c.adv_loss[1]) > 1e-3
    assert model[1].momentum == 0.1


def test_an_attack_in_train_mode_leaves_no_trace():
    model, (x, y) = network(), images()
    model[6].p = 0.0
    d, before = gaussian(model), everything(model)
    attack = PGD(eps=0.1, step_size=0.04, steps=3, random_start=False, model_mode="train")
    c = loss_curve(model, (x, y), attack, ALPHAS, d, batch_size=10)
    assert_same(model, before)
    # The losses are those with the model's own statistics, batch after batch.
    moved = Moved(model, d, ALPHAS[-1])
    stats = everything(moved)
    losses = []
    for i in range(0, 40, 10):
        x_adv = attack(moved, x[i : i + 10], y[i : i + 10])
        moved.load_state_dict(stats)
        with torch.no_grad():
            losses.append(F.cross_entropy(moved(x_adv), y[i : i + 10], reduction="none"))
    assert c.adv_loss[-1] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


# --- The model comes back ---------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("recompute_bn", [False, True])
def test_after_an_exception_anywhere_the_model_is_as_it_was(error, recompute_bn):
    model = network().train()
    model[4].eval()
    model[7].weight.requires_grad_(False)
    before, calls, limit = everything(model), 0, 0

    def raising(module: nn.Module, args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise error("stop")

    handle = model[0].register_forward_pre_hook(raising)
    d = gaussian(model)
    torch.manual_seed(9)
    random = torch.get_rng_state()
    done = False
    while not done:
        calls, limit = 0, limit + 3
        try:
            loss_curve(
                model, images(), ATTACK, [0.5, 1.0], d, recompute_bn=recompute_bn, batch_size=20
            )
            done = True
        except error:
            pass
        assert_same(model, before)
        assert torch.equal(torch.get_rng_state(), random)
        assert model.training
        assert not model[4].training
        assert [p.requires_grad for p in model.parameters()].count(False) == 1
        assert all(p.grad is None for p in model.parameters())
    handle.remove()
    assert limit > 30


def test_a_second_interrupt_while_the_model_comes_back(monkeypatch):
    model = network()
    before = everything(model)
    clear, pending = torch.clear_autocast_cache, []

    def interrupted() -> None:
        clear()
        if pending:
            raise pending.pop()

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        pending.append(KeyboardInterrupt())  # for the way home
        raise RuntimeError("stop")

    monkeypatch.setattr(torch, "clear_autocast_cache", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loss_curve(model, images(), attack, [0.5], gaussian(model))
    assert_same(model, before)


def test_under_inference_mode_and_no_grad():
    model, data, d = network(), images(), gaussian(network())
    expected = loss_curve(model, data, ATTACK, ALPHAS, d)
    with torch.no_grad():
        assert_equal(loss_curve(model, data, ATTACK, ALPHAS, d), expected)
    with torch.inference_mode():
        assert_equal(loss_curve(model, data, ATTACK, ALPHAS, d), expected)
    assert not any(p.is_inference() for p in model.parameters())


# --- One graph for all points -----------------------------------------------------------------


def test_one_graph_a_batch_size_for_all_points(graph_device):
    device, counts = graph_device
    model, (x, y) = network().to(device), images()
    d = [gaussian(model, i) for i in range(2)]
    c = loss_curve(model, (x, y), ATTACK, ALPHAS, d, batch_size=16)  # 16, 16 and 8
    assert counts.captures == 2
    assert counts.replays == 3 * 9 - 4  # nine points; two of each kind ran as they are
    captured = loss_curve(model, (x, y), Captured(ATTACK), ALPHAS, d, batch_size=16)
    np.testing.assert_allclose(captured.adv_loss, c.adv_loss, rtol=1e-6)
    if device == "cpu":
        counts.captures = 0
        plain = loss_curve(model, (x, y), lambda *a: ATTACK(*a), ALPHAS, d, batch_size=16)
        assert counts.captures == 0  # nobody knows what a function does
        np.testing.assert_allclose(plain.adv_losses, c.adv_losses, rtol=1e-6)
        np.testing.assert_allclose(plain.nat_losses, c.nat_losses, rtol=1e-6)


def test_graphs_with_statistics_anew_and_an_attack_in_train_mode(cpu_graphs):
    model, data, d = network(), images(), gaussian(network())
    attack = PGD(eps=0.1, step_size=0.04, steps=3, model_mode="train")
    c = loss_curve(model, data, attack, ALPHAS, d, batch_size=10, recompute_bn=True)
    assert cpu_graphs.replays > 10
    plain = loss_curve(
        model, data, lambda *a: attack(*a), ALPHAS, d, batch_size=10, recompute_bn=True
    )
    np.testing.assert_allclose(plain.adv_losses, c.adv_losses, rtol=1e-5)


# --- The state file ---------------------------------------------------------------------------


class Counting:
    """An attack that counts its calls, and stops at one of them."""

    def __init__(self, stop_at: int = 10**9) -> None:
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return ATTACK(model, x, y)


def test_goes_on_where_it_was_interrupted(tmp_path):
    model, data, file = network(), images(), tmp_path / "state"
    d = [gaussian(model, i) for i in range(2)]
    whole = loss_curve(model, data, Counting(), ALPHAS, d)
    calls = 0
    for _ in range(20):
        attack = Counting(stop_at=4)  # a few points at a time
        try:
            resumed = loss_curve(model, data, attack, ALPHAS, d, state=file, key="k")
            break
        except KeyboardInterrupt:
            calls += attack.calls - 1
    assert calls + attack.calls == 9  # each of the points once
    assert_equal(resumed, whole)
    again = Counting()
    assert_equal(loss_curve(model, data, again, ALPHAS, d, state=file, key="k"), whole)
    assert again.calls == 0


def test_more_alphas_and_directions_take_what_there_is(tmp_path):
    model, data, file = network(), images(), tmp_path / "state"
    d = [gaussian(model, i) for i in range(3)]
    loss_curve(model, data, Counting(), [0.5, 1.0], d[:2], state=file, key="k")
    attack = Counting()
    more = loss_curve(model, data, attack, [-0.5, 0.5, 1.0], [d[2], d[1]], state=file, key="k")
    assert attack.calls == 4  # -0.5 along d[1], and three along d[2]
    assert_equal(more, loss_curve(model, data, Counting(), [-0.5, 0.5, 1.0], [d[2], d[1]]))
    surface = loss_surface(model, data, attack, [0.0, 0.5], [0.0, 1.0], d[:2], state=file, key="k")
    assert attack.calls == 5  # but for the corner it has been there
    assert surface.adv_loss[0, 0] == more.adv_center


def test_cut_off_anywhere(tmp_path):
    model, data, file = network(), images(), tmp_path / "state"
    d = gaussian(model)
    whole = loss_curve(model, data, ATTACK, [0.5, 1.0], d, state=file)
    content = file.read_bytes()
    for size in range(0, len(content), 61):
        file.write_bytes(content[:size])
        try:
            assert_equal(loss_curve(model, data, ATTACK, [0.5, 1.0], d, state=file), whole)
            assert file.read_bytes() == content
        except ValueError:
            assert size <= content.index(b"\n")  # no header, no landscape


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": network(1)}, "model"),
        ({"data": images(seed=2)}, "data"),
        ({"attack": PGD(eps=0.2)}, "attack"),
        ({"seed": 1}, "seed"),
        ({"pregenerated": True}, "pregenerated"),
        ({"recompute_bn": True}, "recompute_bn"),
    ],
)
def test_the_state_of_something_else_is_refused(tmp_path, change, said):
    file, model = tmp_path / "state", network()
    d = gaussian(model)
    args = {"model": model, "data": images(), "attack": ATTACK, "alphas": [0.5], "direction": d}
    loss_curve(**args, state=file)
    content = file.read_bytes()
    with pytest.raises(ValueError, match=f"other {said}"):
        loss_curve(**{**args, **change}, state=file)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "content", [b"", b"{}\n", b'{"landscape": 3}\n', b"[]\n", b"\xff\n", b'{"evaluation": {}}\n']
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    file, model = tmp_path / "state", network()
    file.write_bytes(content)
    with pytest.raises(ValueError, match="delete it"):
        loss_curve(model, images(), ATTACK, [0.5], gaussian(model), state=file)
    assert file.read_bytes() == content


@pytest.mark.parametrize("entry", [{}, {"point": []}, {"point": 3}, {"point": [["a", 1]]}, 3])
def test_damaged_entries_are_refused(tmp_path, entry):
    file, model = tmp_path / "state", network()
    loss_curve(model, images(), ATTACK, [0.5], gaussian(model), state=file)
    with open(file, "a") as f:
        f.write(json.dumps(entry) + "\n")
    content = file.read_bytes()
    with pytest.raises(ValueError, match="delete it"):
        loss_curve(model, images(), ATTACK, [0.5], gaussian(model), state=file)
    assert file.read_bytes() == content


SLOW_SURFACE = """
import sys, time
sys.path[:0] = sys.argv[2:]
import torch
import test_landscape as t
from awp_optim.landscape import loss_surface
torch.set_num_threads(1)

def attack(model, x, y):
    time.sleep(float(sys.argv[1].split(",")[1]))
    return t.ATTACK(model, x, y)

model = t.network()
s = loss_surface(model, t.images(), attack, t.ALPHAS, t.ALPHAS,
                 [t.gaussian(model, i) for i in range(2)], state=sys.argv[1].split(",")[0], key="k")
print(s.to_dict())
"""


def surface_process(file: Path, pause: float) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    command = [sys.executable, "-c", SLOW_SURFACE, f"{file},{pause}", str(here), str(here.parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_surface_goes_on_after_kills(tmp_path):
    def result(process: subprocess.Popen[str]) -> str:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out

    file = tmp_path / "state"
    expected = result(surface_process(tmp_path / "other", 0))
    for points in (3, 9, 15):
        process = surface_process(file, 0.1)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if file.exists() and file.read_bytes().count(b"\n") > points:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert points < file.read_bytes().count(b"\n") < 26
    assert result(surface_process(file, 0)) == expected


# --- Several processes ------------------------------------------------------------------------

RANKS = """
import sys
sys.path[:0] = sys.argv[3:]
import json
import torch
import torch.distributed as dist
import test_landscape as t
from awp_optim.landscape import loss_curve
torch.set_num_threads(1)
rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2] + "/store", 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
model = t.network()
d = [t.gaussian(model, i) for i in range(3)]
attack = t.Counting()
states = (None, sys.argv[2] + "/state", sys.argv[2] + "/state")
curves = [loss_curve(model, t.images(), attack, t.ALPHAS, d, state=s, key="k").to_dict() for s in states]
try:
    loss_curve(t.network(1), t.images(), attack, t.ALPHAS, d, state=states[1], key="k")
except ValueError as error:
    refused = str(error)
print(json.dumps([curves, attack.calls, refused]))
dist.destroy_process_group()
"""


def test_points_are_shared_out_over_processes(tmp_path):
    here = Path(__file__).parent
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(r), str(tmp_path), str(here), str(here.parent)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    answers = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        answers.append(json.loads(out))
    model = network()
    d = [gaussian(model, i) for i in range(3)]
    attack = Counting()
    expected = loss_curve(model, images(), attack, ALPHAS, d, state=tmp_path / "state", key="k").to_dict()
    assert attack.calls == 0  # one process goes on with the file of two
    for curves, calls, refused in answers:
        assert curves == [expected] * 3
        # The centre and half of the other twelve points, for two of the three curves.
        assert calls == 2 * ((1 if curves is answers[0][0] else 0) + 6)
        assert "other model" in refused
    assert loss_curve(model, images(), Counting(), ALPHAS, d).to_dict() == expected


# --- Bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model": lambda x: x}, TypeError, "model must be a module"),
        ({"model": nn.Sequential(nn.LazyLinear(3))}, ValueError, "lazy"),
        ({"data": []}, ValueError, "no data"),
        ({"data": [3]}, TypeError, "batches"),
        ({"data": (torch.rand(3, 2, 4, 4), torch.rand(3))}, TypeError, "class indices"),
        ({"attack": None}, TypeError, "callable"),
        ({"attack": lambda model, x, y: x[:1]}, TypeError, "return a tensor of shape"),
        ({"alphas": []}, ValueError, "alphas"),
        ({"alphas": 0.5}, ValueError, "alphas"),
        ({"alphas": "wide"}, TypeError, "alphas"),
        ({"alphas": [0.0, math.nan]}, ValueError, "finite"),
        ({"direction": []}, ValueError, "one or more"),
        ({"direction": {}}, ValueError, "empty"),
        ({"direction": 3}, TypeError, "int"),
        ({"direction": [3]}, TypeError, "dict"),
        ({"direction": {"8.weight": torch.ones(3)}}, ValueError, "does not have"),
        ({"direction": {torch.ones(3): torch.ones(3)}}, ValueError, "does not have"),
        ({"direction": {"7.weight": torch.ones(8)}}, ValueError, "shape"),
        ({"direction": {"7.bias": torch.tensor([1.0, math.inf, 0])}}, ValueError, "not finite"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"device": "meta"}, ValueError, "move it"),
    ],
)
def test_bad_input_changes_nothing(change, error, said):
    model = network().train()
    before = everything(model)
    args = {
        "model": model, "data": images(), "attack": ATTACK, "alphas": [0.5],
        "direction": gaussian(model),
    }  # fmt: skip
    with pytest.raises(error, match=said):
        loss_curve(**{**args, **change})
    assert_same(model, before)
    assert model.training


def test_a_surface_needs_two_directions():
    model = network()
    d = gaussian(model)
    for directions in ([d], [d, d, d], d):
        with pytest.raises(ValueError, match="two"):
            loss_surface(model, images(), ATTACK, [0.5], [0.5], directions)


# --- Scalars ----------------------------------------------------------------------------------


def curve(alphas, losses, centre, errors=None) -> LossCurve:
    losses = np.atleast_2d(np.array(losses, dtype=float))
    errors = np.zeros_like(losses) if errors is None else np.atleast_2d(errors)
    mean = losses.mean(0)
    return LossCurve(
        np.array(alphas, dtype=float), mean, mean, losses, losses, errors, errors, errors,
        centre, centre, 10,
    )  # fmt: skip


class TestScalars:
    def test_sharpness_of_a_parabola(self):
        alphas = np.linspace(-1, 1, 21)
        c = curve(alphas, [2 + alphas**2, 2 + 3 * alphas**2], 2.0, np.full((2, 21), 0.5))
        s = c.sharpness(0.5)
        assert (s.mean, s.worst) == (pytest.approx(0.5), pytest.approx(0.75))
        assert (s.relative, s.stderr) == (pytest.approx(0.5), pytest.approx(0.5))

    def test_falling_and_rising(self):
        c = curve([-1, 0, 1], [[1.0, 2.0, 5.0]], 2.0)
        s = c.sharpness(1.0)
        assert (s.mean, s.worst, s.relative) == (1.0, 3.0, 2.0)
        half = c.sharpness(0.5)  # between points, linearly
        assert (half.mean, half.worst, half.relative) == (0.5, 1.5, 1.0)

    def test_one_side(self):
        c = curve([0.0, 0.01, 0.02], [[1.0, 2.0, 4.0]], 1.0)
        assert c.sharpness(0.015).mean == pytest.approx(2.0)
        with pytest.raises(ValueError, match="reaches neither"):
            c.sharpness(0.03)
        with pytest.raises(ValueError, match="above 0"):
            c.sharpness(0.0)

    def test_flat_width(self):
        alphas = np.linspace(-1, 1, 201)
        c = curve(alphas, [2 + alphas**2], 2.0)
        assert c.flat_width() == pytest.approx(2 * math.sqrt(0.2), rel=1e-3)
        assert c.flat_width(0.02) == pytest.approx(0.4, rel=1e-3)
        assert c.flat_width(0.6) == math.inf

    def test_flat_width_in_any_order_without_the_centre(self):
        c = curve([1.0, -2.0, 0.5], [[3.0, 4.0, 1.05]], 1.0)
        right = 0.5 + 0.5 * (0.05 / 1.95)
        left = 2 * 0.1 / 3
        assert c.flat_width() == pytest.approx(right + left)

    def test_flat_width_goes_to_the_first_rise(self):
        c = curve([0, 1, 2, 3], [[1.0, 1.2, 1.0, 2.0]], 1.0)
        assert c.flat_width() == pytest.approx(0.5)

    def test_a_loss_that_is_no_number_is_a_rise(self):
        assert curve([0, 1, 2], [[1.0, 1.0, math.nan]], 1.0).flat_width() == 1.0
        assert curve([0, 1, 2], [[1.0, 1.0, math.inf]], 1.0).flat_width() == 1.0

    def test_a_curve_that_stays_at_the_centre(self):
        with pytest.raises(ValueError, match="no alpha but 0"):
            curve([0.0], [[1.0]], 1.0).flat_width()
        with pytest.raises(ValueError, match="above 0"):
            curve([0.0, 1.0], [[1.0, 2.0]], 1.0).flat_width(0)

    def test_one_example_has_no_error(self):
        model, (x, y) = network(), images(1)
        c = loss_curve(model, (x, y), ATTACK, [0.5], gaussian(model))
        assert math.isnan(c.adv_stderr[0, 0])
        assert math.isfinite(c.adv_loss[0])

    def test_as_plain_numbers(self):
        model = network()
        c = loss_curve(model, images(), ATTACK, [0.5], gaussian(model))
        again = json.loads(json.dumps(c.to_dict()))
        assert again["adv_losses"] == c.adv_losses.tolist()
        assert again["n"] == 40


def test_losses_beyond_all_numbers():
    model = network()
    c = loss_curve(model, images(), FGSM(eps=0.1), [0.5, 1e30], gaussian(model))
    assert math.isfinite(c.adv_loss[0])
    assert not c.adv_loss[1] < 1e20
