"""A step of adversarial training: AT, AT-AWP in every mode, and the plain implementation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest

from benchmarks.suites import (
    AT,
    CYCLE,
    STEPS,
    Comparison,
    Record,
    Setting,
    Step,
    Watched,
    measure,
    training_step,
)


@pytest.fixture(scope="module")
def measured(setting: Setting) -> tuple[Comparison, dict[str, dict[str, float]]]:
    """All steps in turn, and the seconds of their phases.

    On a GPU the steps are captured, and a graph has no phases to time: those are then of eager
    steps, timed before.
    """
    x, y = setting.data()
    graphs = setting.device.startswith("cuda")

    def run(steps: Mapping[str, Step]) -> Comparison:
        # Three eager steps and one that is captured come before the first replay.
        calls = {name: partial(step, x, y) for name, step in steps.items()}
        seconds = measure(calls, setting, warmup=5 if graphs else 1, calls=CYCLE)
        return Comparison(f"training step, PGD-10: {setting}", AT, seconds)

    eager = {
        name: Watched(training_step(name, setting.model(), cuda_graph=False), setting.device)
        for name in STEPS
    }
    comparison = run(eager)
    phases = {name: s.seconds(setting.rounds, CYCLE.get(name, 1)) for name, s in eager.items()}
    if graphs:
        del eager
        comparison = run({name: training_step(name, setting.model()) for name in STEPS})
    return comparison, phases


@pytest.mark.parametrize("name", STEPS)
def test_step(
    name: str, measured: tuple[Comparison, dict[str, dict[str, float]]], replay: Record
) -> None:
    comparison, phases = measured
    replay(comparison, name, suite="step", phases=phases[name])
