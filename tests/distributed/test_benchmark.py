"""The benchmark of several processes runs, here in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_every_contestant_is_timed(launch, tmp_path):
    out = tmp_path / "out.json"
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    sizes = ["--batch", "2", "--size", "8", "--attack-steps", "1", "--rounds", "2"]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.distributed", "--out", str(out), *sizes],
        env=os.environ | alone | {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        check=True,
        timeout=120,
    )
    report = json.loads(out.read_text())
    assert report["processes"] == 1
    assert len(report["seconds"]) == 7
    assert all(len(times) == 2 and min(times) > 0 for times in report["seconds"].values())
