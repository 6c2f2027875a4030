"""The training loop: what every step is given, what it does, and what a run reports."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from awp_optim import AWP
from awp_optim._cuda_graphs.graphs import _Graph
from awp_optim.attacks import PGD
from awp_optim.lab import building, evaluator, trainer
from awp_optim.lab.config import Method
from awp_optim.lab.data import load_digits
from awp_optim.lab.idbh import idbh_weak
from awp_optim.lab.models import build_model
from awp_optim.lab.pseudo import PseudoLabeled
from awp_optim.lab.recipes import QUICKSTART, QUICKSTART_IMAGES
from awp_optim.lab.trainer import fit

pytestmark = pytest.mark.usefixtures("one_thread")

STEP = trainer.AdversarialStep.__call__


@pytest.fixture
def watch_steps(monkeypatch):
    """Let a function see (step, x, y) before every training step."""

    def watch(function):
        def watched(self, x, y):
            function(self, x, y)
            return STEP(self, x, y)

        monkeypatch.setattr(trainer.AdversarialStep, "__call__", watched)

    return watch


@pytest.fixture
def batches_of(watch_steps):
    """The inputs and labels of every training step of a run."""

    def run(config, data, **kwargs):
        seen = []
        watch_steps(lambda step, x, y: seen.append((x.clone(), y.clone())))
        fit(config, data, **kwargs)
        return seen

    return run


@pytest.fixture
def answer_steps(monkeypatch):
    """Let steps return the loss and logits that ``answer(number, x, y)`` gives."""

    def replace_answers(answer):
        calls = iter(range(1000))

        def answered(self, x, y):
            loss, logits = answer(next(calls), x, y)
            return STEP(self, x, y)._replace(loss=torch.tensor(float(loss)), logits=logits)

        monkeypatch.setattr(trainer.AdversarialStep, "__call__", answered)

    return replace_answers


# -------------------------------------------------------------------------------------- it trains


def test_training_lowers_the_loss(config, data):
    config = replace(config, augment=False, eps=0.05, step_size=0.03, train_eval=60)
    _, rows = fit(replace(config, epochs=20, eval_every=20), data)
    assert rows[-1]["step_robust_loss"] < 0.8 * rows[0]["step_robust_loss"]
    assert rows[-1]["train_robust_acc"] > 0.5
    assert all("test_robust_acc" not in row for row in rows[:-1])


@pytest.mark.parametrize("gamma", [0.0, 0.01])
@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_lowers_its_loss(method, gamma):
    """Two epochs of the quickstart's task; its batches, cut, so that it takes no minutes."""
    config = replace(QUICKSTART, method=method, gamma=gamma, epochs=2, train_steps=2, lr=0.05)
    data = load_digits().limit(QUICKSTART_IMAGES, 32)
    unlabeled = init = None
    if method == "rst":
        rest, _ = load_digits().split(QUICKSTART_IMAGES)
        unlabeled = PseudoLabeled(rest.x_train, rest.y_train)
    if method == "pretrain":
        config = replace(config, lr=0.01)
        task = replace(data, y_train=data.y_train % 2, y_test=data.y_test % 2, classes=("0", "1"))
        init = fit(replace(config, method="at", epochs=1), task)[0].state_dict()
    _, rows = fit(config, data, unlabeled=unlabeled, init=init)
    assert rows[-1]["step_robust_loss"] < 0.97 * rows[0]["step_robust_loss"]


