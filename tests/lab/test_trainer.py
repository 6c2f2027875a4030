"""The trainer: what it measures, what it writes, and that a run goes on as if never broken off."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from awp_optim import AWP
from awp_optim.attacks import PGD
from awp_optim.lab import evaluator, tensorboard, trainer
from awp_optim.lab.config import METHODS, Config
from awp_optim.lab.data import load_digits
from awp_optim.lab.evaluator import measure
from awp_optim.lab.models import build_model
from awp_optim.lab.pseudo import PseudoLabeled
from awp_optim.lab.recipes import QUICKSTART, QUICKSTART_IMAGES
from awp_optim.lab.run_folder import best, read_metrics
from awp_optim.lab.schedules import SCHEDULES
from awp_optim.lab.trainer import fit
from awp_optim.objectives import AT, MART, TRADES

CONFIG = Config(
    arch="preact_resnet_small",
    gamma=0.01,
    eps=0.2,
    step_size=0.1,
    train_steps=2,
    test_steps=2,
    epochs=3,
    batch_size=24,
    train_eval=20,
)


@pytest.fixture(scope="module")
def data():
    return load_digits().limit(60, 40)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """In every test."""


def without_times(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def test_a_run_writes_its_folder(data, tmp_path):
    steps, epochs = [], []
    model, rows = fit(
        CONFIG, data, tmp_path / "run", on_step=lambda *s: steps.append(s), on_epoch=epochs.append
    )
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert sorted(names - {"tensorboard"}) == [
        "best.pt",
        "config.json",
        "last.pt",
        "metrics.csv",
    ]
    assert steps == [(i, 9) for i in range(1, 10)]
    assert epochs == rows
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["gamma"], config["dataset"], config["train_images"]) == (0.01, data.name, 60)
    for ours, read in zip(rows, read_metrics(tmp_path / "run"), strict=True):
        assert read.keys() == ours.keys()
        assert all(math.isclose(read[k], ours[k], rel_tol=1e-5, abs_tol=1e-9) for k in ours)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    last = torch.load(tmp_path / "run/last.pt", weights_only=True)
    top = torch.load(tmp_path / "run/best.pt", weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(last["model"][name], value)
    assert top["row"] == best(rows)
    loaded = build_model("preact_resnet_small", num_classes=10, in_channels=1)
    loaded.load_state_dict(top["model"])


def test_checkpoints_of_epochs_are_kept(data, tmp_path):
    config = replace(CONFIG, epochs=5, eval_every=5, save_every=2)
    fit(config, data, tmp_path / "run")
    there = sorted(p.name for p in (tmp_path / "run").glob("epoch_*.pt"))
    assert there == ["epoch_0002.pt", "epoch_0004.pt"]
    two = torch.load(tmp_path / "run/epoch_0002.pt", weights_only=True)
    assert two["row"]["epoch"] == 1
    done = []
    shorter, _ = fit(
        config, data, tmp_path / "other", on_epoch=done.append, stop=lambda: len(done) == 2
    )
    for name, value in shorter.state_dict().items():
        assert torch.equal(two["model"][name], value)
    with pytest.raises(ValueError, match="save_every must be at least 0"):
        replace(config, save_every=-1)


def test_training_lowers_the_loss(data):
    changes = {
        "augment": False,
        "eps": 0.05,
        "step_size": 0.03,
        "epochs": 20,
        "eval_every": 20,
        "train_eval": 60,
    }
    config = Config(**{**vars(CONFIG), **changes})
    _, rows = fit(config, data)
    assert rows[-1]["step_robust_loss"] < 0.8 * rows[0]["step_robust_loss"]
    assert rows[-1]["train_robust_acc"] > 0.5
    assert all("test_robust_acc" not in row for row in rows[:-1])


@pytest.mark.parametrize("gamma", [0.0, 0.01])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_its_loss(method, gamma):
    """Three epochs of the quickstart's task; its batches, cut, so that it takes no minutes."""
    config = replace(QUICKSTART, method=method, gamma=gamma, epochs=3, train_steps=2, lr=0.05)
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


def test_each_method_has_its_published_attack_and_objective():
    of = {method: Config(method=method, beta=3.0, label_smoothing=0.1) for method in METHODS}
    assert {m: c.objective for m, c in of.items()} == {
        "at": AT(label_smoothing=0.1),
        "trades": TRADES(beta=3.0, label_smoothing=0.1),
        "mart": MART(lam=3.0, label_smoothing=0.1),
        "rst": TRADES(beta=3.0, label_smoothing=0.1),
        "pretrain": AT(label_smoothing=0.1),
    }
    attacks = {m: c.training_attack for m, c in of.items()}
    assert attacks["at"] == attacks["pretrain"] == PGD(model_mode="train")
    assert attacks["trades"] == attacks["rst"] == PGD(loss="kl", start_std=0.001)
    assert attacks["mart"] == PGD(start_std=0.001)
    assert {c.test_attack for c in of.values()} == {PGD(steps=20)}
    assert Config(attack_mode="eval").training_attack == PGD()


