"""Pseudo-labels by the classifier of a run: which images get them, which labels, and resuming."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from awp_optim.lab import building, trainer
from awp_optim.lab.config import Config, Method
from awp_optim.lab.data import load_digits
from awp_optim.lab.models import build_model
from awp_optim.lab.recipes import RECIPES
from awp_optim.lab.run_folder import read_metrics
from awp_optim.lab.self_training import natural, pseudo_label_rest
from awp_optim.lab.trainer import fit

CONFIG = Config(
    method="rst",
    arch="preact_resnet_small",
    gamma=0.01,
    eps=0.2,
    step_size=0.1,
    train_steps=2,
    test_steps=2,
    epochs=3,
    batch_size=16,
    lr=0.05,
    augment=False,
    train_eval=8,
)
STEPS = 9  # of the classifier: 40 images, 3 epochs


@pytest.fixture(scope="module")
def data():
    return load_digits().limit(100, 20)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """In every test."""


def keys(images):
    """Images as something to compare sets of."""
    return [bytes(image.flatten().tolist()) for image in images]


def classifier_in(folder):
    model = build_model("preact_resnet_small", num_classes=10, in_channels=1)
    model.load_state_dict(torch.load(folder / "last.pt", weights_only=True)["model"])
    return model.double().eval()


# --- Which images get labels, and which labels ------------------------------------------------


def test_some_keep_their_labels_and_the_others_get_the_classifiers(data, tmp_path):
    kept, pseudo, right = pseudo_label_rest(CONFIG, data, 40, tmp_path)
    expected = data.limit(40)
    assert torch.equal(kept.x_train, expected.x_train)
    assert torch.equal(kept.y_train, expected.y_train)
    assert kept.x_test is data.x_test
    assert kept.y_test is data.y_test
    assert (kept.mean, kept.std, kept.classes) == (data.mean, data.std, data.classes)
    # The others are all that is left, each once.
    assert sorted(keys(kept.x_train) + keys(pseudo.x)) == sorted(keys(data.x_train))
    # Their labels are those of the network that was saved, in float64; their own are not used.
    with torch.no_grad():
        labels = classifier_in(tmp_path)(pseudo.x.double() / 255).argmax(1)
    assert torch.equal(pseudo.y, labels)
    true = dict(zip(keys(data.x_train), data.y_train.tolist(), strict=True))
    hits = [true[key] == y for key, y in zip(keys(pseudo.x), pseudo.y.tolist(), strict=True)]
    assert right == sum(hits) / 60
    assert 0 < right < 1  # so that the share says something


def test_the_labels_that_are_not_kept_do_not_matter(data):
    hidden = torch.ones(len(data.x_train), dtype=torch.bool)
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    hidden[order[:40]] = False
    others = replace(data, y_train=torch.where(hidden, 9 - data.y_train, data.y_train))
    (_, pseudo, right), (_, again, other_right) = (
        pseudo_label_rest(CONFIG, d, 40) for d in (data, others)
    )
    assert torch.equal(pseudo.y, again.y)
    assert right != other_right


def test_the_classifier_learns(data):
    """More than the one class in ten that guessing gets right."""
    config = replace(CONFIG, epochs=25)
    _, _, right = pseudo_label_rest(config, load_digits().limit(300, 20), 150)
    assert right > 0.6


def test_a_run_on_them_shows_both_kinds_in_every_batch(data, monkeypatch):
    kept, pseudo, _ = pseudo_label_rest(CONFIG, data, 40)
    labels = dict(zip(keys(kept.x_train) + keys(pseudo.x), [*kept.y_train, *pseudo.y]))
    of_kept = set(keys(kept.x_train))
    seen = []
    step = trainer.AdversarialStep.__call__

    def looking(self, x, y):
        images = keys((x * 255).round().to(torch.uint8))
        assert all(labels[image] == label for image, label in zip(images, y, strict=True))
        seen.append((len(images), sum(image in of_kept for image in images)))
        return step(self, x, y)

    monkeypatch.setattr(trainer.AdversarialStep, "__call__", looking)
    fit(replace(CONFIG, epochs=1, epoch_images=100), kept, unlabeled=pseudo)
    assert seen == [(16, 8)] * 7


# --- Without an adversary -----------------------------------------------------------------------


@pytest.mark.parametrize("method", get_args(Method))
def test_natural_training_is_plain_descent_on_clean_images(data, monkeypatch, method):
    """Two steps on all images at once, beside the same by hand."""
    built = []
    build = building.build_model

    def keeping(*args, **kwargs):
        model = build(*args, **kwargs)
        built.append({k: v.clone() for k, v in model.state_dict().items()})
        return model

    monkeypatch.setattr(building, "build_model", keeping)
    config = replace(
        CONFIG,
        method=method,
        gamma=0.5,
        awp_start=0,
        attack_mode="train",
        ascent="attack",
        ema=0.9,
        mixup=1.0,
        epochs=2,
        batch_size=50,
        epoch_images=500,
        schedule="constant",
    )
    images = data.limit(40)
    model, rows = fit(natural(config), images)

    twin = build_model(
        "preact_resnet_small", num_classes=10, in_channels=1, mean=data.mean, std=data.std
    )
    twin.load_state_dict(built[0])
    sgd = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(twin(images.x_train.float() / 255), images.y_train)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    assert [row["step_robust_loss"] for row in rows] == pytest.approx(losses, rel=1e-4)
    for value, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_natural_training(name):
    config = natural(RECIPES[name].config)
    assert (config.gamma, config.ema, config.eps, config.mixup) == (0, 0, 0, 0)


def test_natural_training_has_the_runs_network_and_length(data):
    config = replace(
        CONFIG,
        activation="silu",
        label_smoothing=0.1,
        cutout=3,
        l2=1e-3,
        seed=4,
        select_on="val",
        val_images=5,
        patience=1,
        ema=0.9,
        ema_start=2,
        ema_warmup=True,
        eval_every=1,
    )
    changed = natural(config)
    kept = "arch activation epochs batch_size lr momentum weight_decay schedule precision augment"
    kept += " cutout label_smoothing l1 l2 seed select_on val_images"
    for name in kept.split():
        assert getattr(changed, name) == getattr(config, name), name
    _, rows = fit(changed, data.limit(40))
    assert len(rows) == 3  # no early stop
    assert [("test_natural_acc" in row) for row in rows] == [False, False, True]
    last = rows[-1]
    assert last["test_robust_loss"] == last["test_natural_loss"]
    assert "val_natural_acc" in last  # what the run holds out is not trained on here either
    assert not any(name.startswith("ema_") for name in last)


# --- Interrupted ------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 5, STEPS, STEPS + 2])
def test_stopped_it_returns_none_and_resumes_exactly(data, tmp_path, stop_at):
    """Before the first step, between and after epochs, and in the one evaluation."""
    full = pseudo_label_rest(CONFIG, data, 40, tmp_path / "full")
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == stop_at

    assert pseudo_label_rest(CONFIG, data, 40, tmp_path / "parts", stop=stop) is None
    torch.manual_seed(77)
    resumed = pseudo_label_rest(CONFIG, data, 40, tmp_path / "parts", resume=True)
    assert torch.equal(full[0].x_train, resumed[0].x_train)
    assert torch.equal(full[1].x, resumed[1].x)
    assert torch.equal(full[1].y, resumed[1].y)
    assert full[2] == resumed[2]
    first, second = (classifier_in(tmp_path / name).state_dict() for name in ("full", "parts"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_an_existing_classifier_is_used_again(data, tmp_path):
    steps = []
    full = pseudo_label_rest(CONFIG, data, 40, tmp_path, on_step=lambda *s: steps.append(s))
    assert steps == [(i, STEPS) for i in range(1, STEPS + 1)]
    with pytest.raises(FileExistsError, match="--resume"):
        pseudo_label_rest(CONFIG, data, 40, tmp_path)
    # What changes the run alone changes nothing about its classifier.
    other = replace(CONFIG, method="trades", gamma=0.0, eps=0.1, ema=0.9, mixup=1.0)
    again = pseudo_label_rest(other, data, 40, tmp_path, resume=True, on_step=lambda *s: 1 / 0)
    assert torch.equal(full[1].y, again[1].y)
    with pytest.raises(ValueError, match=r"train_images was 40, is 41"):
        pseudo_label_rest(CONFIG, data, 41, tmp_path, resume=True)
    assert len(read_metrics(tmp_path)) == CONFIG.epochs


@pytest.mark.parametrize("labeled", [0, -1, 100, 101])
def test_no_image_on_one_of_the_sides_is_an_error(data, tmp_path, labeled):
    with pytest.raises(ValueError, match=f"n must be between 1 and 99, not {labeled}"):
        pseudo_label_rest(CONFIG, data, labeled, tmp_path / "run")
    assert not (tmp_path / "run").exists()
