"""A run that was stopped, killed or out of disk space ends as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from awp_optim.lab.run_folder import read_metrics
from awp_optim.lab.trainer import fit

pytestmark = pytest.mark.usefixtures("one_thread")


def without_times(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_resumes_after_an_epoch(config, data, tmp_path, epochs):
    def interrupt(row):
        if row["epoch"] + 1 == epochs:
            raise KeyboardInterrupt

    model, rows = fit(config, data, tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        fit(config, data, tmp_path / "parts", on_epoch=interrupt)
    torch.manual_seed(77)
    resumed, rows_resumed = fit(config, data, tmp_path / "parts", resume=True)
    assert same_weights(model, resumed)
    assert without_times(rows_resumed) == without_times(rows)
    ours, theirs = (without_times(read_metrics(tmp_path / run)) for run in ("one", "parts"))
    assert ours == theirs


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5, 7, 8, 9, 14])
def test_a_stopped_run_resumes(config, data, tmp_path, stop_at):
    """Stopped before, after and between steps, and while evaluating."""
    config = replace(config, method="gkl", epochs=2, eps_schedule="linear", mixup=1.4)
    config = replace(config, ema=0.5, ema_start=1, ema_warmup=True)
    model, rows = fit(config, data, tmp_path / "one")
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == stop_at

    _, first = fit(config, data, tmp_path / "parts", stop=stop)
    assert len(asked) == stop_at  # it ended there
    assert without_times(first) == without_times(rows[: len(first)])
    assert len(first) == (stop_at - 1) // 7  # asked before and between 3 steps, and 4 evaluations
    torch.manual_seed(77)
    resumed, both = fit(config, data, tmp_path / "parts", resume=True, stop=lambda: False)
    assert without_times(both) == without_times(rows)
    assert same_weights(model, resumed)
    for name in ("best.pt", "last.pt"):
        ours, theirs = (
            torch.load(tmp_path / run / name, weights_only=True) for run in ("one", "parts")
        )
        assert ours.keys() == theirs.keys()
        for part in ("model", "ema"):
            assert all(torch.equal(v, theirs[part][k]) for k, v in ours[part].items())


def run_script(name, *arguments, before=()):
    script = Path(__file__).with_name(name)
    return subprocess.run(
        [*before, sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )


@pytest.mark.parametrize(
    ("number", "kills"),
    [
        ("SIGKILL", 8),
        ("SIGTERM", 4),
        pytest.param("SIGKILL", 50, marks=pytest.mark.slow),
        pytest.param("SIGTERM", 20, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_random_times_resumes(tmp_path, number, kills):
    done = run_script("killed_runs.py", tmp_path, kills, number)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(int(line.split()[1]) for line in lines) >= kills
    for line in lines:
        files = "best.pt best.safetensors config.json last.pt metrics.csv"
        assert f"different: []; files: {files}" in line


@pytest.mark.parametrize("kind", ["a limit", "a file system"])
def test_a_full_disk_loses_nothing(tmp_path, kind):
    run = tmp_path / "run"
    if kind == "a limit":
        done, reason = run_script("full_disk.py", run, 100_000), "File too large"
    else:
        mount = 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"'
        before = ("unshare", "-rm", "sh", "-c", mount, str(tmp_path))
        done = run_script("full_disk.py", run, before=before)
        reason = "No space left on device"
        if "mount" in done.stderr or "unshare" in done.stderr:
            pytest.skip(f"no file system of our own here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    error, *rest = done.stdout.splitlines()
    assert reason in error
    assert rest == ["as it was", "3 epochs in the end"]
