"""``awp landscape``: what it draws of runs, and how it continues."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from awp_optim.lab.config import Config
from awp_optim.lab.data import load_digits
from awp_optim.lab.trainer import fit

CONFIG = Config(
    arch="preact_resnet_small", eps=0.2, step_size=0.1, train_steps=1, test_steps=1, epochs=2,
    batch_size=32, augment=False, train_eval=32, eval_every=1, save_every=1,
)  # fmt: skip
SMALL = ("--limit", 16, "--points", 3, "--grid", 3, "--directions", 1, "--reach", 0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = load_digits().limit(32, 16)
    fit(CONFIG, data, folder / "at")
    fit(replace(CONFIG, gamma=0.01), data, folder / "awp")
    return folder


def points(folder: Path) -> int:
    """How many points are on disk."""
    lines = [f.read_bytes().count(b"\n") - 1 for f in folder.glob("points/*.jsonl")]
    return sum(n for n in lines if n > 0)


def data_of(file: Path):
    return json.loads(file.read_text())["data"]


def test_a_gallery_of_all_that_the_runs_allow(runs, awp, tmp_path):
    ended = awp("landscape", runs, "--gallery", *SMALL)
    assert ended.status == 0, ended.err
    out = tmp_path / "landscapes"
    drawn = {p.stem for p in out.glob("*.png")}
    assert {"learning", "methods", "epochs-at-awp", "perturbed", "surface", "on-the-fly"} <= drawn
    assert {p.stem for p in out.glob("*.json")} == drawn
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("<img ") == len(drawn)
    for name in ("gamma", "sizes", "rwp"):
        assert f"left out: {name}: " in ended.out
    assert "16 of 32 training images" in ended.out
    curves = data_of(out / "methods.json")
    assert curves["AT-AWP"][0]["alphas"] == [-0.5, 0.0, 0.5]
    before = points(out)
    assert awp("landscape", runs, "--figure", "methods", *SMALL).status == 0
    assert points(out) == before  # nothing was measured again


def test_what_can_be_drawn_is_drawn_and_the_rest_named(runs, awp, tmp_path):
    ended = awp("landscape", runs, "--figure", "learning", "--figure", "rwp", *SMALL)
    assert ended.status == 2
    assert "--figure rwp: " in ended.err
    assert (tmp_path / "landscapes/learning.png").exists()


@pytest.mark.slow
def test_a_surface_continues_after_a_kill(runs, awp, start, tmp_path):
    surface = ("landscape", runs / "at", "--figure", "surface", *SMALL[:4], "--steps", 10)
    assert awp(*surface, "--grid", 5, "--out", "whole").status == 0
    out = tmp_path / "killed"
    with start(*surface, "--grid", 31, "--out", "killed") as process:
        deadline = time.monotonic() + 200
        while points(out) < 4:
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.communicate()
    assert not (out / "surface.png").exists()
    assert 4 <= points(out) < 2 * 31 * 31
    # The coarser surface shares the first row's points with the finer one that was killed.
    assert awp(*surface, "--grid", 5, "--out", "killed").status == 0
    assert data_of(out / "surface.json") == data_of(tmp_path / "whole/surface.json")


def test_two_processes_share_the_points_and_draw_once(runs, awp, tmp_path):
    arguments = [*map(str, ("landscape", runs, "--figure", "methods", *SMALL))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*torchrun, "2", "-m", "awp_optim", *arguments, "--out", "both"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("methods.png") == 1
    assert awp(*arguments, "--out", "one").status == 0
    both, one = (data_of(tmp_path / name / "methods.json")["AT"][0] for name in ("both", "one"))
    assert np.allclose(both["adv_losses"], one["adv_losses"], rtol=1e-5)


def test_a_damaged_checkpoint_is_named(runs, awp, tmp_path):
    shutil.copytree(runs / "at", tmp_path / "at")
    (tmp_path / "at/epoch_0002.pt").write_bytes(b"damaged")
    ended = awp("landscape", "at", "--figure", "histogram", *SMALL)
    assert ended.status == 2
    assert "at/epoch_0002.pt" in ended.err


def test_a_setting_can_be_chosen(runs, awp, tmp_path):
    assert awp("landscape", runs, "--figure", "surface", "--select", "^AT$", *SMALL).status == 0
    data = data_of(tmp_path / "landscapes/surface.json")
    assert list(data) == ["AT, epoch 1", "AT, epoch 2"]
