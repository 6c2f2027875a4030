"""Timing several contestants in turn, so that a machine that drifts affects all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from awp_optim._cuda_graphs.graphs import WARMUP

WARMUP_CALLS = WARMUP + 4
"""Calls before the timed ones on a GPU: the eager ones, up to two captures (an optimizer's first
step creates its state) and a few replays."""

Call = Callable[[], Any]
Seconds = dict[str, list[float]]
"""Seconds of a call in every round, by contestant."""


def interleaved(
    contestants: Mapping[str, Call],
    *,
    rounds: int,
    warmup: int = 1,
    calls: Mapping[str, int] | int = 1,
    device: torch.device | str = "cpu",
) -> Seconds:
    """Time every contestant once a round; each round starts with another one.

    Args:
        contestants: what to time, by name; called without arguments.
        rounds: how many times each contestant is timed.
        warmup: calls of each contestant before that are not timed.
        calls: consecutive calls that are timed together, by name or the same for all. With several
            calls a GPU works on one while the host prepares the next, as it does in training; with
            one, the host's work on it is part of the time.
        device: "cuda" measures with device events, anything else with the host's clock.

    Returns:
        The average seconds of a call, by name, in the order of the rounds.
    """
    timed = _device_seconds if torch.device(device).type == "cuda" else _host_seconds
    names = list(contestants)
    for _ in range(warmup):
        for name in names:
            contestants[name]()
    seconds: Seconds = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            n = calls if isinstance(calls, int) else calls.get(name, 1)
            seconds[name].append(timed(contestants[name], n) / n)
    return seconds


def ratios(seconds: Seconds, name: str, base: str) -> list[float]:
    """Time of ``name`` over time of ``base``, round by round."""
    return [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]


def median_ratio(seconds: Seconds, name: str, base: str) -> float:
    """Median time of ``name`` over median time of ``base``."""
    return statistics.median(seconds[name]) / statistics.median(seconds[base])


def medians(seconds: Seconds) -> dict[str, float]:
    """Median seconds by name."""
    return {name: statistics.median(each) for name, each in seconds.items()}


def _host_seconds(call: Call, n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        call()
    return time.perf_counter() - start


def _device_seconds(call: Call, n: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(n):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
