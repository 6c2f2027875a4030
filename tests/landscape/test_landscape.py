"""Landscapes against closed forms and plain loops, and every way they can go wrong."""

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

from awp_optim.attacks import FGSM, PGD, Captured
from awp_optim.landscape import LossCurve, LossSurface, loss_curve, loss_surface
from tests.landscape.toolbox import (
    ALPHAS,
    ATTACK,
    Counting,
    assert_restored,
    gaussian,
    gaussians,
    images,
    moved,
    network,
    snapshot,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]


def assert_equal(a: LossCurve | LossSurface, b: LossCurve | LossSurface) -> None:
    assert a.to_dict() == b.to_dict()


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
        self.data = torch.rand(5, 1, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)

    def loss(self, w: Tensor) -> Tensor:
        return 0.5 * (w.flatten() - self.b) @ self.H @ (w.flatten() - self.b) + 1

    def forward(self, x: Tensor) -> Tensor:
        z = self.loss(self.w).expm1().log() + 0 * x[:, :1]
        return torch.cat([torch.zeros_like(z), z], 1)  # label 0: log(1 + exp z) = the loss


@torch.no_grad()
def test_a_quadratic_loss_gives_its_parabola_and_its_surface():
    model, alphas, betas = Parabola(), [-2.0, -1.0, 0.0, 0.5, 2.0], [-0.5, 0.0, 2.0, 3.0]
    g = torch.Generator().manual_seed(2)
    d, e = (torch.randn(2, 3, generator=g, dtype=torch.float64) for _ in range(2))
    center = model.loss(model.w).item()
    exact = np.array([[model.loss(model.w + a * d + b * e) for b in betas] for a in alphas])
    c = loss_curve(model, model.data, FGSM(eps=0.1), alphas, {"w": d})
    np.testing.assert_allclose(c.nat_loss, exact[:, 1], rtol=1e-12)
    np.testing.assert_allclose(c.adv_loss, exact[:, 1], rtol=1e-12)
    np.testing.assert_allclose(c.rise_stderr, 0, atol=1e-12)
    assert c.adv_center == pytest.approx(center, rel=1e-14)
    s = loss_surface(model, model.data, FGSM(eps=0.1), alphas, betas, ({"w": d}, {"w": e}))
    np.testing.assert_allclose(s.adv_loss, exact, rtol=1e-12)
    np.testing.assert_allclose(s.nat_loss, exact, rtol=1e-12)
    np.testing.assert_allclose(s.relative, np.abs(exact - center), rtol=1e-9, atol=1e-12)


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
        losses = F.softplus(0.1 * (w[0] - w[1]).abs().sum() - margin)
        assert c.nat_loss[i] == pytest.approx(F.softplus(-margin).mean().item(), rel=1e-12)
        assert c.adv_loss[i] == pytest.approx(losses.mean().item(), rel=1e-12)
        assert c.adv_stderr[0, i] == pytest.approx(losses.std().item() / 30**0.5, rel=1e-9)


def test_the_error_of_the_rise_is_paired_by_example():
    """Much smaller than that of the loss: examples that are hard are so at every alpha."""
    model, (x, y) = network(), images()
    d, attack = gaussian(model), FGSM(eps=0.1)
    c = loss_curve(model, (x, y), attack, [0.0, 0.3], d)
    losses = []
    for m in (model, moved(model, d, 0.3)):
        with torch.no_grad():
            losses.append(F.cross_entropy(m(attack(m, x, y)), y, reduction="none").double())
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

    (x, y), models = images(), (net(1), net(10))
    data = x.double(), y
    a, b = (loss_curve(m, data, ATTACK, ALPHAS, gaussian(m)) for m in models)
    np.testing.assert_allclose(a.adv_loss, b.adv_loss, rtol=1e-9)
    np.testing.assert_allclose(a.nat_loss, b.nat_loss, rtol=1e-9)
    assert np.ptp(a.adv_loss) > 0.05
    # Without filter normalization it would not be so.
    plain = {k: torch.randn(v.shape, dtype=v.dtype) for k, v in gaussian(models[0]).items()}
    a, b = (loss_curve(m, data, ATTACK, [0.1], plain) for m in models)
    assert abs(a.adv_loss[0] - b.adv_loss[0]) > 0.01