@pytest.mark.parametrize("method", ["at", "trades"])
def test_awp_starts_after_its_epochs(data, method, monkeypatch):
    gammas = []
    first_step = AWP.first_step

    def counting(self, *args, **kwargs):
        gammas.append(self.param_groups[0]["gamma"])
        return first_step(self, *args, **kwargs)

    monkeypatch.setattr(AWP, "first_step", counting)
    config = Config(**{**vars(CONFIG), "awp_start": 2, "method": method})
    fit(config, data)
    assert gammas == [0.01] * 3  # three steps an epoch, in the last of three epochs


def test_random_directions_are_the_papers_rwp(data, monkeypatch):
    seen = set()
    first_step = AWP.first_step

    def looking(self, *args, **kwargs):
        seen.update(self.directions)
        return first_step(self, *args, **kwargs)

    monkeypatch.setattr(AWP, "first_step", looking)
    fit(Config(**{**vars(CONFIG), "direction": "random", "epochs": 1}), data)
    assert seen == {"random"}


@pytest.mark.parametrize(("kind", "size"), [("l1", 0.5), ("l2", 0.25)])
def test_weight_regularisation_is_on_weights_alone(data, monkeypatch, kind, size):
    """Without momentum, the same step with and without differs by its gradient."""
    one = {"epochs": 1, "batch_size": 59, "augment": False, "momentum": 0.0, "lr": 0.01}
    before = {}
    build = trainer.build_model

    def keeping(*args, **kwargs):
        model = build(*args, **kwargs)
        before.update({n: p.detach().clone() for n, p in model.named_parameters()})
        return model

    monkeypatch.setattr(trainer, "build_model", keeping)
    plain = Config(**{**vars(CONFIG), **one, "weight_decay": 0.0})
    without, _ = fit(plain, data)
    having, _ = fit(Config(**{**vars(plain), kind: size}), data)
    for (name, p), q in zip(without.named_parameters(), having.parameters(), strict=True):
        w = before[name]
        gradient = size * (w.sign() if kind == "l1" else w) if w.ndim > 1 else 0 * w
        torch.testing.assert_close(q - p, -0.01 * gradient, rtol=1e-3, atol=1e-7)


def test_cutout_blackens_a_square_of_every_training_image(data, monkeypatch):
    seen = []
    step = trainer.AdversarialStep.__call__

    def looking(self, x, y):
        seen.append((x == 0).sum((1, 2, 3)).min().item())
        return step(self, x, y)

    monkeypatch.setattr(trainer.AdversarialStep, "__call__", looking)
    white = replace(data, x_train=torch.full_like(data.x_train, 255))
    fit(Config(**{**vars(CONFIG), "cutout": 4, "epochs": 1, "augment": False}), white)
    assert all(4 <= black <= 16 for black in seen)
    assert len(seen) == 3


def test_the_average_is_that_of_the_steps_and_goes_on(data, tmp_path, monkeypatch):
    config = Config(**{**vars(CONFIG), "ema": 0.5})
    averaged = {}
    step = trainer.AdversarialStep.__call__

    def following(self, x, y):
        out = step(self, x, y)
        for name, value in self.model.state_dict().items():
            before = averaged.get(name, value)
            averaged[name] = 0.5 * before + 0.5 * value.detach().double()
        return out

    monkeypatch.setattr(trainer.AdversarialStep, "__call__", following)
    _, rows = fit(config, data, tmp_path / "whole")
    monkeypatch.undo()
    last = torch.load(tmp_path / "whole/last.pt", weights_only=True)["ema"]
    for name, value in averaged.items():
        if value.is_floating_point() and "num_batches" not in name:
            torch.testing.assert_close(last[f"module.{name}"].double(), value, rtol=1e-5, atol=1e-6)
    best_one = torch.load(tmp_path / "whole/best.pt", weights_only=True)
    twin = build_model("preact_resnet_small", num_classes=10, in_channels=1)
    twin.load_state_dict(best_one["ema"])
    if best_one["row"] == rows[-1]:
        figures = measure(twin, data.x_test, data.y_test, config.test_attack)
        assert figures["natural_acc"] == rows[-1]["ema_test_natural_acc"]
    assert rows[-1]["ema_test_natural_loss"] != rows[-1]["test_natural_loss"]
    assert read_metrics(tmp_path / "whole")[0].keys() == rows[0].keys()

    done = []
    fit(config, data, tmp_path / "parts", on_epoch=done.append, stop=lambda: len(done) == 1)
    fit(config, data, tmp_path / "parts", resume=True)
    again = torch.load(tmp_path / "parts/last.pt", weights_only=True)["ema"]
    assert all(torch.equal(again[name], value) for name, value in last.items())


def test_measures_the_model_in_eval_mode(data):
    torch.manual_seed(0)
    model = build_model("preact_resnet_small", num_classes=10, in_channels=1)
    model.bn.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attack = PGD(0.2, 0.1, 2, random_start=False)
    figures = measure(model, data.x_test, data.y_test, attack, "x_", batch_size=7)
    assert model.training
    assert not model.bn.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    x = data.x_test.double() / 255
    model.double().eval()
    for kind, inputs in (("natural", x), ("robust", attack(model, x, data.y_test))):
        with torch.no_grad():
            logits = model(inputs)
        loss = F.cross_entropy(logits, data.y_test).item()
        assert figures[f"x_{kind}_loss"] == pytest.approx(loss, rel=1e-5)
        correct = (logits.argmax(1) == data.y_test).double().mean().item()
        assert figures[f"x_{kind}_acc"] == pytest.approx(correct)


