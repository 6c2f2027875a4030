"""What a result was measured with, and where results are written."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from awp_optim._utils.io import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The command, commit, date, versions, device and number of threads."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "command": " ".join(["python", *(a.removeprefix(f"{ROOT}/") for a in sys.orig_argv[1:])]),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_cuda else None,
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
    """Replace a JSON file in one step, so that a killed run leaves the previous one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def _commit() -> str:
    """The commit of the code, with a plus if it was changed since; empty if unknown."""
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
