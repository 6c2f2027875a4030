"""What is measured after an epoch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from awp_optim.attacks import PGD
from awp_optim.lab import evaluator, trainer
from awp_optim.lab.evaluator import measure
from awp_optim.lab.models import build_model
from awp_optim.lab.run_folder import read_metrics
from awp_optim.lab.trainer import fit

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_the_best_is_picked_on_held_out_images(config, data, tmp_path):
    config = replace(config, select_on="val", val_images=12)
    model, rows = fit(config, data, tmp_path)
    _, (x, y) = data.split(12)
    figures = measure(model, x, y, replace(config, eps=0.0).test_attack)
    assert rows[-1]["val_natural_acc"] == figures["natural_acc"]
    top = torch.load(tmp_path / "best.pt", weights_only=True)["row"]
    assert top["val_robust_acc"] == max(row["val_robust_acc"] for row in rows)
    assert read_metrics(tmp_path)[0].keys() == rows[0].keys()
    with pytest.raises(ValueError, match="val_images must be fewer than the 60 training images"):
        fit(replace(config, val_images=60), data)


def test_a_part_of_the_test_images_is_measured(config, data):
    model, rows = fit(replace(config, eps=0.0, test_eval=7), data)
    part = data.limit(None, 7)
    figures = measure(model, part.x_test, part.y_test, replace(config, eps=0.0).test_attack)
    assert rows[-1]["test_natural_acc"] == figures["natural_acc"]
    assert rows[-1]["test_natural_loss"] == pytest.approx(figures["natural_loss"])
    _, all_of_them = fit(replace(config, test_eval=len(data.x_test) + 1), data)
    assert all_of_them[-1].keys() == rows[-1].keys()


def test_the_last_epoch_is_always_evaluated(config, data):
    _, rows = fit(replace(config, eval_every=2), data)
    assert ["test_robust_acc" in row for row in rows] == [False, True, True]


def test_the_average_is_measured_and_saved(config, data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "best", lambda rows: rows[-1])
    config = replace(config, ema=0.5)
    _, rows = fit(config, data, tmp_path)
    top, last = (torch.load(tmp_path / n, weights_only=True) for n in ("best.pt", "last.pt"))
    for name, value in top["ema"].items():
        assert torch.equal(value, last["ema"][f"module.{name}"])
    assert not torch.equal(top["ema"]["linear.weight"], top["model"]["linear.weight"])
    twin = build_model("preact_resnet_small", num_classes=10, in_channels=1)
    twin.load_state_dict(top["ema"])
    figures = measure(twin, data.x_test, data.y_test, config.test_attack)
    assert figures["natural_loss"] == pytest.approx(rows[-1]["ema_test_natural_loss"])
    assert rows[-1]["ema_test_natural_loss"] != rows[-1]["test_natural_loss"]
    assert read_metrics(tmp_path)[0].keys() == rows[0].keys()


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_early_stopping_waits_for_a_new_best(config, data, tmp_path, monkeypatch, ema):
    accuracies = iter([0.1, 0.3, 0.2, 0.3, 0.4, 0.4, 0.1, 0.2, 0.9])

    def measured(*args, **kwargs):
        row = measure(*args, **kwargs)
        if args[4] == ("ema_test_" if ema else "test_"):
            row[args[4] + "robust_acc"] = next(accuracies)
        return row

    monkeypatch.setattr(evaluator, "measure", measured)
    config = replace(config, epochs=9, patience=3, ema=ema)
    _, rows = fit(config, data, tmp_path)
    assert len(rows) == 8  # the best was the fifth, and three more have brought none
    assert torch.load(tmp_path / "best.pt", weights_only=True)["row"]["epoch"] == 4
    _, again = fit(config, data, tmp_path, resume=True)
    assert len(again) == 8


@pytest.mark.parametrize(
    ("best_epoch", "eval_every", "patience", "length"), [(1, 2, 1, 4), (3, 2, 3, 8), (3, 4, 1, 8)]
)
def test_early_stopping_waits_for_an_evaluation(config, best_epoch, eval_every, patience, length):
    """The last row is always evaluated, and a new best could still be found in it."""
    config = replace(config, epochs=20, eval_every=eval_every, patience=patience)
    rows = []
    while not trainer.is_over(config, rows):
        row = {"epoch": len(rows)}
        if (len(rows) + 1) % eval_every == 0:
            row["test_robust_acc"] = float(len(rows) == best_epoch)
        rows.append(row)
    assert len(rows) == length