def test_pregenerated_examples_understate_the_loss():
    model, (x, _) = network(), images(120)
    y = (x[:, 0].mean((1, 2)) > 0.5).long() + (x[:, 1, :, :2].mean((1, 2)) > 0.5).long()
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    settings = (model, (x, y), PGD(0.05, 0.0125, 10), ALPHAS, gaussians(model, 3))
    fresh, stale = (loss_curve(*settings, pregenerated=p) for p in (False, True))
    assert fresh.adv_center == pytest.approx(stale.adv_center, rel=1e-6)
    np.testing.assert_allclose(fresh.nat_losses, stale.nat_losses)
    noise = 1e-3 * fresh.adv_losses  # of the attack's own search
    assert (fresh.adv_losses >= stale.adv_losses - noise).all()
    assert fresh.adv_loss[-1] > 1.1 * stale.adv_loss[-1]


def test_equals_a_plain_loop():
    model, (x, y) = network(), images()
    directions, attack = gaussians(model, 2), FGSM(eps=0.05)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    c = loss_curve(model, loader, attack, ALPHAS, directions)
    for i, d in enumerate(directions):
        for j, alpha in enumerate(ALPHAS):
            m = moved(model, d, alpha)
            x_adv = attack(m, x, y)
            with torch.no_grad():
                adv, nat = (F.cross_entropy(m(z), y).item() for z in (x_adv, x))
            assert c.adv_losses[i, j] == pytest.approx(adv, rel=1e-5)
            assert c.nat_losses[i, j] == pytest.approx(nat, rel=1e-5)
    np.testing.assert_allclose(c.adv_loss, c.adv_losses.mean(0))
    assert (c.n, c.adv_losses.shape) == (40, (2, 5))
    assert c.adv_center == c.adv_losses[0, 2] == c.adv_losses[1, 2]
    assert json.loads(json.dumps(c.to_dict()))["adv_losses"] == c.adv_losses.tolist()
    for data in (loader.dataset, (x.numpy(), y.numpy())):
        assert_equal(loss_curve(model, data, attack, ALPHAS, directions, batch_size=16), c)


def test_a_point_depends_neither_on_the_others_nor_on_the_order():
    model, data = network(), images()
    d = gaussian(model)
    c = loss_curve(model, data, ATTACK, ALPHAS, d)
    for j, alpha in enumerate(ALPHAS):
        assert loss_curve(model, data, ATTACK, [alpha], d).adv_loss[0] == c.adv_loss[j]
    mixed = loss_curve(model, data, ATTACK, [1.0, 0.25, 1.0], d)
    assert mixed.adv_loss.tolist() == c.adv_loss[[4, 3, 4]].tolist()
    assert mixed.alphas.tolist() == [1.0, 0.25, 1.0]


