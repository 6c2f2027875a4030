"""The trainer: what it measures, what it writes, and that a run goes on as if never broken off."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from awp_optim import AWP
from awp_optim.attacks import PGD
from awp_optim.lab import trainer
from awp_optim.lab.data import load_digits
from awp_optim.lab.models import build_model
from awp_optim.lab.schedules import SCHEDULES
from awp_optim.lab.trainer import Config, best, fit, measure, read_metrics
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
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def without_times(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def test_a_run_writes_its_folder(data, tmp_path):
    steps, epochs = [], []
    model, rows = fit(
        CONFIG, data, tmp_path / "run", on_step=lambda *s: steps.append(s), on_epoch=epochs.append
    )
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
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
@pytest.mark.parametrize("method", ["at", "trades", "mart"])
def test_every_method_lowers_its_loss(data, method, gamma):
    changes = {"eps": 0.05, "step_size": 0.03, "epochs": 12, "eval_every": 12, "augment": False}
    config = Config(**{**vars(CONFIG), **changes, "method": method, "gamma": gamma})
    _, rows = fit(config, data)
    assert rows[-1]["step_robust_loss"] < 0.85 * rows[0]["step_robust_loss"]


def test_each_method_has_its_published_attack_and_objective():
    of = {method: Config(method=method, beta=3.0) for method in ("at", "trades", "mart")}
    assert {m: c.objective for m, c in of.items()} == {
        "at": AT(),
        "trades": TRADES(beta=3.0),
        "mart": MART(lam=3.0),
    }
    attacks = {m: c.training_attack for m, c in of.items()}
    assert attacks["at"] == PGD(model_mode="train")
    assert attacks["trades"] == PGD(loss="kl", start_std=0.001)
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

    fit(config, data, tmp_path / "parts", stop=lambda: True)
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
@pytest.mark.parametrize("interval", [1, 4])
def test_a_resumed_run_equals_one_that_went_on(data, tmp_path, broken_after, interval):
    # Steps of an epoch are no multiple of 4: a direction is kept from one to the next.
    config = Config(**{**vars(CONFIG), "interval": interval})
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


def test_a_stopped_run_goes_on_as_if_it_had_not(data, tmp_path):
    model, rows = fit(CONFIG, data, tmp_path / "whole")
    _, first = fit(CONFIG, data, tmp_path / "parts", stop=lambda: True)
    assert without_times(first) == without_times(rows[:1])
    torch.manual_seed(77)
    resumed, both = fit(CONFIG, data, tmp_path / "parts", resume=True, stop=lambda: False)
    assert without_times(both) == without_times(rows)
    for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_run_from_before_a_setting_existed_goes_on(data, tmp_path):
    fit(CONFIG, data, tmp_path, stop=lambda: True)
    file = tmp_path / "config.json"
    about = json.loads(file.read_text())
    for name in ("precision", "ascent", "interval"):
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

    class Captured(trainer.Captured):
        def __call__(self, model, x, y):
            captured.append(len(y))
            return super().__call__(model, x, y)

    monkeypatch.setattr(trainer, "AdversarialStep", Step)
    monkeypatch.setattr(trainer, "Captured", Captured)
    fit(Config(**{**vars(CONFIG), "ascent": "attack", "interval": 2, "epochs": 1}), data)
    assert steps == [{"ascent": "attack", "interval": 2, "autocast": None}]
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
    with pytest.raises(FloatingPointError, match="lower --lr"):
        fit(config, data, tmp_path)
    assert not (tmp_path / "last.pt").exists()


def test_a_checkpoint_is_never_half_written(data, tmp_path, monkeypatch):
    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(CONFIG, data, tmp_path, on_epoch=stop)
    before = (tmp_path / "last.pt").read_bytes()

    def disk_full(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer.torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        fit(CONFIG, data, tmp_path, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "trades5"}, "method must be one of"),
        ({"schedule": "linear"}, "schedule must be one of"),
        ({"precision": "float16"}, "precision must be one of"),
        ({"epochs": 0}, "epochs must be at least 1"),
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
