"""What is measured after an epoch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from awp_optim.attacks import PGD, Captured
from awp_optim.lab import evaluator, trainer
from awp_optim.lab.config import Config
from awp_optim.lab.evaluator import bytes_per_image, largest_batch, measure
from awp_optim.lab.models import build_model
from awp_optim.lab.run_folder import read_metrics
from awp_optim.lab.trainer import fit
from awp_optim.lab.training_set import as_inputs

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


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_memory_of_an_image_is_that_of_its_activations(data, autocast):
    """The inputs of layers, of which ReLU's output is one; flattening copies from channels_last."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )
    numbers = 64 + 2 * 4 * 64 + 2 * 8 * 16
    expected = 4 * numbers if autocast is None else 2 * numbers
    assert bytes_per_image(model, data.x_test[:3], autocast) == expected
    assert model[1].num_batches_tracked == 0
    assert model.training


def test_the_batch_is_halved_until_it_takes_a_quarter_of_the_memory():
    wide = 23_083_520  # measured: WideResNet-34-10 in float32, 23 GB for 1,000 images
    sizes = {gib: largest_batch(wide, gib * 2**30) for gib in (141, 80, 24, 8)}
    assert sizes == {141: 1000, 80: 500, 24: 250, 8: 62}
    assert largest_batch(2_235_392, 24 * 2**30) == 1000  # PreAct ResNet-18 in bfloat16
    assert largest_batch(2**40, 2**30) == 1


def test_a_batch_that_does_not_fit_is_halved(config, data, monkeypatch):
    """From a fixed start, the size of the batches makes no difference."""
    config = replace(config, epochs=1, train_eval=60)
    attack = replace(config.test_attack, random_start=False)
    monkeypatch.setattr(Config, "test_attack", attack)
    sizes = []

    def limited(self, model, x, y):
        sizes.append(len(x))
        if len(x) > 10:
            raise torch.OutOfMemoryError("out of memory")
        return attack(model, x, y)

    whole = fit(config, data)[1]
    monkeypatch.setattr(Captured, "__call__", limited)
    parts = fit(config, data)[1]
    assert sizes == [60, 60, 32, 16] + [8] * 7 + [4] + [8] * 5
    for name, value in whole[0].items():
        if not name.endswith("seconds"):
            assert parts[0][name] == pytest.approx(value, rel=1e-5), name


def test_an_image_that_does_not_fit_is_an_error(config, data, monkeypatch):
    def out_of_memory(self, model, x, y):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Captured, "__call__", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        fit(replace(config, epochs=1), data)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_memory_of_a_gpu_is_estimated_within_a_factor_of_two(data):
    model = build_model("wide_resnet16_4", num_classes=10, in_channels=3).cuda().eval()
    model.to(memory_format=torch.channels_last)
    x = torch.randint(256, (256, 3, 32, 32), dtype=torch.uint8, device="cuda")
    y = torch.zeros(256, dtype=torch.long, device="cuda")
    estimate = 256 * bytes_per_image(model, x[:2], None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    PGD(steps=2)(model, as_inputs(x), y)
    taken = torch.cuda.max_memory_allocated() - before
    assert estimate / 2 < taken < 2 * estimate


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