def test_a_single_example_left_over_is_dropped(data):
    """BatchNorm cannot train on it where the last feature map is a single pixel."""
    config = Config(**{**vars(CONFIG), "arch": "preact_resnet18", "epochs": 1, "batch_size": 3})
    steps = []
    fit(config, data.limit(7, 4), on_step=lambda *s: steps.append(s))
    assert steps == [(1, 2), (2, 2)]


def test_the_seed_decides_everything(data):
    first, again, other = (
        without_times(fit(Config(**{**vars(CONFIG), "seed": seed, "epochs": 2}), data)[1])
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("broken_after", [1, 2])
def test_a_resumed_run_equals_one_that_went_on(data, tmp_path, broken_after):
    config = CONFIG
    model, rows = fit(config, data, tmp_path / "whole")

    def stop(row):
        if row["epoch"] + 1 == broken_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, data, tmp_path / "broken", on_epoch=stop)
    torch.manual_seed(77)
    resumed, rows_resumed = fit(config, data, tmp_path / "broken", resume=True)
    for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert without_times(rows_resumed) == without_times(rows)
    assert without_times(read_metrics(tmp_path / "broken")) == without_times(
        read_metrics(tmp_path / "whole")
    )


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5, 6, 7, 8, 12])
def test_a_stopped_run_goes_on_as_if_it_had_not(data, tmp_path, stop_at):
    """Stopped before, after and between steps, and while evaluating."""
    config = Config(**{**vars(CONFIG), "epochs": 2, "ema": 0.5, "mixup": 1.4})
    model, rows = fit(config, data, tmp_path / "whole")
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == stop_at

    _, first = fit(config, data, tmp_path / "parts", stop=stop)
    assert len(asked) == stop_at  # it ended there
    assert without_times(first) == without_times(rows[: len(first)])
    assert len(first) == (stop_at - 1) // 6  # asked before and between 3 steps, and 3 evaluations
    torch.manual_seed(77)
    resumed, both = fit(config, data, tmp_path / "parts", resume=True, stop=lambda: False)
    assert without_times(both) == without_times(rows)
    for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for name in ("best.pt", "last.pt"):
        ours, theirs = (
            torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "parts")
        )
        assert ours.keys() == theirs.keys()
        for part in ("model", "ema"):
            assert all(torch.equal(v, theirs[part][k]) for k, v in ours[part].items())


def test_a_run_from_before_a_setting_existed_goes_on(data, tmp_path):
    done = []
    fit(CONFIG, data, tmp_path, on_epoch=done.append, stop=lambda: len(done) == 1)
    file = tmp_path / "config.json"
    about = json.loads(file.read_text())
    for name in ("precision", "ascent", "mixup", "unlabeled_images", "init"):
        del about[name]
    file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="precision was float32, is bfloat16"):
        fit(Config(**{**vars(CONFIG), "precision": "bfloat16"}), data, tmp_path, resume=True)
    _, rows = fit(CONFIG, data, tmp_path, resume=True)
    assert len(rows) == CONFIG.epochs


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_is_that_of_every_pass(data, precision, monkeypatch):
    seen = []

    def watched(*args, **kwargs):
        model = build_model(*args, **kwargs)
        model.conv1.register_forward_hook(lambda *call: seen.append((call[0].training, call[2])))
        return model

    monkeypatch.setattr(trainer, "build_model", watched)
    config = Config(**{**vars(CONFIG), "precision": precision, "epochs": 1})
    model, rows = fit(config, data)
    assert {training for training, _ in seen} == {True, False}
    assert {out.dtype for _, out in seen} == {getattr(torch, precision)}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert math.isfinite(rows[0]["test_robust_loss"])


def test_the_step_and_the_evaluation_get_their_settings(data, monkeypatch):
    steps, captured = [], []

    class Step(trainer.AdversarialStep):
        def __init__(self, *args, **kwargs):
            steps.append(kwargs)
            super().__init__(*args, **kwargs)

    class Captured(evaluator.Captured):
        def __call__(self, model, x, y):
            captured.append(len(y))
            return super().__call__(model, x, y)

    monkeypatch.setattr(trainer, "AdversarialStep", Step)
    monkeypatch.setattr(evaluator, "Captured", Captured)
    fit(Config(**{**vars(CONFIG), "ascent": "attack", "epochs": 1}), data)
    assert steps == [{"ascent": "attack", "alternations": 1, "autocast": None}]
    assert captured == [20, 40]


def test_a_folder_in_use_and_changed_settings_are_refused(data, tmp_path):
    config = Config(**{**vars(CONFIG), "epochs": 1})
    fit(config, data, tmp_path)
    with pytest.raises(FileExistsError, match="--resume"):
        fit(config, data, tmp_path)
    with pytest.raises(ValueError, match=r"gamma was 0\.01, is 0\.02"):
        fit(Config(**{**vars(config), "gamma": 0.02}), data, tmp_path, resume=True)
    fit(config, data, tmp_path, resume=True)  # nothing left to do


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    config = Config(**{**vars(CONFIG), "lr": 1e30, "gamma": 0.0})
    with pytest.raises(
        FloatingPointError, match=r"loss is not finite at step 2 of 3 of epoch 1, .* 1e\+30.*--lr"
    ):
        fit(config, data, tmp_path)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("broken", ["loss", "weights", "statistics"])
