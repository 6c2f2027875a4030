"""The examples run as a user starts them."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from awp_optim.lab.models import build_model
from awp_optim.lab.run_folder import read_metrics

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *args, cwd):
    command = [sys.executable, str(EXAMPLES / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def test_quickstart(tmp_path):
    done = run("quickstart.py", "--seeds", 1, "--epochs", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("AT-AWP", "robust, best", "gap, last", "time of a step", "quickstart.png"):
        assert part in done.stdout
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000


SMALL = ("--dataset", "digits", "--arch", "preact_resnet_small", "--limit", 64)


def test_cifar10_trains_and_explains_itself(tmp_path):
    args = (*SMALL, "--epochs", 2, "--precision", "bfloat16", "--out", "run")
    done = run("cifar10.py", *args, "--max-minutes", 0, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Stopped after 0 of 2 epochs; go on with --resume" in done.stdout
    again = run("cifar10.py", *args, cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.startswith("error: run already holds a run: continue it with --resume")
    done = run("cifar10.py", *args, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Robust test accuracy (PGD-20)" in done.stdout
    assert "go on" not in done.stdout
    names = {p.name for p in (tmp_path / "run").iterdir()} - {"tensorboard"}
    assert names == {"best.pt", "last.pt", "config.json", "metrics.csv", "curves.png"}
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_cifar10_stops_when_asked_to_and_goes_on(tmp_path, number, status):
    args = (*SMALL, "--limit", 200, "--epochs", 500, "--train-steps", 1, "--test-steps", 1)
    command = [sys.executable, str(EXAMPLES / "cifar10.py"), *map(str, args), "--out", "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        text = process.stdout.readline()  # of the first epoch
        process.send_signal(number)
        rest, said = process.communicate()
    text += rest
    assert process.returncode == status
    assert said == f"{number.name}: stopping after this step (again: at once)\n"
    assert "of 500 epochs; go on with --resume" in text
    done = run("cifar10.py", *args, "--out", "run", "--resume", "--max-minutes", 0, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    epochs = text.count("  training steps: loss")
    assert f"Stopped after {epochs} of 500 epochs" in done.stdout


def test_cifar10_labels_what_has_no_labels_and_starts_from_a_checkpoint(tmp_path):
    quick = ("--train-steps", 1, "--test-steps", 1, "--epochs", 2)
    args = (*SMALL, *quick, "--method", "rst", "--labeled", 32, "--out", "rst")
    done = run("cifar10.py", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "32 images were labelled by a classifier trained on 32" in done.stdout
    config = json.loads((tmp_path / "rst/config.json").read_text())
    assert (config["train_images"], config["unlabeled_images"]) == (32, 32)
    assert (config["epoch_images"], config["batch_size"]) == (64, 256)
    last = ("--init", "rst/last.pt", "--lr", 0.01)
    args = (*SMALL, *quick, "--method", "pretrain", *last, "--out", "pretrain")
    done = run("cifar10.py", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "pretrain/config.json").read_text())
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
def test_recipes_on_cifar10(tmp_path, recipe):
    if "AWP_DATA" not in os.environ:
        pytest.skip("AWP_DATA names no data folder")
    cut = ("--limit", 8, "--batch-size", 4, "--epochs", 1, "--awp-start", 0)
    args = ("--recipe", recipe, "--data-dir", Path(os.environ["AWP_DATA"]).resolve(), *cut)
    args += ("--train-steps", 2, "--test-steps", 2)
    if recipe.startswith("rst"):
        args += ("--labeled", 4)
    if recipe.startswith("pretrain"):
        weights = build_model("wide_resnet28_10", num_classes=1000, in_channels=3).state_dict()
        torch.save(weights, tmp_path / "imagenet.pt")
        args += ("--init", "imagenet.pt")
    done = run("cifar10.py", *args, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = read_metrics(tmp_path / "run")
    assert 0 < row["step_robust_loss"] < 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--gamma", "-1"), "gamma must be finite and >= 0"),
        (("--limit", "0"), "n_train must be between 1"),
        (("--epochs", "0"), "epochs must be at least 1"),
        (("--method", "magic"), "invalid choice: 'magic'"),
        (("--recipe", "magic"), "invalid choice: 'magic'"),
        (("--arch", "magic"), "no model"),
        (("--ema", "1"), "ema must be in [0, 1)"),
        (("--awp-start", "-1"), "awp_start must be at least 0"),
        (("--method", "rst"), "--unlabeled FILE or --labeled N"),
        (("--method", "rst", "--labeled", "64"), "n must be between 1 and 63"),
        (("--method", "pretrain"), "--init CHECKPOINT"),
        (("--method", "pretrain", "--init", "none.pt"), "none.pt"),
        (("--unlabeled", "none.npz"), "none.npz"),
        (("--mixup", "-1"), "mixup must be finite and >= 0"),
        (("--activation", "sine"), "invalid choice: 'sine'"),
        (("--image-size", "8"), "--image-size is for --dataset folder"),
    ],
)
def test_cifar10_names_what_is_wrong(tmp_path, monkeypatch, capsys, args, message):
    """In this process, which saves the imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cifar10.py", *map(str, SMALL), "--out", "run", *args])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "cifar10.py"), run_name="__main__")
    assert ended.value.code
    said = f"{ended.value.code}\n{capsys.readouterr().err}"
    assert message in said


def test_cifar10_runs_a_recipe_with_changes(tmp_path):
    changes = ("--epochs", 2, "--awp-start", 1, "--ema", 0.9, "--threat", "l2", "--beta", 3)
    args = ("--recipe", "trades-awp/cifar10-linf-wrn34-10", *SMALL, *changes)
    done = run("cifar10.py", *args, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["method"], config["gamma"], config["awp_start"]) == ("trades", 5e-3, 1)
    assert (config["norm"], config["eps"], config["step_size"]) == ("l2", 128 / 255, 15 / 255)
    assert (config["beta"], config["ema"], config["attack_mode"]) == (3.0, 0.9, "eval")
    assert (config["dataset"], config["arch"]) == ("digits", "preact_resnet_small")
    assert "ema_test_robust_acc" in (tmp_path / "run/metrics.csv").read_text()


def test_cifar10_lists_its_recipes(tmp_path):
    done = run("cifar10.py", "--list-recipes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "at-awp/cifar10-linf-preact18" in done.stdout
    assert "55.39" in done.stdout
    assert (
        run("cifar10.py", cwd=tmp_path)
        .stderr.strip()
        .endswith("--out is needed: the folder of the run")
    )
