"""The suites run on the smallest sizes, and their JSON says what a reader needs."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks.report import main
from benchmarks.steps import METHODS
from benchmarks.timing import interleaved

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[2]
ROUNDS = 2
ARGUMENTS = ["--arch=preact_resnet_small", "--batch=4", f"--rounds={ROUNDS}"]
SELECTED = "not weights or (1e+05 and 10-tensors)"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The JSON file of all suites."""
    path = tmp_path_factory.mktemp("benchmarks") / "results.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-p", "no:xdist"]
    command += [*ARGUMENTS, "-k", SELECTED, f"--benchmark-json={path}"]
    # pytest-benchmark does nothing in what looks like a worker of pytest-xdist.
    environment = {k: v for k, v in os.environ.items() if "XDIST" not in k}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.fixture(scope="module")
def suites(path):
    """Rows by suite, comparison and contestant."""
    found = defaultdict(lambda: defaultdict(dict))
    for entry in json.loads(path.read_text())["benchmarks"]:
        row = entry["extra_info"]
        found[row["suite"]][row["comparison"]][row["contestant"]] = row
        if "seconds" in row:
            assert entry["stats"]["data"] == pytest.approx(row["seconds"])
    return found


def test_times_and_ratios(suites):
    assert {"memory", "step", "weights"} <= suites.keys()  # the others need other libraries
    (steps,) = suites["step"].values()
    assert tuple(steps) == METHODS
    for row in steps.values():
        assert len(row["seconds"]) == ROUNDS
        assert min(row["seconds"]) > 0
        assert row["median"] == statistics.median(row["seconds"])
        assert row["ratio"] == pytest.approx(row["median"] / steps["AT"]["median"])


def test_memory_over_at(suites):
    """AT-AWP holds one copy of the perturbed weights; the reference far more."""
    (peaks,) = suites["memory"].values()
    assert peaks["AT-AWP exact"]["over_base_in_parameters"] == pytest.approx(1, abs=0.02)
    assert peaks["reference AT-AWP"]["over_base_in_parameters"] > 1.5


def test_bandwidth_counts_nine_passes_against_two(suites):
    for contestants in suites["weights"].values():
        copy, ours = contestants["copy"], contestants["first_step + restore"]
        assert ours["bandwidth_fraction"] == pytest.approx(4.5 * copy["median"] / ours["median"])


def test_attacks_leave_the_same_accuracy(suites):
    for contestants in suites["attacks"].values():
        expected = contestants["awp_optim"]["robust_accuracy"]
        for row in contestants.values():
            assert row["robust_accuracy"] == pytest.approx(expected, abs=0.25)


def test_the_report(path, tmp_path, capsys):
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| reference AT-AWP " in printed
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert main([str(other)]) == 2
    assert "other.json" in capsys.readouterr().err


def test_several_calls_share_their_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    seconds = interleaved(
        {"a": lambda: advance(2.0), "b": lambda: advance(0.5)}, rounds=3, calls={"a": 5}
    )
    assert seconds == {"a": [2.0] * 3, "b": [0.5] * 3}
