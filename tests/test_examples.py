"""The examples run as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_cifar10_trains_resumes_and_explains_itself(tmp_path):
    args = (*SMALL, "--epochs", 2, "--precision", "bfloat16", "--out", "run")
    done = run("cifar10.py", *args, "--max-minutes", 0, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 epochs; go on with --resume" in done.stdout
    assert "Robust test accuracy (PGD-20)" in done.stdout
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"best.pt", "last.pt", "config.json", "metrics.csv", "curves.png"}
    again = run("cifar10.py", *args, cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.startswith("error: run already holds a run: go on with --resume")
    done = run("cifar10.py", *args, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "go on" not in done.stdout
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--gamma", "-1"), "gamma must be finite and >= 0"),
        (("--limit", "0"), "n_train must be between 1"),
        (("--epochs", "0"), "epochs must be at least 1"),
        (("--interval", "0"), "interval must be"),
        (("--method", "magic"), "invalid choice: 'magic'"),
        (("--recipe", "magic"), "invalid choice: 'magic'"),
        (("--arch", "magic"), "no model"),
        (("--ema", "1"), "ema must be in [0, 1)"),
        (("--awp-start", "-1"), "awp_start must not be negative"),
    ],
)
def test_cifar10_names_what_is_wrong(tmp_path, args, message):
    done = run("cifar10.py", *SMALL, "--out", "run", *args, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


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