@pytest.mark.parametrize("method", ["at", "trades", "mart", "gkl", "score"])
@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_every_method_trains_with_mixup(config, data, method, gamma):
    config = replace(config, method=method, gamma=gamma, mixup=1.4, label_smoothing=0.1)
    assert all(math.isfinite(row["step_robust_loss"]) for row in fit(config, data)[1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_by_graphs_equals_an_eager_one(config, data, precision, request):
    config = replace(config, precision=precision)
    model, rows = fit(config, data)
    graphs = request.getfixturevalue("cpu_graphs")
    captured, rows_captured = fit(config, data)
    assert graphs.replays > 5
    for a, b in zip(rows, rows_captured, strict=True):
        for name in a.keys() - {"seconds", "eval_seconds"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6)
    for a, b in zip(model.state_dict().values(), captured.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_with_a_growing_eps_the_graphs_of_earlier_epochs_are_gone(
    config, data, request, monkeypatch
):
    """Each epoch captures its attack anew."""
    config = replace(config, eps_schedule="linear", batch_size=12, epochs=4, eval_every=4)
    model, rows = fit(config, data)
    counting = request.getfixturevalue("cpu_graphs")
    alive = weakref.WeakSet()
    monkeypatch.setattr(_Graph, "__init__", noting(_Graph.__init__, alive.add))
    kept = []
    captured, rows_captured = fit(config, data, on_epoch=lambda row: kept.append(len(alive)))
    assert counting.captures >= 4
    assert counting.replays >= 4
    assert kept == [1, 1, 1, 1]
    for a, b in zip(rows, rows_captured, strict=True):
        assert a["step_robust_loss"] == pytest.approx(b["step_robust_loss"], rel=1e-3)
    for a, b in zip(model.state_dict().values(), captured.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def noting(function, note):
    def noted(self, *args):
        note(self)
        function(self, *args)

    return noted


# -------------------------------------------------------------------------- what the settings do


@pytest.mark.parametrize(("norm", "method"), [("linf", "at"), ("l2", "trades")])
def test_eps_grows_linearly_to_its_value(config, data, monkeypatch, norm, method):
    seen, attacks = [], set()
    attack = PGD.__call__

    def attacking(self, *args):
        attacks.add((self.steps, self.eps))
        return attack(self, *args)

    def watched(self, x, y):
        out = STEP(self, x, y)
        moved = (out.x_adv - x).flatten(1).norm(torch.inf if norm == "linf" else 2, dim=1)
        seen.append((self.attack.eps, self.attack.step_size, moved.max().item()))
        return out

    monkeypatch.setattr(trainer.AdversarialStep, "__call__", watched)
    monkeypatch.setattr(PGD, "__call__", attacking)
    config = replace(config, norm=norm, method=method, epochs=4, eps_schedule="linear")
    fit(replace(config, step_size=0.15, test_steps=5), data)
    assert len(seen) == 4 * 3
    for i, (eps, step_size, moved) in enumerate(seen):
        part = (1 + i // 3) / 4
        assert (eps, step_size) == pytest.approx((0.2 * part, 0.15 * part))
        assert 0.8 * eps < moved < 1.00001 * eps  # the box stops some
    assert {eps for steps, eps in attacks if steps == 5} == {0.2}


@pytest.mark.parametrize("method", ["at", "trades"])
def test_awp_has_its_start_direction_norm_and_number_of_ascents(config, data, method, monkeypatch):
    ascents, attacks = [], []
    first_step, attack = AWP.first_step, PGD.__call__

    def ascending(self, *args, **kwargs):
        (group,) = self.param_groups
        ascents.append((group["gamma"], group["norm"], group["direction"]))
        return first_step(self, *args, **kwargs)

    def attacking(self, *args):
        attacks.append(None)
        return attack(self, *args)

    monkeypatch.setattr(AWP, "first_step", ascending)
    monkeypatch.setattr(PGD, "__call__", attacking)
    monkeypatch.setattr(evaluator, "measure", lambda *args, **kwargs: {})
    config = replace(config, method=method, awp_start=2, awp_norm="l1", direction="random")
    fit(replace(config, ascent_steps=3, alternations=2), data)
    steps = 3  # in the last of three epochs
    assert ascents == [(0.01, "l1", "random")] * (3 * 2 * steps)  # K2, A
    assert len(attacks) >= 2 * steps


@pytest.mark.parametrize(("kind", "size"), [("l1", 0.5), ("l2", 0.25)])
def test_weight_regularization_is_on_weights_alone(config, data, monkeypatch, kind, size):
    """Without momentum, the same step with and without differs by its gradient."""
    before = {}
    build = building.build_model

    def keeping(*args, **kwargs):
        model = build(*args, **kwargs)
        before.update({n: p.detach().clone() for n, p in model.named_parameters()})
        return model

    monkeypatch.setattr(building, "build_model", keeping)
    config = replace(config, epochs=1, batch_size=59, augment=False, momentum=0.0, lr=0.01)
    config = replace(config, weight_decay=0.0)
    plain, _ = fit(config, data)
    regularized, _ = fit(replace(config, **{kind: size}), data)
    for (name, p), q in zip(plain.named_parameters(), regularized.parameters(), strict=True):
        w = before[name]
        gradient = size * (w.sign() if kind == "l1" else w) if w.ndim > 1 else 0 * w
        torch.testing.assert_close(q - p, -0.01 * gradient, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "undecayed"),
    [
        ({}, ()),
        ({"nesterov": True}, ()),
        ({"nesterov": True, "bn_decay": False}, ("bn",)),
        ({"bn_decay": False, "l2": 0.2, "weight_decay": 0.5}, ("bn", "bias")),
    ],
)
def test_an_update_is_sgds_formula(config, data, monkeypatch, settings, undecayed):
    """Sutskever et al. (2013), with the gradients at w + v, in float64."""
    momentum, seen = {}, set()

    def checked(self, x, y):
        before = {n: p.detach().double().clone() for n, p in self.model.named_parameters()}
        out = STEP(self, x, y)
        for name, p in self.model.named_parameters():
            layer = "bn" if ".bn" in f".{name}" or "shortcut.1" in name else ""
            free = layer in undecayed or ("bias" in undecayed and "bias" in name)
            seen.add((name, free))
            w = before[name]
            gradient = p.grad.double() + (0.0 if free else 0.2) * w
            momentum[name] = b = 0.9 * momentum.get(name, 0.0) + gradient
            step = gradient + 0.9 * b if settings.get("nesterov") else b
            torch.testing.assert_close(p.double(), w - 0.05 * step, rtol=1e-5, atol=1e-6)
        return out

    monkeypatch.setattr(trainer.AdversarialStep, "__call__", checked)
    config = replace(
        config, epochs=1, lr=0.05, schedule="constant", **{"weight_decay": 0.2, **settings}
    )
    fit(config, data)
    assert ("conv1.weight", False) in seen
    assert ("linear.bias", "bias" in undecayed) in seen


@pytest.mark.parametrize("bn_momentum", [None, 0.01, 1.0])
def test_batch_norm_has_its_momentum(config, data, bn_momentum):
    model, _ = fit(replace(config, epochs=1, bn_momentum=bn_momentum, eval_every=9), data)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {layer.momentum for layer in layers} == {bn_momentum or 0.1}


@pytest.mark.parametrize(("start", "warmup"), [(0, False), (1, False), (2, True)])
def test_the_average_follows_every_step(config, data, tmp_path, monkeypatch, start, warmup):
    averaged = {}
    steps = iter(range(9))

    def following(self, x, y):
        out = STEP(self, x, y)
        k = next(steps) - 3 * start  # three steps in an epoch
        decay = 0.0 if k < 0 else (1 + k) / (10 + k) if warmup else 0.5
        for name, value in self.model.state_dict().items():
            value = value.detach().double()
            averaged[name] = decay * averaged.get(name, value) + (1 - decay) * value
        return out

    monkeypatch.setattr(trainer.AdversarialStep, "__call__", following)
    fit(replace(config, ema=0.5, ema_start=start, ema_warmup=warmup), data, tmp_path)
    last = torch.load(tmp_path / "last.pt", weights_only=True)["ema"]
    for name, value in averaged.items():
        if value.is_floating_point() and "num_batches" not in name:
            torch.testing.assert_close(last[f"module.{name}"].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_is_that_of_every_pass(config, data, precision, monkeypatch):
    seen = []

    def watched(*args, **kwargs):
        model = build_model(*args, **kwargs)
        model.conv1.register_forward_hook(lambda *call: seen.append((call[0].training, call[2])))
        return model

    monkeypatch.setattr(building, "build_model", watched)
    model, rows = fit(replace(config, precision=precision, epochs=1), data)
    assert {training for training, _ in seen} == {True, False}
    assert {out.dtype for _, out in seen} == {getattr(torch, precision)}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert math.isfinite(rows[0]["test_robust_loss"])


def test_pretraining_starts_from_the_weights_with_a_new_head(config, data, monkeypatch, tmp_path):
    torch.manual_seed(5)
    weights = build_model("preact_resnet_small", num_classes=4, in_channels=1).state_dict()
    started = {}
    load = building.initialize

    def keeping(model, weights):
        fresh = load(model, weights)
        started.update({k: v.clone() for k, v in model.state_dict().items()})
        return fresh

    monkeypatch.setattr(building, "initialize", keeping)
    config = replace(config, method="pretrain", epochs=1)
    model, _ = fit(config, data, tmp_path, init=weights)
    for name, value in weights.items():
        if not name.startswith("linear"):
            assert torch.equal(started[name], value)
    assert model.linear.weight.shape == (10, 64)
    with pytest.raises(ValueError, match="--init"):
        fit(config, data)
    weights["linear.bias"] += 1
    with pytest.raises(ValueError, match=r"init was .*, is"):
        fit(config, data, tmp_path, init=weights, resume=True)


# -------------------------------------------------------------------------- what a step is given


def test_the_seed_decides_order_augmentation_and_results(config, data, batches_of):
    config = replace(config, epochs=1, seed=3)
    (x, y), *_ = batches_of(replace(config, augment=False), data)
    index = torch.randperm(60, generator=torch.Generator().manual_seed(3))[:24]
    assert torch.equal(y, data.y_train[index])
    assert torch.equal(x, data.x_train[index] / 255)
    same = replace(data, x_train=data.x_train[:1].expand(60, -1, -1, -1))
    first, again, other = (
        torch.cat([x for x, _ in batches_of(replace(config, seed=seed), same)])
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    losses = [fit(replace(config, seed=s), data)[1][0]["test_robust_loss"] for s in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("images", "batch_size", "epoch_images", "sizes"),
    [
        (60, 24, 0, [24, 24, 12]),
        (60, 24, 120, [24] * 5),
        (7, 3, 0, [3, 3]),  # BatchNorm cannot train on the one left over
        (4, 1, 0, [1] * 4),
    ],
)
def test_batches_of_an_epoch(config, data, batches_of, images, batch_size, epoch_images, sizes):
    config = replace(config, epochs=1, batch_size=batch_size, epoch_images=epoch_images)
    batches = batches_of(config, data.limit(images, 8))
    assert [len(y) for _, y in batches] == sizes


def test_cutout_blackens_a_square_of_every_image(config, data, batches_of):
    white = replace(data, x_train=torch.full_like(data.x_train, 255))
    for x, _ in batches_of(replace(config, cutout=4, epochs=1, augment=False), white):
        black = (x == 0).sum((1, 2, 3))
        assert 4 <= black.min() <= black.max() <= 16


def test_mixup_mixes_images_and_labels_alike(config, data, batches_of):
    plain = replace(config, epochs=1, augment=False, gamma=0.0)
    before = batches_of(plain, data)
    after = batches_of(replace(plain, mixup=1.4), data)
    for (x, y), (mixed, p) in zip(before, after):
        assert p.shape == (len(y), 10)
        torch.testing.assert_close(p.sum(1), torch.ones(len(y)))
        # One lam for the batch: its own label has at least that.
        lam = p.gather(1, y[:, None]).min()
        rest = (mixed - lam * x) / (1 - lam)
        partners = (rest[:, None] - x[None]).flatten(2).norm(dim=2).argmin(1)
        assert sorted(partners.tolist()) == list(range(len(y)))
        torch.testing.assert_close(mixed, lam * x + (1 - lam) * x[partners], atol=1e-5, rtol=0)
        own, others = (F.one_hot(labels, 10).float() for labels in (y, y[partners]))
        torch.testing.assert_close(p, lam * own + (1 - lam) * others)


@pytest.mark.parametrize("method", ["at", "trades", "mart"])
def test_cutmix_labels_images_by_their_pixels(config, data, batches_of, method):
    plain = replace(config, method=method, epochs=1, augment=False)
    before = batches_of(plain, data)
    after = batches_of(replace(plain, cutmix=1.0), data)
    for (x, y), (mixed, p) in zip(before, after, strict=True):
        foreign = (mixed != x).any(1)
        rows, columns = foreign.any(2).any(0), foreign.any(1).any(0)
        share = rows.sum() * columns.sum() / 64  # digits are black at the border
        own = p.gather(1, y[:, None])[:, 0]
        assert (own.min() <= 1 - share + 1e-6) or share == 0
        torch.testing.assert_close(p.sum(1), torch.ones(len(y)))
        assert torch.equal(mixed[:, :, ~rows], x[:, :, ~rows])
    assert any((p.amax(1) < 1).any() for _, p in after)


def test_idbh_replaces_crops_and_flips(config, data, batches_of, tmp_path):
    with pytest.raises(ValueError, match="at least 11 pixels"):
        fit(replace(config, idbh=True), data)
    large = {
        name: getattr(data, name).repeat_interleave(2, 2).repeat_interleave(2, 3)
        for name in ("x_train", "x_test")
    }
    data = replace(data, **large)
    config = replace(config, epochs=1, gamma=0.0)
    plain = batches_of(replace(config, augment=False), data)
    generator = torch.Generator().manual_seed(config.seed)
    for (x, y), (seen, labels) in zip(plain, batches_of(replace(config, idbh=True), data)):
        assert torch.equal(y, labels)
        expected = idbh_weak((255 * x).round().byte(), generator)
        assert torch.equal(seen, expected / 255)


def test_unlabeled_images_have_their_share_of_every_batch(config, data, batches_of):
    white = PseudoLabeled(torch.full((30, 1, 8, 8), 255, dtype=torch.uint8), torch.full((30,), 7))
    config = replace(config, method="rst", augment=False, epochs=1, unlabeled_share=0.25)
    seen = batches_of(config, data, unlabeled=white)
    assert [len(y) for _, y in seen] == [24, 24, 24]
    for x, y in seen:
        is_white = (x == 1).flatten(1).all(1)
        assert is_white.sum() == 6
        assert (y[is_white] == 7).all()
    with pytest.raises(ValueError, match="--unlabeled FILE or --labeled N"):
        fit(config, data)
    color = PseudoLabeled(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), torch.zeros(9).long())
    with pytest.raises(ValueError, match="8"):
        fit(config, data, unlabeled=color)
    with pytest.raises(ValueError, match="images of both kinds"):
        fit(replace(config, unlabeled_share=0.01), data, unlabeled=white)


def test_held_out_images_are_not_trained_on(config, data, batches_of):
    config = replace(config, select_on="val", val_images=12, augment=False, epochs=1)
    seen = torch.cat([x for x, _ in batches_of(config, data)])
    _, (held, _) = data.split(12)
    distances = (seen[:, None] - held.float()[None] / 255).flatten(2).norm(dim=2)
    assert len(seen) == 48
    assert distances.min() > 0.1


# ------------------------------------------------------------------------------ what it reports


@pytest.mark.parametrize(("images", "sizes"), [(60, (24, 24, 12)), (49, (24, 24))])
def test_step_metrics_are_means_over_the_images_trained_on(
    config, data, answer_steps, images, sizes
):
    """Of 49 images, one is left over and dropped."""
    answer_steps(lambda i, x, y: (i % len(sizes), F.one_hot((y + (i > 0)) % 10, 10)))
    _, rows = fit(replace(config, epochs=2), data.limit(images, 8))
    mean = sum(i * n for i, n in enumerate(sizes)) / sum(sizes)
    assert [row["step_robust_loss"] for row in rows] == pytest.approx([mean, mean])
    assert rows[0]["step_robust_acc"] == pytest.approx(sizes[0] / sum(sizes))
    assert rows[1]["step_robust_acc"] == 0


def test_accuracy_with_mixup_counts_the_likelier_label(config, data, answer_steps):
    answer_steps(lambda i, x, y: (0, y))
    _, rows = fit(replace(config, epochs=1, mixup=1.4), data)
    assert rows[0]["step_robust_acc"] == 1


@pytest.mark.parametrize("schedule", ["piecewise", "cosine", "cyclic"])
def test_the_rate_of_each_row_is_that_of_its_first_step(config, data, watch_steps, schedule):
    rates = []
    watch_steps(lambda step, x, y: rates.append(step.optimizer.param_groups[0]["lr"]))
    _, rows = fit(replace(config, epochs=4, schedule=schedule, eval_every=4), data)
    assert [row["lr"] for row in rows] == pytest.approx(rates[::3])
    assert len(set(rates)) > 2


# ---------------------------------------------------------------------------- what is not finite


def test_a_loss_that_is_not_finite_ends_the_run(config, data, tmp_path):
    config = replace(config, lr=1e30, gamma=0.0)
    with pytest.raises(FloatingPointError, match=r"loss .* step 2 of 3 of epoch 1, .*1e\+30.*--lr"):
        fit(config, data, tmp_path)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("broken", ["loss", "weights", "statistics"])
def test_the_last_good_checkpoint_is_kept(config, data, tmp_path, monkeypatch, broken):
    """The weights after the last step of an epoch are in no loss before the next."""
    calls = []

    def breaking(self, x, y):
        out = STEP(self, x, y)
        calls.append(None)
        if broken == "weights" and len(calls) == 6:
            self.model.conv1.weight.detach()[0] = math.nan
        if broken == "statistics" and len(calls) == 6:
            self.model.bn.running_var[0] = math.nan
        if broken == "loss" and len(calls) == 5:
            out = out._replace(loss=out.loss * math.inf)
        return out

    monkeypatch.setattr(trainer.AdversarialStep, "__call__", breaking)
    what, step = ("loss is", 2) if broken == "loss" else ("weights are", 3)
    rate = 0.1 if broken == "loss" else 0.01  # piecewise, of 9 steps: the fifth, the sixth
    message = rf"{what} not finite at step {step} of 3 of epoch 2, at a learning rate of {rate}:"
    with pytest.raises(FloatingPointError, match=message):
        fit(config, data, tmp_path)
    monkeypatch.undo()
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["rows"][-1]["epoch"] == 0
    assert all(v.isfinite().all() for v in last["model"].values())
    fit(config, data, tmp_path, resume=True)


@pytest.mark.parametrize("stopped_after", [1, 2])
def test_a_stop_does_not_save_what_is_not_finite(config, data, tmp_path, stopped_after):
    asked = []

    def stop():
        asked.append(None)
        return len(asked) > stopped_after

    with pytest.raises(FloatingPointError):
        fit(replace(config, lr=1e30, gamma=0.0), data, tmp_path, stop=stop)
    assert not (tmp_path / "last.pt").exists()


def test_a_bad_loss_is_found_before_the_epoch_is_over(config, data, monkeypatch):
    monkeypatch.setattr(trainer, "CHECK_EVERY", 2)
    steps = []
    with pytest.raises(FloatingPointError):
        fit(replace(config, lr=1e30), data, on_step=lambda *s: steps.append(s))
    assert len(steps) == 2


@pytest.mark.parametrize("changes", [{}, {"method": "gkl", "ema": 0.5, "eps_schedule": "linear"}])
def test_a_finished_run_leaves_nothing_in_memory(config, data, tmp_path, monkeypatch, changes):
    """On a GPU, its graphs would stay until Python looks for cycles."""
    kept = []
    build = building.build_model

    def watched(*args, **kwargs):
        model = build(*args, **kwargs)
        kept.append(weakref.ref(model))
        return model

    trainer.check(config, data)  # imports of torch's own hold the frames that they are first in
    monkeypatch.setattr(building, "build_model", watched)
    gc.collect()
    gc.disable()
    try:
        model, _ = fit(replace(config, epochs=2, **changes), data, tmp_path)
        (network,) = kept
        assert network() is model
        del model
        assert network() is None
    finally:
        gc.enable()
