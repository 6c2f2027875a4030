"""The suites run, and their JSON says what it should; how fast anything was is not asked."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks.suites import Watched

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parent.parent.parent
ROUNDS = 2
# The smallest of everything; of the sizes of the weights suite one alone.
ARGUMENTS = ["--arch=preact_resnet_small", "--batch=4", f"--rounds={ROUNDS}"]
SELECTED = "not weights or (1e+05 and 10-tensors)"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What all suites together write, and what they print."""
    path = tmp_path_factory.mktemp("benchmarks") / "results.json"
    # As a command, without the working directory on the path, as a user has it.
    command = [Path(sys.executable).with_name("pytest"), "benchmarks", "--benchmark-only"]
    command += ["-p", "no:xdist"]
    command += [*ARGUMENTS, "-k", SELECTED, f"--benchmark-json={path}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        # pytest-benchmark does nothing in what looks like a worker of pytest-xdist.
        env={k: v for k, v in os.environ.items() if "XDIST" not in k and k != "PYTHONPATH"}
        | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text()), done.stdout


class Clockwork:
    """A step whose parts take known times on a clock of its own."""

    now = 0.0
    calls = 0

    def clock(self) -> float:
        return self.now

    def __call__(self, x, y):
        self.calls += 1
        self._attack(x)
        self._ascend()
        self._ascend()
        self.now += 100  # between the phases
        return self._descend() + self._update()

    def _attack(self, x):
        self.now += x

    def _ascend(self):
        self._descend()  # a phase inside a phase is part of the outer one
        self.now += 1 if self.calls % 2 else 0

    def _descend(self):
        self.now += 3
        return 3

    def _update(self):
        self.now += 0.5
        return 0.5


def test_phases_are_summed_over_calls_and_shared_by_the_steps_of_a_cycle(monkeypatch):
    step = Clockwork()
    monkeypatch.setattr(time, "perf_counter", step.clock)
    watched = Watched(step, "cpu")
    for x in (1000, 1000, 10, 20, 30, 40, 70, 80):  # the first two are a warm-up
        assert watched(x, None) == 3.5
    each = {"ascent": (8 + 6) / 2, "descent": 3, "update": 0.5}
    assert watched.seconds(last=3, cycle=2) == {"attack": (30 + 40) / 2, **each}


@pytest.fixture(scope="module")
def suites(result):
    """Rows by suite, comparison and contestant."""
    found = defaultdict(lambda: defaultdict(dict))
    for entry in result[0]["benchmarks"]:
        row = entry["extra_info"]
        found[row["suite"]][row["comparison"]][row["contestant"]] = row
    return found


def test_all_suites_ran(suites):
    assert {"memory", "step", "weights"} <= suites.keys()  # the others need other libraries
    (steps,) = suites["step"].values()
    assert list(steps) == [
        "AT",
        "AT-AWP exact",
        "AT-AWP attack",
        "AT-AWP momentum",
        "AT-AWP interval 2",
        "reference AT",
        "reference AT-AWP",
    ]


def test_times_are_those_measured_and_ratios_are_theirs(result, suites):
    for entry in result[0]["benchmarks"]:
        row = entry["extra_info"]
        if row["suite"] == "memory":
            continue
        assert len(row["seconds"]) == ROUNDS
        assert min(row["seconds"]) > 0
        assert entry["stats"]["data"] == pytest.approx(row["seconds"])
        assert row["median"] == statistics.median(row["seconds"])
        base = suites[row["suite"]][row["comparison"]][row["base"]]
        assert row["ratio"] == pytest.approx(row["median"] / base["median"])
        low, high = row["ratio_quartiles"]
        each = [a / b for a, b in zip(row["seconds"], base["seconds"])]
        assert low <= statistics.median(each) <= high
        if row is base:
            assert row["ratio"] == low == high == 1


def test_phases_are_parts_of_the_step(suites):
    (steps,) = suites["step"].values()
    for name, row in steps.items():
        phases = row["phases"]
        assert list(phases) == ["attack", "ascent", "descent", "update"]
        assert min(phases[k] for k in ("attack", "descent", "update")) > 0
        assert (phases["ascent"] == 0) == (name in ("AT", "reference AT"))
        assert sum(phases.values()) <= max(row["seconds"])


def test_memory_over_at(suites):
    """Exact holds one copy of the perturbed weights, as documented; the reference far more."""
    (peaks,) = suites["memory"].values()
    assert peaks["AT-AWP exact"]["over_base_in_parameters"] == pytest.approx(1, abs=0.02)
    assert peaks["reference AT-AWP"]["over_base_in_parameters"] > 1.5
    for row in peaks.values():
        over = row["peak_bytes"] - peaks[row["base"]]["peak_bytes"]
        assert row["over_base_bytes"] == over
        assert row["over_base_in_parameters"] == over / row["parameter_bytes"]


def test_bandwidth_counts_nine_passes_against_two(suites):
    assert len(suites["weights"]) == 2  # with and without momentum
    for contestants in suites["weights"].values():
        assert len(contestants) == 4
        copy, ours = contestants["copy"], contestants["first_step + restore"]
        assert ours["bandwidth_fraction"] == pytest.approx(4.5 * copy["median"] / ours["median"])
        assert (ours["parameters"], ours["tensors"]) == (100_000, 10)


def test_attacks_agree(suites):
    for contestants in suites["attacks"].values():
        ours = contestants["awp_optim"]
        for row in contestants.values():
            assert row["robust_accuracy"] == pytest.approx(ours["robust_accuracy"], abs=0.25)
            assert row["pixels_as_ours"] > 0.9


def test_it_says_what_it_was_measured_with(result):
    info = result[0]["machine_info"]
    assert info["threads"] == 1
    assert info["command"].startswith("pytest benchmarks --benchmark-only")
    assert {"commit", "date", "torch", "python", "device"} <= info.keys()
    assert "node" not in info


def test_the_tables_are_printed_last(result):
    tables = result[1].split("medians and ratios")[1]
    assert "| reference AT-AWP " in tables
    assert "ratio to AT" in tables
    assert "times as fast as reference AT-AWP" in tables