def test_the_last_good_checkpoint_is_kept(data, tmp_path, monkeypatch, broken):
    """The weights after the last step of an epoch are in no loss before the next."""
    step = trainer.AdversarialStep.__call__
    calls = []

    def breaking(self, x, y):
        out = step(self, x, y)
        calls.append(None)
        if broken == "weights" and len(calls) == 6:
            self.model.conv1.weight.detach()[0] = math.nan
        if broken == "statistics" and len(calls) == 6:
            self.model.bn.running_var[0] = math.nan
        if broken == "loss" and len(calls) == 5:
            out = out._replace(loss=out.loss * math.inf)
        return out

    monkeypatch.setattr(trainer.AdversarialStep, "__call__", breaking)
    said = (
        "loss is not finite at step 2" if broken == "loss" else "weights are not finite at step 3"
    )
    rate = 0.1 if broken == "loss" else 0.01  # piecewise, of 9 steps: the fifth, the sixth
    config = replace(CONFIG, schedule="piecewise")
    with pytest.raises(
        FloatingPointError, match=rf"{said} of 3 of epoch 2, at a learning rate of {rate}:"
    ):
        fit(config, data, tmp_path)
    monkeypatch.undo()
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["row"]["epoch"] == 0
    assert all(v.isfinite().all() for v in last["model"].values())
    fit(CONFIG, data, tmp_path, resume=True)


@pytest.mark.parametrize("stopped_after", [1, 2])
def test_what_is_not_finite_is_not_saved_by_a_stop_either(
    data, tmp_path, monkeypatch, stopped_after
):
    config = Config(**{**vars(CONFIG), "lr": 1e30, "gamma": 0.0})
    asked = []

    def stop():
        asked.append(None)
        return len(asked) > stopped_after

    with pytest.raises(FloatingPointError):
        fit(config, data, tmp_path, stop=stop)
    assert not (tmp_path / "last.pt").exists()


def test_a_bad_loss_is_found_before_the_epoch_is_over(data, monkeypatch):
    monkeypatch.setattr(trainer, "CHECK_EVERY", 2)
    steps = []
    with pytest.raises(FloatingPointError):
        fit(Config(**{**vars(CONFIG), "lr": 1e30}), data, on_step=lambda *s: steps.append(s))
    assert len(steps) == 2


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "metrics.csv"])
def test_a_file_is_never_half_written(data, tmp_path, monkeypatch, name):
    done = []
    fit(CONFIG, data, tmp_path, on_epoch=done.append, stop=lambda: len(done) == 1)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    replace_file = os.replace

    def failing(source, target):
        if target.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(trainer, "best", lambda rows: rows[-1])  # each epoch is the best
    with pytest.raises(OSError, match=rf"{name} could not be written \(No space left.*--resume"):
        fit(CONFIG, data, tmp_path, resume=True)
    assert (tmp_path / name).read_bytes() == before[name]
    assert not list(tmp_path.glob(".*"))
    # What comes after a file is not written without it: no best epoch is forgotten.
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["row"]["epoch"]
    assert saved == 0
    monkeypatch.undo()
    _, rows = fit(CONFIG, data, tmp_path, resume=True)
    assert without_times(rows) == without_times(fit(CONFIG, data)[1])


def test_leftovers_of_a_killed_run_are_cleared_away(data, tmp_path):
    done = []
    fit(CONFIG, data, tmp_path, on_epoch=done.append, stop=lambda: len(done) == 1)
    (tmp_path / ".last.pt.1234.part").write_bytes(b"half")
    fit(CONFIG, data, tmp_path, resume=True)
    assert not list(tmp_path.glob(".*"))


def truncated(file):
    file.write_bytes(file.read_bytes()[:1000])


def other(content):
    return lambda file: torch.save(content, file)


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("not a checkpoint"),
        other([1, 2]),
        other({"model": {}, "optimizer": {}}),
        other({"model": {}, "optimizer": {}, "rows": [], "random": []}),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_a_clear_error(data, tmp_path, damage):
    done = []
    fit(CONFIG, data, tmp_path, on_epoch=done.append, stop=lambda: len(done) == 1)
    whole = (tmp_path / "last.pt").read_bytes()
    damage(tmp_path / "last.pt")
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    with pytest.raises(ValueError, match=r"last\.pt is not a checkpoint of this run, or damaged"):
        fit(CONFIG, data, tmp_path, resume=True)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == before
    (tmp_path / "last.pt").write_bytes(whole)
    fit(CONFIG, data, tmp_path, resume=True)


def test_a_checkpoint_of_another_run_is_not_gone_on_with(data, tmp_path):
    config = replace(CONFIG, epochs=2)
    for name, c in (("ours", config), ("other", replace(config, seed=5, gamma=0.02))):
        fit(c, data, tmp_path / name)
    (tmp_path / "ours/last.pt").write_bytes((tmp_path / "other/last.pt").read_bytes())
    with pytest.raises(ValueError, match=r"gamma was 0\.02, is 0\.01, seed was 5, is 0"):
        fit(config, data, tmp_path / "ours", resume=True)


