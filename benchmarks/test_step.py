"""A step of adversarial training: AT, AT-AWP in both modes, and the plain implementation."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.comparison import AddRow, Comparison, Setting
from benchmarks.steps import AT, METHODS, training_step


@pytest.fixture(scope="module")
def measured(setting: Setting) -> Comparison:
    x, y = setting.data()
    steps = {m: partial(training_step(m, setting.model()), x, y) for m in METHODS}
    return setting.measure(f"training step, PGD-10: {setting}", AT, steps)


@pytest.mark.parametrize("method", METHODS)
def test_step(method: str, measured: Comparison, add_times: AddRow) -> None:
    add_times(measured, method, suite="step")
