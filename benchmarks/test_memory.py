"""The peak memory of training: what AWP holds over plain adversarial training."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.suites import AT, REFERENCE_AT, STEPS, Record, Setting, training_step

CALLS = 4  # the momentum is there from the second on, interval 2 has been round twice
ATTACK_STEPS = 2  # each step of the attack takes what the one before gave back


def train(name: str, setting: Setting) -> int:
    """Build a network, train it for a few steps; returns the bytes of its perturbed parameters."""
    model = setting.model()
    # Not captured: a graph's memory pool hides from the allocator's count what is used inside.
    step = training_step(name, model, attack_steps=ATTACK_STEPS, cuda_graph=False)
    x, y = setting.data()
    for _ in range(CALLS):
        step(x, y)
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.ndim > 1)


def peak_on_cpu(name: str, setting: Setting) -> tuple[int, int]:
    """Peak bytes of all tensors alive, from torch's own allocator, and the parameters' bytes.

    The profiler reports every allocation and every release that torch's CPU allocator makes, also
    those inside an operation. The network is built and thrown away under its eyes, so its books
    must balance. What oneDNN takes beside the allocator for scratch is not seen; the peak resident
    set size would show it, but is off by what malloc keeps for later.
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
    """Peak bytes that the caching allocator handed out, over those held before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    parameters = train(name, setting)
    peak = torch.cuda.max_memory_allocated() - before
    gc.collect()
    return peak, parameters


@pytest.fixture(scope="module")
def peaks(setting: Setting) -> dict[str, tuple[int, int]]:
    """Peak bytes of each contestant, one after another: nothing here drifts."""
    peak = peak_on_cuda if setting.device.startswith("cuda") else peak_on_cpu
    peak(AT, setting)  # what libraries hold on to once they are loaded
    return {name: peak(name, setting) for name in STEPS}


@pytest.mark.parametrize("name", STEPS)
def test_memory(
    name: str,
    setting: Setting,
    peaks: dict[str, tuple[int, int]],
    benchmark: Any,
    record: Record,
) -> None:
    base = REFERENCE_AT if name.startswith("reference") else AT
    peak, parameters = peaks[name]
    over = peak - peaks[base][0]
    benchmark.pedantic(lambda: None)  # there is no time to tell
    record(
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
