"""Measuring side by side: every contestant once a round, so that a drifting machine hits all."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Seconds = dict[str, list[float]]


def interleaved(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
) -> Seconds:
    """Time every contestant once a round, in turn; each round starts with another of them.

    Args:
        contestants: what to time, by name; called without arguments.
        rounds: calls of each that are timed.
        warmup: calls of each before, that are not.
        device: "cuda" times with device events, which measure the device's own time line.

    Returns:
        Seconds of every timed call, by name, in the order of the rounds.
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
            seconds[name].append(timed(contestants[name]))
    return seconds


def ratios(seconds: Seconds, name: str, base: str) -> list[float]:
    """Time of ``name`` over time of ``base``, round by round."""
    return [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]


def median_ratio(seconds: Seconds, name: str, base: str) -> float:
    """Median time of ``name`` over median time of ``base``."""
    return statistics.median(seconds[name]) / statistics.median(seconds[base])


def _host_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _device_seconds(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a figure must be read with: command, commit, date, versions, device, threads."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "command": " ".join(["python", *(a.removeprefix(f"{ROOT}/") for a in sys.orig_argv[1:])]),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if is_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def device_slug(device: torch.device | str = "cpu") -> str:
    """The folder under ``benchmarks/results`` for a device: its name in a-z, 0-9 and dashes."""
    if torch.device(device).type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def write_json(path: Path | str, content: Any) -> None:
    """Write ``content`` as a whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _commit() -> str:
    """The commit the code is of, with a plus where it was changed since; empty if unknown."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()
