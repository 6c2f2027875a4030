"""The examples run as a user starts them."""

from __future__ import annotations

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
    ],
)
def test_cifar10_names_what_is_wrong(tmp_path, args, message):
    done = run("cifar10.py", *SMALL, "--out", "run", *args, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
