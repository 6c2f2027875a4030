"""``awp train``: what the command line makes of a run, how a run stops, and how it continues."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from awp_optim.lab import precision
from awp_optim.lab.commands.options import DataOptions, parse, peek
from awp_optim.lab.commands.train import Options, starting_point
from awp_optim.lab.config import Config
from awp_optim.lab.data import load_digits
from awp_optim.lab.models import build_model
from awp_optim.lab.recipes import RECIPES, defaults
from awp_optim.lab.run_folder import read_metrics

SMALL = ("train", "--dataset", "digits", "--arch", "preact_resnet_small", "--limit", 64)
QUICK = (*SMALL, "--train-steps", 1, "--test-steps", 1, "--epochs", 2)
TIMES = ("seconds", "eval_seconds")
AUTO = {"precision": "auto"}  # where no recipe names one


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_trains_stops_in_time_and_resumes(awp, tmp_path):
    arguments = (*SMALL, "--epochs", 2, "--precision", "bfloat16", "--out", "run")
    ended = awp(*arguments, "--max-minutes", 0)
    assert ended.status == 0
    assert "Stopped after 0 of 2 epochs; continue with --resume" in ended.out
    ended = awp(*arguments, "--resume")
    assert ended.status == 0
    assert "Robust test accuracy (PGD-20)" in ended.out
    assert "--resume" not in ended.out
    names = {p.name for p in (tmp_path / "run").iterdir()} - {"tensorboard"}
    assert {"best.pt", "last.pt", "config.json", "metrics.csv", "curves.png"} <= names
    assert not any(name.endswith(".part") for name in names)
    assert len(read_metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_run(awp, start, tmp_path, number, status):
    arguments = (*QUICK, "--limit", 200, "--epochs", 500, "--out", "run")
    with start(*arguments) as process:
        text = process.stdout.readline() + process.stdout.readline()  # of the first epoch
        process.send_signal(number)
        rest, err = process.communicate()
    text += rest
    assert process.returncode == status
    assert err == f"{number.name}: stopping after this step (again: at once)\n"
    assert "of 500 epochs; continue with --resume" in text
    epochs = text.count("  training steps: loss")
    again = awp(*arguments, "--resume", "--max-minutes", 0)
    assert f"Stopped after {epochs} of 500 epochs" in again.out


def test_a_killed_run_resumes_to_the_same_end(awp, start, tmp_path):
    arguments = (*QUICK, "--epochs", 8, "--limit", 128, "--out")
    assert awp(*arguments, "whole").status == 0
    with start(*arguments, "killed") as process:
        process.stdout.readline()
        process.stdout.readline()  # of the first epoch
        process.kill()
        process.communicate()
    assert awp(*arguments, "killed", "--resume").status == 0
    whole, killed = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert whole == killed


def option(name, value):
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", value]


def test_every_setting_is_an_option(awp, tmp_path):
    given = {
        "method": "mart", "beta": 3.0, "alpha": 5.0, "ascent_below": 1.5, "gamma": 0.02,
        "direction": "random", "awp_start": 1,
        "awp_norm": "l1", "ascent_steps": 2, "alternations": 2,
        "arch": "preact_resnet_small", "activation": "tanh", "norm": "l2", "eps": 0.5,
        "step_size": 0.25, "eps_schedule": "linear", "train_steps": 2, "test_steps": 3,
        "attack_mode": "train", "epochs": 2,
        "batch_size": 16, "epoch_images": 32, "lr": 0.05, "momentum": 0.8, "nesterov": True,
        "weight_decay": 1e-3, "bn_decay": False, "bn_momentum": 0.01,
        "l1": 1e-6, "l2": 1e-3, "ema": 0.9, "ema_start": 1, "ema_warmup": True,
        "label_smoothing": 0.1, "precision": "bfloat16",
        "schedule": "cosine", "augment": True, "cutout": 2, "mixup": 1.0, "unlabeled_share": 0.25,
        "train_eval": 8, "test_eval": 8, "eval_every": 2,
        "save_every": 1, "select_on": "val", "val_images": 8,
        "patience": 3, "seed": 7,
    }  # fmt: skip
    # These do not go with ascent_steps, l2, mixup and images so small; compiling takes a minute.
    left_out = {"ascent", "train_attack", "cutmix", "idbh", "compile"}
    assert given.keys() == {f.name for f in fields(Config)} - left_out
    assert all(
        value != getattr(Config(), name) for name, value in given.items() if name != "augment"
    )
    words = [
        word for name, value in given.items() for word in option(name.replace("_", "-"), value)
    ]
    words[words.index("--eps") + 1] = "1/2"
    ended = awp("train", "--dataset", "digits", "--limit", 64, *words, "--out", "run")
    assert ended.status == 0, ended.err
    found = config_of(tmp_path / "run")
    assert {name: found[name] for name in given} == given


@pytest.mark.parametrize(
    ("words", "dataset", "expected", "changes"),
    [
        ("", "cifar10", "at-awp/cifar10-linf-preact18", AUTO),
        ("--threat l2", "cifar10", "at-awp/cifar10-l2-preact18", AUTO),
        ("--dataset svhn", "svhn", "at-awp/svhn-linf-preact18", AUTO),
        ("--dataset digits", "digits", "at-awp/cifar10-linf-preact18", {"augment": False}),
        ("--recipe at/cifar10-small", "cifar10", "at/cifar10-small", {}),
        ("--recipe mart/cifar10-linf-wrn34-10", "cifar10", "mart/cifar10-linf-wrn34-10", {}),
        (
            "--out --eps --recipe at/svhn-linf-preact18 --threat l2 --method mart",
            "svhn",
            "at/svhn-linf-preact18",
            {"norm": "l2", "eps": 128 / 255, "step_size": 15 / 255},
        ),
    ],
)
def test_what_decides_the_defaults(words, dataset, expected, changes):
    options = peek(starting_point, words.split(), "awp train")
    assert options.data.dataset == dataset
    recipe = RECIPES[expected]
    assert options.settings == Config(**{**vars(recipe.config), **changes})
    assert options.train_images == recipe.train_images


def test_a_recipe_for_a_part_of_the_images_with_fewer():
    words = ["--recipe", "at/cifar10-small", "--limit", "100", "--out", "run"]
    default = peek(starting_point, words, "awp train")
    options = parse(Options, words, "awp train", "", default=default)
    assert (options.train_images, options.data.limit) == (None, 100)


def test_the_method_decides_the_defaults():
    config = peek(starting_point, ["--method", "trades"], "awp train").settings
    assert config == replace(defaults("cifar10", "linf", "trades"), **AUTO)
    assert config.awp_start == 10


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--method", "trades"), "--awp-start 0"),
        (("--dataset", "svhn"), "--awp-start 0"),
        (("--recipe", "trades-awp-growing/cifar10-linf-preact18"), "--awp-start 0"),
        (
            ("--recipe", "trades-awp-growing/cifar10-linf-preact18", "--awp-start", 0),
            "--ema-start 0",
        ),
    ],
)
def test_a_run_too_short_for_its_awp_or_its_average(words, option, capsys):
    words = [*map(str, words), "--epochs", "5", "--out", "run"]
    default = peek(starting_point, words, "awp train")
    with pytest.raises(SystemExit):
        parse(Options, words, "awp train", "", default=default)
    assert option in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_a_network_that_does_not_exist(awp, tmp_path):
    """It is an error before the images are loaded: there are none."""
    ended = awp("train", "--arch", "resnet", "--data-dir", "nowhere", "--out", "run")
    assert ended.status != 0
    assert "no model 'resnet'" in " ".join(ended.err.split())
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("words", [(), ("--dataset", "digits"), ("--precision", "bfloat16")])
def test_the_precision_is_chosen_shown_and_kept(awp, tmp_path, monkeypatch, words):
    monkeypatch.setattr(precision, "_cpu_features", lambda: {"amx_bf16"})
    monkeypatch.setattr(DataOptions, "load", lambda self: load_digits().limit(24, 8))
    quick = ("train", "--arch", "preact_resnet_small", "--epochs", 1, "--test-steps", 1)
    expected = "float32" if "digits" in words else "bfloat16"
    ended = awp(*quick, *words, "--out", "run")
    assert ended.status == 0, ended.err
    assert f"preact_resnet_small in {expected}, on cpu" in ended.out
    config = config_of(tmp_path / "run")
    assert config["precision"] == expected
    assert config["train_eval"] == 6  # a quarter of the images
    monkeypatch.setattr(precision, "_cpu_features", set)
    again = awp(*quick, *words, "--out", "run", "--resume")
    assert again.status == 0, again.err
    assert f"in {expected}," in again.out


def test_a_recipe_names_its_precision_and_compile_is_an_option():
    default = peek(starting_point, ["--recipe", "at/cifar10-linf-preact18"], "awp train")
    assert default.settings.precision == "float32"
    options = parse(Options, ["--out", "run", "--compile"], "awp train", "", default=default)
    assert options.settings.compile


def test_a_balanced_part_of_the_training_images(awp, tmp_path):
    arguments = ("train", "--dataset", "digits", "--arch", "preact_resnet_small", "--epochs", 1)
    arguments += ("--train-steps", 1, "--test-steps", 1, "--train-images", 30, "--out", "run")
    assert awp(*arguments).status == 0
    config = config_of(tmp_path / "run")
    assert (config["train_images"], config["balanced"], config["test_images"]) == (30, True, 899)
    assert "one of the two" in awp(*arguments, "--limit", 20).err


def test_a_recipe_with_changes(awp, tmp_path):
    changes = ("--epochs", 2, "--awp-start", 1, "--ema", 0.9, "--threat", "l2", "--beta", 3)
    ended = awp(*SMALL, "--recipe", "trades-awp/cifar10-linf-wrn34-10", *changes, "--out", "run")
    assert ended.status == 0, ended.err
    config = config_of(tmp_path / "run")
    assert (config["method"], config["gamma"], config["awp_start"]) == ("trades", 5e-3, 1)
    assert (config["norm"], config["eps"], config["step_size"]) == ("l2", 128 / 255, 15 / 255)
    assert (config["beta"], config["ema"], config["attack_mode"]) == (3.0, 0.9, "eval")
    assert (config["dataset"], config["arch"]) == ("digits", "preact_resnet_small")
    assert config["train_eval"] == 1000  # the recipe's, or all images
    assert "ema_test_robust_acc" in (tmp_path / "run/metrics.csv").read_text()


def test_images_without_labels_and_given_weights(awp, tmp_path):
    ended = awp(*QUICK, "--method", "rst", "--labeled", 32, "--train-eval", 20, "--out", "rst")
    assert ended.status == 0, ended.err
    assert "32 images were labeled by a classifier trained on 32" in ended.out
    config = config_of(tmp_path / "rst")
    assert (config["train_images"], config["unlabeled_images"]) == (32, 32)
    assert (config["epoch_images"], config["batch_size"]) == (64, 256)
    assert config["train_eval"] == 20
    for name in ("a", "b"):  # two parts, for a method that does not need them
        np.savez(tmp_path / name, image=np.zeros((50, 8, 8, 1), np.uint8), label=np.arange(50) % 10)
    ended = awp(*QUICK, "--extra-data", "a.npz", "b.npz", "--unlabeled-share", 0.8, "--out", "at")
    assert ended.status == 0, ended.err
    config = config_of(tmp_path / "at")
    assert (config["method"], config["unlabeled_images"]) == ("at", 100)
    last = ("--init", "rst/last.pt", "--lr", 0.01)
    ended = awp(*QUICK, "--method", "pretrain", *last, "--out", "pretrain")
    assert ended.status == 0, ended.err
    config = config_of(tmp_path / "pretrain")
    assert (config["schedule"], config["gamma"], config["lr"]) == ("cosine", 5e-3, 0.01)
    assert len(config["init"]) == 16


# One of each family of networks and methods: two steps on real CIFAR-10.
@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        "at-awp/cifar10-linf-preact18",
        "at-awp/cifar10-l2-preact18",
        "at-l1/cifar10-linf-preact18",
        "at-l2/cifar10-linf-preact18",
        "at-cutout/cifar10-linf-preact18",
        "at-mixup/cifar10-l2-preact18",
        "trades-awp/cifar10-linf-wrn34-10",
        "mart-awp/cifar10-linf-wrn34-10",
        "rst-awp/cifar10-linf-wrn28-10",
        "pretrain-awp/cifar10-linf-wrn28-10",
    ],
)
def test_recipes_on_cifar10(awp, tmp_path, recipe):
    if "AWP_DATA" not in os.environ:
        pytest.skip("AWP_DATA names no data folder")
    cut = ("--limit", 8, "--batch-size", 4, "--epochs", 1, "--awp-start", 0)
    cut += ("--train-steps", 2, "--test-steps", 2)
    if recipe.startswith("rst"):
        cut += ("--labeled", 4)
    if recipe.startswith("pretrain"):
        weights = build_model("wide_resnet28_10", num_classes=1000, in_channels=3).state_dict()
        torch.save(weights, tmp_path / "imagenet.pt")
        cut += ("--init", "imagenet.pt")
    data = Path(os.environ["AWP_DATA"]).resolve()
    ended = awp("train", "--recipe", recipe, "--data-dir", data, *cut, "--out", "run")
    assert ended.status == 0, ended.err
    (row,) = read_metrics(tmp_path / "run")
    assert 0 < row["step_robust_loss"] < 20
