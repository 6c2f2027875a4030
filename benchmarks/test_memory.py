"""The peak memory of training: what AWP holds over plain adversarial training."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.comparison import AddRow, Setting
from benchmarks.steps import AT, METHODS, REFERENCE_AT, training_step

CALLS = 3  # the optimizer has its state from the second one
ATTACK_STEPS = 2  # each iteration reuses the memory of the previous one


def train(name: str, setting: Setting) -> int:
    """Train a new network for a few steps; returns the bytes of its perturbed parameters."""
    model = setting.model()
    # Not captured: the allocator does not count what a graph uses inside its own pool.
    step = training_step(name, model, attack_steps=ATTACK_STEPS, cuda_graph=False)
    x, y = setting.data()
    for _ in range(CALLS):
        step(x, y)
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.ndim > 1)


def peak_on_cpu(name: str, setting: Setting) -> tuple[int, int]:
    """Peak bytes of all live tensors, by torch's own allocator, and the parameters' bytes.

    The profiler reports every allocation and release of torch's CPU allocator, also inside an
    operation. The network is built and deleted while it records, so the sum must return to zero.
    oneDNN's own scratch memory is not counted; the peak resident set size would show it, but it is
    off by what malloc keeps for later.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        parameters = train(name, setting)
        gc.collect()
    results = profiler.profiler.kineto_results
    events = sorted(
        (e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    assert abs(held) < peak / 1000, f"{held} bytes of {peak} were never released"
    return peak, parameters


def peak_on_cuda(name: str, setting: Setting) -> tuple[int, int]:
    """Peak bytes allocated by the caching allocator, over those held before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    parameters = train(name, setting)
    peak = torch.cuda.max_memory_allocated() - before
    gc.collect()
    return peak, parameters


@pytest.fixture(scope="module")
def peaks(setting: Setting) -> dict[str, tuple[int, int]]:
    """Peak bytes of each method."""
    peak = peak_on_cuda if setting.on_gpu else peak_on_cpu
    peak(AT, setting)  # what libraries keep once they are loaded
    return {name: peak(name, setting) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_memory(
    name: str,
    setting: Setting,
    peaks: dict[str, tuple[int, int]],
    benchmark: Any,
    add_row: AddRow,
) -> None:
    base = REFERENCE_AT if name.startswith("reference") else AT
    peak, parameters = peaks[name]
    over = peak - peaks[base][0]
    benchmark.pedantic(lambda: None)  # no time is measured
    add_row(
        {
            "suite": "memory",
            "comparison": f"peak memory of a training step: {setting}",
            "contestant": name,
            "base": base,
            "peak_bytes": peak,
            "parameter_bytes": parameters,
            "over_base_bytes": over,
            "over_base_in_parameters": over / parameters,
        }
    )
