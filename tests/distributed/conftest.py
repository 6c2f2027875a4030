"""Runs a script's scenarios in several processes, which talk over gloo on this machine alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

collect_ignore = ["common.py", "forked.py", "replicated.py", "sharded.py"]  # not for pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

Launch = Callable[..., dict[str, Any]]


def _launch(script: str, *processes: int, directory: Path, limit: float = 200) -> Any:
    """The figures of the scenarios in ``script``, by number of processes and name."""
    env = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
    }
    command = [sys.executable, "-m", "forked", script, str(directory), *map(str, processes)]
    log = directory / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # it and what it forked
            process.wait()
    results = directory / "results.json"
    assert results.exists(), log.read_text()[-8000:]
    return json.loads(results.read_text())


@pytest.fixture(scope="session")
def launch() -> Launch:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch without gloo")
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    return _launch