def test_seeds():
    model, data = network(), images()
    d = gaussian(model)
    before = torch.get_rng_state()
    c, again, other = (loss_curve(model, data, ATTACK, [0.5], d, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(c, again)
    assert other.adv_loss[0] != c.adv_loss[0]
    a, b = (loss_curve(model, data, ATTACK, [0.5], d, seed=None) for _ in range(2))
    assert a.adv_loss[0] != b.adv_loss[0]


def test_autocast_does_not_keep_casts_of_old_weights():
    model, data = network(), images()
    d = gaussian(model)
    with torch.autocast("cpu", torch.bfloat16):
        c = loss_curve(model, data, ATTACK, ALPHAS, d)
        alone = [loss_curve(model, data, ATTACK, [a], d).adv_loss[0] for a in ALPHAS]
    assert c.adv_loss.tolist() == alone
    full = loss_curve(model, data, ATTACK, ALPHAS, d)
    np.testing.assert_allclose(c.adv_loss, full.adv_loss, atol=0.01)
    assert np.ptp(c.adv_loss) > 0.02


def test_half_precision_weights():
    model, (x, y) = network(), images()
    d, half = gaussian(model), copy.deepcopy(model).bfloat16()
    before = snapshot(half)
    c = loss_curve(half, (x.bfloat16(), y), FGSM(eps=0.1), [0.5], d)
    full = loss_curve(model, (x, y), FGSM(eps=0.1), [0.5], d)
    np.testing.assert_allclose(c.adv_loss, full.adv_loss, rtol=0.1)
    assert_restored(half, before)


def test_losses_beyond_all_numbers_and_a_single_example():
    model = network()
    c = loss_curve(model, images(1), FGSM(eps=0.1), [0.5, 1e30], gaussian(model))
    assert math.isfinite(c.adv_loss[0])
    assert not c.adv_loss[1] < 1e20
    assert math.isnan(c.adv_stderr[0, 0])


# --- BatchNorm --------------------------------------------------------------------------------


def test_recomputed_statistics():
    model, (x, y) = network(), images()
    d, attack, before = gaussian(model), FGSM(eps=0.05), snapshot(model)
    c = loss_curve(model, (x, y), attack, [0.0, 0.7], d, recompute_bn=True, batch_size=20)
    assert_restored(model, before)
    assert model[1].momentum == 0.1
    for value, alpha in zip(c.adv_loss, (0.0, 0.7)):
        m = moved(model, d, alpha)
        update_bn([x[:20], x[20:]], m)
        m.eval()
        with torch.no_grad():
            expected = F.cross_entropy(m(attack(m, x, y)), y).item()
        assert value == pytest.approx(expected, rel=1e-5)
    plain = loss_curve(model, (x, y), attack, [0.7], d)
    assert abs(plain.adv_loss[0] - c.adv_loss[1]) > 1e-3


def test_an_attack_in_train_mode_leaves_no_trace():
    model, (x, y) = network(), images()
    model[6].p = 0.0
    d, before = gaussian(model), snapshot(model)
    attack = PGD(eps=0.1, step_size=0.04, steps=3, random_start=False, model_mode="train")
    c = loss_curve(model, (x, y), attack, ALPHAS, d, batch_size=10)
    assert_restored(model, before)
    # The losses are those with the model's own statistics, batch after batch.
    m = moved(model, d, ALPHAS[-1])
    stats, losses = snapshot(m), []
    for xs, ys in zip(x.split(10), y.split(10)):
        x_adv = attack(m, xs, ys)
        m.load_state_dict(stats)
        with torch.no_grad():
            losses.append(F.cross_entropy(m(x_adv), ys, reduction="none"))
    assert c.adv_loss[-1] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


# --- The model and the data are restored ------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("recompute_bn", [False, True])
def test_the_model_is_restored_after_an_exception_anywhere(error, recompute_bn):
    model = network().train()
    model[4].eval()
    model[7].weight.requires_grad_(False)
    before, calls, limit = snapshot(model), 0, 0

    def raising(module: nn.Module, args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise error("stop")

    model[0].register_forward_pre_hook(raising)
    settings = (model, images(), ATTACK, [0.5, 1.0], gaussian(model))
    random = torch.get_rng_state()
    done = False
    while not done:
        calls, limit = 0, limit + 3
        try:
            loss_curve(*settings, recompute_bn=recompute_bn, batch_size=20)
            done = True
        except error:
            pass
        assert_restored(model, before)
        assert model[1].momentum == 0.1
        assert torch.equal(torch.get_rng_state(), random)
        assert model.training
        assert not model[4].training
        assert [p.requires_grad for p in model.parameters()].count(False) == 1
        assert all(p.grad is None for p in model.parameters())
    assert limit > 30


def test_a_buffer_whose_elements_share_memory():
    model = network()
    model.register_buffer("mask", torch.zeros(1).expand(5))
    c, expected = (
        loss_curve(m, images(), ATTACK, ALPHAS, gaussian(network())) for m in (model, network())
    )
    assert (c.adv_loss == expected.adv_loss).all()


def test_a_second_interrupt_while_the_model_is_restored(monkeypatch):
    model = network()
    before = snapshot(model)
    clear, pending = torch.clear_autocast_cache, []

    def interrupted() -> None:
        clear()
        if pending:
            raise pending.pop()

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        pending.append(KeyboardInterrupt())  # during the restoration
        raise RuntimeError("stop")

    monkeypatch.setattr(torch, "clear_autocast_cache", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loss_curve(model, images(), attack, [0.5], gaussian(model))
    assert_restored(model, before)


def test_an_attack_that_writes_in_place():
    def in_place(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        y.zero_()
        return x.add_(0.1).clamp_(0, 1)

    model, (x, y) = network(), images()
    kept = x.clone(), y.clone()
    c = loss_curve(model, (x, y), in_place, ALPHAS, gaussian(model))
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])
    copying = loss_curve(
        model, (x, y), lambda m, x, y: (x + 0.1).clamp(0, 1), ALPHAS, gaussian(model)
    )
    assert_equal(c, copying)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_inference_mode_and_no_grad(mode):
    model, data, d = network(), images(), gaussian(network())
    expected = loss_curve(model, data, ATTACK, ALPHAS, d)
    with mode():
        assert_equal(loss_curve(model, data, ATTACK, ALPHAS, d), expected)
    assert not any(p.is_inference() for p in model.parameters())


# --- One graph for all points -----------------------------------------------------------------


def test_one_graph_a_batch_size_for_all_points(graph_device):
    device, counts = graph_device
    model, data = network().to(device), images()
    settings = {"alphas": ALPHAS, "direction": gaussians(model, 2), "batch_size": 16}
    c = loss_curve(model, data, ATTACK, **settings)  # batches of 16, 16 and 8
    assert counts.captures == 2
    assert counts.replays == 3 * 9 - 4  # nine points; two of each size ran without a graph
    captured = loss_curve(model, data, Captured(ATTACK), **settings)
    np.testing.assert_allclose(captured.adv_loss, c.adv_loss, rtol=1e-6)
    if device == "cpu":
        counts.captures = 0
        plain = loss_curve(model, data, lambda *a: ATTACK(*a), **settings)
        assert counts.captures == 0  # nobody knows what a function does
        np.testing.assert_allclose(plain.adv_losses, c.adv_losses, rtol=1e-6)
        np.testing.assert_allclose(plain.nat_losses, c.nat_losses, rtol=1e-6)


def test_graphs_with_recomputed_statistics_and_an_attack_in_train_mode(cpu_graphs):
    model = network()
    attack = PGD(eps=0.1, step_size=0.04, steps=3, model_mode="train")
    settings = {
        "alphas": ALPHAS, "direction": gaussian(model), "batch_size": 10, "recompute_bn": True,
    }  # fmt: skip
    c = loss_curve(model, images(), attack, **settings)
    assert cpu_graphs.replays > 10
    plain = loss_curve(model, images(), lambda *a: attack(*a), **settings)
    np.testing.assert_allclose(plain.adv_losses, c.adv_losses, rtol=1e-5)


# --- The state file ---------------------------------------------------------------------------


def test_resumes_where_it_was_interrupted(tmp_path):
    model, data = network(), images()
    settings = {"alphas": ALPHAS, "direction": gaussians(model, 2)}
    state = {"state": tmp_path / "state", "key": "counting"}
    expected = loss_curve(model, data, Counting(), **settings)
    calls, resumed = 0, None
    while resumed is None:
        attack = Counting(stop_at=4)  # a few points at a time
        try:
            resumed = loss_curve(model, data, attack, **settings, **state)
            calls += attack.calls
        except KeyboardInterrupt:
            calls += attack.calls - 1
    assert calls == 9  # each of the points once
    assert_equal(resumed, expected)
    again = Counting()
    assert_equal(loss_curve(model, data, again, **settings, **state), expected)
    assert again.calls == 0


def test_more_alphas_and_directions_use_the_points_there_are(tmp_path):
    model, data = network(), images()
    state = {"state": tmp_path / "state", "key": "counting"}
    d, attack = gaussians(model, 3), Counting()
    loss_curve(model, data, Counting(), [0.5, 1.0], d[:2], **state)
    more = loss_curve(model, data, attack, [-0.5, 0.5, 1.0], [d[2], d[1]], **state)
    assert attack.calls == 4  # -0.5 along d[1], and three along d[2]
    assert_equal(more, loss_curve(model, data, Counting(), [-0.5, 0.5, 1.0], [d[2], d[1]]))
    surface = loss_surface(model, data, attack, [0.0, 0.5], [0.0, 1.0], d[:2], **state)
    assert attack.calls == 5  # one corner is new
    assert surface.adv_loss[0, 0] == more.adv_center


def test_cut_off_anywhere(tmp_path):
    file, model = tmp_path / "state", network()
    settings = (model, images(), ATTACK, [0.5, 1.0], gaussian(model))
    expected = loss_curve(*settings, state=file)
    content = file.read_bytes()
    for size in range(0, len(content), 61):
        file.write_bytes(content[:size])
        try:
            assert_equal(loss_curve(*settings, state=file), expected)
            assert file.read_bytes() == content
        except ValueError:
            assert size <= content.index(b"\n")  # no header, no landscape


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": network(1)}, "other model"),
        ({"data": images(seed=2)}, "other data"),
        ({"attack": PGD(eps=0.2)}, "other attack"),
        ({"attack": lambda *args: args[1]}, "key="),
        ({"seed": 1}, "other seed"),
        ({"pregenerated": True}, "other pregenerated"),
        ({"recompute_bn": True}, "other recompute_bn"),
    ],
)
def test_the_state_of_something_else_is_refused(tmp_path, change, said):
    file, model = tmp_path / "state", network()
    args = {
        "model": model, "data": images(), "attack": ATTACK, "alphas": [0.5],
        "direction": gaussian(model), "state": file,
    }  # fmt: skip
    loss_curve(**args)
    content = file.read_bytes()
    with pytest.raises(ValueError, match=said):
        loss_curve(**{**args, **change})
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
    settings = (model, images(), ATTACK, [0.5], gaussian(model))
    loss_curve(*settings, state=file)
    with open(file, "a") as f:
        f.write(json.dumps(entry) + "\n")
    content = file.read_bytes()
    with pytest.raises(ValueError, match="delete it"):
        loss_curve(*settings, state=file)
    assert file.read_bytes() == content


def start(program: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def result(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


SLOW_SURFACE = """
import sys, time
import torch
from awp_optim.landscape import loss_surface
from tests.landscape.toolbox import *
torch.set_num_threads(1)

def attack(model, x, y):
    time.sleep(float(sys.argv[2]))
    return ATTACK(model, x, y)

model = network()
s = loss_surface(model, images(), attack, ALPHAS, ALPHAS, gaussians(model, 2),
                 state=sys.argv[1], key="slow")
print(s.to_dict())
"""


def test_a_surface_resumes_after_kills(tmp_path):
    file = tmp_path / "state"
    expected = result(start(SLOW_SURFACE, tmp_path / "other", 0))
    for points in (3, 9, 15):
        process = start(SLOW_SURFACE, file, 0.1)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if file.exists() and file.read_bytes().count(b"\n") > points:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert points < file.read_bytes().count(b"\n") < 26
    assert result(start(SLOW_SURFACE, file, 0)) == expected


# --- Several processes ------------------------------------------------------------------------

RANKS = """
import json, sys
import torch
import torch.distributed as dist
from awp_optim.landscape import loss_curve
from tests.landscape.toolbox import *
torch.set_num_threads(1)
store = dist.FileStore(sys.argv[2] + "/store", 2)
dist.init_process_group("gloo", store=store, rank=int(sys.argv[1]), world_size=2)
state, attack = sys.argv[2] + "/state", Counting()
settings = {"alphas": ALPHAS, "direction": gaussians(network(), 3), "key": "counting"}
curves = [loss_curve(network(), images(), attack, **settings, state=s).to_dict()
          for s in (None, state, state)]
try:
    loss_curve(network(1), images(), attack, **settings, state=state)
except ValueError as error:
    refused = str(error)
print(json.dumps([curves, attack.calls, refused]))
dist.destroy_process_group()
"""


def test_processes_share_the_points(tmp_path):
    processes = [start(RANKS, rank, tmp_path) for rank in range(2)]
    answers = [json.loads(result(process)) for process in processes]
    model, attack = network(), Counting()
    settings = (model, images(), attack, ALPHAS, gaussians(model, 3))
    expected = loss_curve(*settings, state=tmp_path / "state", key="counting").to_dict()
    assert attack.calls == 0  # one process resumes the file of two
    # Two of the three curves are measured: the unperturbed model by the first rank, and half of the
    # other twelve points by each.
    assert [calls for _, calls, _ in answers] == [2 * (1 + 6), 2 * 6]
    for curves, _, refused in answers:
        assert curves == [expected] * 3
        assert "other model" in refused
    assert loss_curve(*settings).to_dict() == expected


# --- Bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model": lambda x: x}, TypeError, "model must be a module"),
        ({"model": nn.Sequential(nn.LazyLinear(3))}, ValueError, "lazy"),
        ({"data": []}, ValueError, "no data"),
        ({"data": [3]}, TypeError, "batches"),
        ({"data": (torch.rand(3, 2, 4, 4), torch.rand(3))}, TypeError, "class indices"),
        ({"data": (torch.rand(2, 2, 4, 4), torch.tensor([0, -1]))}, ValueError, "from 0"),
        ({"data": (torch.rand(2, 2, 4, 4), torch.tensor([0, 3]))}, ValueError, "label 3"),
        ({"attack": None}, TypeError, "callable"),
        ({"attack": PGD}, TypeError, r"instance, PGD\("),
        ({"attack": lambda model, x, y: x[:1]}, TypeError, "return a tensor of shape"),
        ({"alphas": []}, ValueError, "alphas"),
        ({"alphas": 0.5}, ValueError, "alphas"),
        ({"alphas": "wide"}, TypeError, "alphas"),
        ({"alphas": [0.0, math.nan]}, ValueError, "finite"),
        ({"direction": []}, ValueError, "one direction or several"),
        ({"direction": {}}, ValueError, "empty"),
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
    before = snapshot(model)
    args = {
        "model": model, "data": images(), "attack": ATTACK, "alphas": [0.5],
        "direction": gaussian(model),
    }  # fmt: skip
    with pytest.raises(error, match=said):
        loss_curve(**{**args, **change})
    assert_restored(model, before)
    assert model.training


def test_a_surface_needs_two_directions():
    model = network()
    d = gaussian(model)
    for directions in ([d], [d, d, d], d):
        with pytest.raises(ValueError, match="two"):
            loss_surface(model, images(), ATTACK, [0.5], [0.5], directions)
