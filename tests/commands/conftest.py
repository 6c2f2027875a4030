"""Commands run in this process, which saves the imports."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from awp_optim.cli import main

for package in ("matplotlib", "rich", "sklearn", "tyro"):
    pytest.importorskip(package)

ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads of several processes wait for each other


class Ended(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def awp(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; returns its exit status, what it printed, its errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)

    def run(*arguments):
        capsys.readouterr()
        status = 0
        try:
            main([*map(str, arguments)])
        except SystemExit as end:
            status = end.code or 0
        return Ended(status, *capsys.readouterr())

    return run


@pytest.fixture
def start(tmp_path):
    """Starts a command as a process of its own."""

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "awp_optim", *map(str, arguments)],
            cwd=tmp_path,
            env=ALONE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
