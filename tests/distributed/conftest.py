"""Starts a script in several processes, which talk over gloo on this machine alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

Launch = Callable[..., dict[str, Any]]


def _run(script: str, processes: int, directory: Path, *args: str, limit: float = 150) -> Any:
    """What rank 0 of ``script`` wrote into ``directory``/results.json.

    A script is called with the directory, its rank and the number of processes, then ``args``.
    """
    results = directory / "results.json"
    results.unlink(missing_ok=True)
    (directory / "store").unlink(missing_ok=True)
    env = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE.parent)]),
    }
    command = [sys.executable, str(HERE / script), str(directory)]
    logs = [(directory / f"rank{rank}.log").open("w+") for rank in range(processes)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(processes), *args], env=env, stdout=log, stderr=log
        )
        for rank, log in enumerate(logs)
    ]
    end = time.monotonic() + limit
    try:
        # One that fails leaves the others waiting for it.
        while any(codes := [r.poll() for r in ranks]) or None in codes:
            if any(codes) or time.monotonic() > end:
                break
            time.sleep(0.02)
    finally:
        for r in ranks:
            r.kill()
            r.wait()
        written = []
        for log in logs:
            log.seek(0)
            written.append(log.read()[-3000:])
            log.close()
    assert codes == [0] * processes, "\n".join(
        f"--- rank {rank}: {code}\n{text}" for rank, (code, text) in enumerate(zip(codes, written))
    )
    return json.loads(results.read_text())


@pytest.fixture(scope="session")
def launch() -> Launch:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch without gloo")
    return _run