@pytest.mark.parametrize("there", ["last.pt", "best.pt", "metrics.csv"])
def test_a_run_without_its_config_is_not_overwritten(data, tmp_path, there):
    (tmp_path / there).write_bytes(b"a run's")
    with pytest.raises(FileExistsError, match="--resume"):
        fit(CONFIG, data, tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        fit(CONFIG, data, tmp_path, resume=True)
    assert [file.name for file in tmp_path.iterdir()] == [there]


def test_a_run_that_has_saved_nothing_takes_new_settings(data, tmp_path):
    fit(CONFIG, data, tmp_path, stop=lambda: True)
    with pytest.raises(FileExistsError):
        fit(CONFIG, data, tmp_path)
    fit(replace(CONFIG, lr=0.01, epochs=1), data, tmp_path, resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.01


def test_other_data_of_the_same_size_is_not_gone_on_with(data, tmp_path):
    config = replace(CONFIG, epochs=1)
    fit(config, data, tmp_path)
    changed = data.x_test.clone()
    changed[7, 0, 3, 3] ^= 1
    others = (
        replace(data, x_test=changed),
        replace(data, y_train=(data.y_train + 1) % 10),
        replace(data, x_train=data.x_train.flip(0), y_train=data.y_train.flip(0)),
    )
    for other in others:
        with pytest.raises(ValueError, match=r"data was .*, is"):
            fit(config, other, tmp_path, resume=True)
    fit(config, data, tmp_path, resume=True)


def test_a_run_does_not_change_its_device(data, tmp_path):
    fit(replace(CONFIG, epochs=1), data, tmp_path)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save({**saved, "device": "cuda"}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="the run was on cuda"):
        fit(replace(CONFIG, epochs=1), data, tmp_path, resume=True)


@pytest.mark.parametrize("error", [PermissionError("no"), torch.OutOfMemoryError("no")])
def test_what_is_no_damage_is_not_called_so(data, tmp_path, monkeypatch, error):
    fit(replace(CONFIG, epochs=1), data, tmp_path)

    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(type(error)):
        fit(replace(CONFIG, epochs=1), data, tmp_path, resume=True)


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"gamma": 0.0'])
def test_a_damaged_config_is_a_clear_error(data, tmp_path, text):
    config = Config(**{**vars(CONFIG), "epochs": 1})
    fit(config, data, tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        fit(config, data, tmp_path, resume=True)
    assert (tmp_path / "config.json").read_text() == text


def test_metrics_are_complete_after_a_kill_before_they_were_written(data, tmp_path):
    fit(CONFIG, data, tmp_path)
    metrics = tmp_path / "metrics.csv"
    whole = metrics.read_text()
    metrics.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    fit(CONFIG, data, tmp_path, resume=True)
    assert metrics.read_text() == whole


def logged(folder):
    """TensorBoard's own reading of its logs: values by tag and epoch."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_is_told_what_the_metrics_say(data, tmp_path):
    fit(CONFIG, data, tmp_path / "whole")
    done = []
    fit(CONFIG, data, tmp_path / "parts", on_epoch=done.append, stop=lambda: len(done) == 2)
    time.sleep(1.1)  # the order of its files is that of their seconds
    fit(CONFIG, data, tmp_path / "parts", resume=True)
    logs, parts = logged(tmp_path / "whole"), logged(tmp_path / "parts")
    for row in read_metrics(tmp_path / "whole"):
        epoch = int(row["epoch"])
        assert logs["lr"][epoch] == pytest.approx(row["lr"])
        for name in ("acc", "loss"):
            expected = pytest.approx(row[f"test_robust_{name}"], rel=1e-4)
            assert logs[f"{name}/test_robust"][epoch] == expected
            assert parts[f"{name}/test_robust"][epoch] == expected


def test_logs_that_cannot_be_written_do_not_stop_a_run(data, tmp_path, monkeypatch):
    class Full:
        def add_scalar(self, *args):
            raise OSError(errno.ENOSPC, "No space left on device")

        close = add_scalar

    monkeypatch.setattr(tensorboard, "_open_writer", lambda *args: Full())
    with pytest.warns(RuntimeWarning, match="no more logs for TensorBoard.*No space") as warned:
        _, rows = fit(CONFIG, data, tmp_path)
    assert len(rows) == 3
    assert len(warned) == 1


# --------------------------------------------------------------------- what a step is given


def batches_of(config, data, monkeypatch, **kwargs):
    """The inputs and labels of every training step."""
    seen = []
    step = trainer.AdversarialStep.__call__

    def looking(self, x, y):
        seen.append((x.clone(), y.clone()))
        return step(self, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.AdversarialStep, "__call__", looking)
        fit(config, data, **kwargs)
    return seen


def test_mixup_mixes_images_and_labels_alike(data, monkeypatch):
    plain = Config(**{**vars(CONFIG), "epochs": 1, "augment": False, "gamma": 0.0})
    before = batches_of(plain, data, monkeypatch)
    after = batches_of(replace(plain, mixup=1.4), data, monkeypatch)
    for (x, y), (mixed, p) in zip(before, after):
        assert p.shape == (len(y), 10)
        torch.testing.assert_close(p.sum(1), torch.ones(len(y)))
        # One lam for the whole batch: its own label has at least that.
        lam = p.gather(1, y[:, None]).min()
        rest = (mixed - lam * x) / (1 - lam)
        partners = (rest[:, None] - x[None]).flatten(2).norm(dim=2).argmin(1)
        assert sorted(partners.tolist()) == list(range(len(y)))
        torch.testing.assert_close(mixed, lam * x + (1 - lam) * x[partners], atol=1e-5, rtol=0)
        own, others = (F.one_hot(labels, 10).float() for labels in (y, y[partners]))
        torch.testing.assert_close(p, lam * own + (1 - lam) * others)


@pytest.mark.parametrize("method", ["at", "trades", "mart"])
@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_every_method_trains_with_mixup(data, method, gamma):
    config = Config(**{**vars(CONFIG), "method": method, "gamma": gamma, "mixup": 1.4})
    rows = fit(replace(config, label_smoothing=0.1), data)[1]
    assert all(math.isfinite(row["step_robust_loss"]) for row in rows)


def test_unlabelled_images_have_their_share_of_every_batch(data, monkeypatch):
    white = PseudoLabeled(torch.full((30, 1, 8, 8), 255, dtype=torch.uint8), torch.full((30,), 7))
    config = Config(
        **{**vars(CONFIG), "method": "rst", "augment": False, "epochs": 1, "unlabeled_share": 0.25}
    )
    seen = batches_of(config, data, monkeypatch, unlabeled=white)
    assert [len(y) for _, y in seen] == [24, 24, 24]
    for x, y in seen:
        is_white = (x == 1).flatten(1).all(1)
        assert is_white.sum() == 6
        assert (y[is_white] == 7).all()
    with pytest.raises(ValueError, match="--unlabeled FILE or --labeled N"):
        fit(config, data)
    colour = PseudoLabeled(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), torch.zeros(9).long())
    with pytest.raises(ValueError, match="8"):
        fit(config, data, unlabeled=colour)


def answering(monkeypatch, answer):
    """Let every training step return the loss and logits that ``answer(number, x, y)`` says."""
    calls = iter(range(1000))
    step = trainer.AdversarialStep.__call__

    def answered(self, x, y):
        loss, logits = answer(next(calls), x, y)
        return step(self, x, y)._replace(loss=torch.tensor(float(loss)), logits=logits)

    monkeypatch.setattr(trainer.AdversarialStep, "__call__", answered)


@pytest.mark.parametrize(("images", "sizes"), [(60, (24, 24, 12)), (49, (24, 24))])
def test_step_figures_are_means_over_the_images_trained_on(data, monkeypatch, images, sizes):
    """Of 49, one is left over and dropped."""
    answering(monkeypatch, lambda i, x, y: (i % len(sizes), F.one_hot((y + (i > 0)) % 10, 10)))
    _, rows = fit(Config(**{**vars(CONFIG), "epochs": 2}), data.limit(images, 8))
    mean = sum(i * n for i, n in enumerate(sizes)) / sum(sizes)
    assert [row["step_robust_loss"] for row in rows] == pytest.approx([mean, mean])
    assert rows[0]["step_robust_acc"] == pytest.approx(sizes[0] / sum(sizes))
    assert rows[1]["step_robust_acc"] == 0


def test_accuracy_with_mixup_is_of_the_greater_share(data, monkeypatch):
    answering(monkeypatch, lambda i, x, y: (0, y))
    _, rows = fit(Config(**{**vars(CONFIG), "epochs": 1, "mixup": 1.4}), data)
    assert rows[0]["step_robust_acc"] == 1


def test_the_rate_of_each_row_is_that_of_its_first_step(data, monkeypatch):
    rates = []

    def looking(self, x, y, step=trainer.AdversarialStep.__call__):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return step(self, x, y)

    monkeypatch.setattr(trainer.AdversarialStep, "__call__", looking)
    for schedule in ("piecewise", "cosine", "cyclic"):
        rates.clear()
        config = Config(**{**vars(CONFIG), "epochs": 4, "schedule": schedule, "eval_every": 4})
        _, rows = fit(config, data)
        assert [row["lr"] for row in rows] == pytest.approx(rates[::3])
        assert len(set(rates)) > 2


def test_the_order_and_the_augmentation_are_the_seeds(data, monkeypatch):
    config = Config(**{**vars(CONFIG), "epochs": 1, "augment": False, "seed": 3})
    (x, y), *_ = batches_of(config, data, monkeypatch)
    index = torch.randperm(60, generator=torch.Generator().manual_seed(3))[:24]
    assert torch.equal(y, data.y_train[index])
    assert torch.equal(x, data.x_train[index] / 255)
    same = replace(data, x_train=data.x_train[:1].expand(60, -1, -1, -1))
    config = replace(config, augment=True)
    first, again, other = (
        torch.cat([x for x, _ in batches_of(replace(config, seed=seed), same, monkeypatch)])
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_epoch_can_have_more_images(data, monkeypatch):
    config = Config(**{**vars(CONFIG), "epoch_images": 120, "epochs": 1})
    assert [len(y) for _, y in batches_of(config, data, monkeypatch)] == [24] * 5


def test_pretraining_starts_from_the_weights_with_a_new_head(data, monkeypatch):
    torch.manual_seed(5)
    other_task = build_model("preact_resnet_small", num_classes=4, in_channels=1)
    started = {}
    load = trainer.initialize

    def keeping(model, weights):
        fresh = load(model, weights)
        started.update({k: v.clone() for k, v in model.state_dict().items()})
        return fresh

    monkeypatch.setattr(trainer, "initialize", keeping)
    config = Config(**{**vars(CONFIG), "method": "pretrain", "epochs": 1})
    model, _ = fit(config, data, init=other_task.state_dict())
    for name, value in other_task.state_dict().items():
        if not name.startswith("linear"):
            assert torch.equal(started[name], value)
    assert model.linear.weight.shape == (10, 64)
    with pytest.raises(ValueError, match="--init"):
        fit(config, data)


def test_a_run_goes_on_from_the_weights_it_began_with(data, tmp_path):
    torch.manual_seed(5)
    weights = build_model("preact_resnet_small", num_classes=10, in_channels=1).state_dict()
    config = Config(**{**vars(CONFIG), "method": "pretrain", "epochs": 1})
    fit(config, data, tmp_path, init=weights)
    fit(config, data, tmp_path, init=weights, resume=True)
    weights["linear.bias"] += 1
    with pytest.raises(ValueError, match=r"init was .*, is"):
        fit(config, data, tmp_path, init=weights, resume=True)


# ------------------------------------------------------------------------- picking the best


def test_the_best_is_picked_on_images_held_out(data, tmp_path):
    config = Config(**{**vars(CONFIG), "select_on": "val", "val_images": 12})
    model, rows = fit(config, data, tmp_path)
    _, (x, y) = data.split(12)
    figures = measure(model, x, y, replace(config, eps=0.0).test_attack)
    assert rows[-1]["val_natural_acc"] == figures["natural_acc"]
    assert json.loads((tmp_path / "config.json").read_text())["train_images"] == 60
    top = torch.load(tmp_path / "best.pt", weights_only=True)["row"]
    assert top["val_robust_acc"] == max(row["val_robust_acc"] for row in rows)
    assert read_metrics(tmp_path)[0].keys() == rows[0].keys()


def test_best_prefers_the_images_held_out():
    rows = [
        {"epoch": 0, "test_robust_acc": 0.9, "val_robust_acc": 0.1},
        {"epoch": 1},
        {"epoch": 2, "test_robust_acc": 0.1, "val_robust_acc": 0.5},
        {"epoch": 3, "test_robust_acc": 0.8, "val_robust_acc": 0.5},
    ]
    assert best(rows)["epoch"] == 2
    assert best([{"epoch": 0, "test_robust_acc": 0.9}])["epoch"] == 0


def test_there_must_be_more_images_than_are_held_out(data):
    with pytest.raises(ValueError, match="val_images must be fewer than the 60 training images"):
        fit(Config(**{**vars(CONFIG), "select_on": "val", "val_images": 60}), data)


def test_the_last_epoch_is_evaluated_in_any_case(data):
    _, rows = fit(Config(**{**vars(CONFIG), "eval_every": 2}), data)
    assert ["test_robust_acc" in row for row in rows] == [False, True, True]


def test_the_best_average_is_saved_with_the_best_weights(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "best", lambda rows: rows[-1])
    fit(Config(**{**vars(CONFIG), "ema": 0.5}), data, tmp_path)
    top, last = (torch.load(tmp_path / n, weights_only=True) for n in ("best.pt", "last.pt"))
    for name, value in top["ema"].items():
        assert torch.equal(value, last["ema"][f"module.{name}"])
    assert not torch.equal(top["ema"]["linear.weight"], top["model"]["linear.weight"])


def test_held_out_images_are_not_trained_on(data, monkeypatch):
    config = Config(
        **{**vars(CONFIG), "select_on": "val", "val_images": 12, "augment": False, "epochs": 1}
    )
    seen = torch.cat([x for x, _ in batches_of(config, data, monkeypatch)])
    _, (held, _) = data.split(12)
    distances = (seen[:, None] - held.float()[None] / 255).flatten(2).norm(dim=2)
    assert len(seen) == 48
    assert distances.min() > 0.1


def test_early_stopping_waits_for_a_new_best(data, tmp_path, monkeypatch):
    accuracies = iter([0.1, 0.3, 0.2, 0.3, 0.4, 0.4, 0.1, 0.2, 0.9])

    def measured(*args, **kwargs):
        row = measure(*args, **kwargs)
        if args[4] == "test_":
            row["test_robust_acc"] = next(accuracies)
        return row

    monkeypatch.setattr(evaluator, "measure", measured)
    config = Config(**{**vars(CONFIG), "epochs": 9, "patience": 3})
    _, rows = fit(config, data, tmp_path)
    assert len(rows) == 8  # the best was the fifth, and three have brought none
    assert trainer.is_over(config, rows)
    assert not trainer.is_over(config, rows[:-1])
    _, again = fit(config, data, tmp_path, resume=True)  # it is over, and knows
    assert len(again) == 8


@pytest.mark.parametrize(
    ("best_epoch", "eval_every", "patience", "length"), [(1, 2, 1, 4), (3, 2, 3, 8), (3, 4, 1, 8)]
)
def test_early_stopping_waits_for_an_evaluation(best_epoch, eval_every, patience, length):
    """The last row is always evaluated, and a new best could still be found in it."""
    config = replace(CONFIG, epochs=20, eval_every=eval_every, patience=patience)
    rows = []
    while not trainer.is_over(config, rows):
        row = {"epoch": len(rows)}
        if (len(rows) + 1) % eval_every == 0:
            row["test_robust_acc"] = float(len(rows) == best_epoch)
        rows.append(row)
    assert len(rows) == length


# ------------------------------------------------------------ K2, A and the norm of Figure 2


def test_ascents_and_alternations_are_those_of_the_paper(data, monkeypatch):
    ascents, attacks = [], []
    first_step, attack = AWP.first_step, PGD.__call__

    def counted(self, *args, **kwargs):
        ascents.append(self.param_groups[0]["norm"])
        return first_step(self, *args, **kwargs)

    def attacked(self, *args):
        attacks.append(None)
        return attack(self, *args)

    config = Config(
        **{**vars(CONFIG), "ascent_steps": 3, "alternations": 2, "awp_norm": "l1", "epochs": 1},
    )
    monkeypatch.setattr(AWP, "first_step", counted)
    monkeypatch.setattr(PGD, "__call__", attacked)
    monkeypatch.setattr(evaluator, "measure", lambda *args, **kwargs: {})
    fit(config, data)
    assert ascents == ["l1"] * (3 * 2 * 3)  # K2, A, steps
    assert len(attacks) == 2 * 3


# ------------------------------------------------------------------------ killed at random


def run_script(name, *arguments):
    script = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("number", "kills"), [("SIGKILL", 25), ("SIGTERM", 10)])
def test_killed_at_random_times_and_resumed_it_ends_as_if_left_alone(tmp_path, number, kills):
    lines = run_script("killed_runs.py", tmp_path, kills, number)
    counts = [int(line.split()[1]) for line in lines]
    assert sum(counts) >= kills
    for line in lines:
        assert "different: []; files: best.pt config.json last.pt metrics.csv" in line


@pytest.mark.parametrize("kind", ["a limit", "a file system"])
def test_a_full_disk_loses_nothing(tmp_path, kind):
    if kind == "a limit":
        lines = run_script("full_disk.py", tmp_path / "run", 100_000)
        reason = "File too large"
    else:
        script = Path(__file__).with_name("full_disk.py")
        mount = 'mount -t tmpfs -o size=2m tmpfs "$1" && exec "$2" "$3" "$1/run"'
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount, "sh", tmp_path, sys.executable, script],
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        if "mount" in done.stderr or "unshare" in done.stderr:
            pytest.skip(f"no file system of our own here: {done.stderr}")
        assert done.returncode == 0, done.stderr
        lines, reason = done.stdout.splitlines(), "No space left on device"
    assert len(lines) == 3, lines
    assert f"could not be written ({reason}). The files of the run are as they were" in lines[0]
    assert lines[1:] == ["as it was", "3 epochs in the end"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "trades5"}, "method must be one of"),
        ({"schedule": "linear"}, "schedule must be one of"),
        ({"precision": "float16"}, "precision must be one of"),
        ({"activation": "sine"}, "activation must be one of"),
        ({"select_on": "train"}, "select_on must be one of"),
        ({"attack_mode": "both"}, "attack_mode must be one of"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"alternations": 0}, "alternations must be at least 1"),
        ({"mixup": -1.0}, "mixup must be finite and >= 0"),
        ({"lr": math.nan}, "lr must be finite and >= 0"),
        ({"l2": math.inf}, "l2 must be finite and >= 0"),
        ({"gamma": -1.0}, "gamma must be finite and >= 0"),
        ({"beta": -1.0}, "beta must be finite and >= 0"),
        ({"momentum": 2.0}, r"momentum must be in \[0, 1\)"),
        ({"patience": -1}, "patience must be at least 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"unlabeled_share": 1.0}, r"unlabeled_share must be in \(0, 1\)"),
    ],
)
def test_bad_settings_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        Config(**settings)


def test_schedules_are_the_papers():
    rate = {name: [0.1 * f(t / 200) for t in range(200)] for name, f in SCHEDULES.items()}
    assert rate["piecewise"][99] == 0.1
    assert rate["piecewise"][100] == pytest.approx(0.01)
    assert rate["piecewise"][149:151] == pytest.approx([0.01, 0.001])
    for t in (0, 50, 120, 199):
        assert rate["cosine"][t] == pytest.approx(0.05 * (math.cos(math.pi * t / 200) + 1))
    assert rate["cyclic"][0] == 0
    assert max(rate["cyclic"]) == rate["cyclic"][80] == pytest.approx(0.1)
    assert rate["cyclic"][40] == pytest.approx(0.05)
    assert rate["cyclic"][140] == pytest.approx(0.05)
    assert set(rate["constant"]) == {0.1}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_by_graphs_equals_an_eager_one(data, precision, request):
    config = Config(**{**vars(CONFIG), "precision": precision})
    model, rows = fit(config, data)
    graphs = request.getfixturevalue("cpu_graphs")
    captured, rows_captured = fit(config, data)
    assert graphs.replays > 5
    for a, b in zip(without_times(rows), without_times(rows_captured), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    for a, b in zip(model.state_dict().values(), captured.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
