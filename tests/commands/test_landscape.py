"""examples/landscape.py, as a user starts it and in this process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from awp_optim.lab.config import Config
from awp_optim.lab.data import load_digits
from awp_optim.lab.trainer import fit

SCRIPT = Path(__file__).parent.parent / "examples" / "landscape.py"
CONFIG = Config(
    arch="preact_resnet_small", eps=0.2, step_size=0.1, train_steps=1, test_steps=1, epochs=2,
    batch_size=32, augment=False, train_eval=32, eval_every=1, save_every=1,
)  # fmt: skip
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads of several processes wait for each other
SMALL = ("--limit", 16, "--points", 3, "--grid", 3, "--directions", 1, "--reach", 0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = load_digits().limit(32, 16)
    fit(CONFIG, data, folder / "at")
    fit(replace(CONFIG, gamma=0.01), data, folder / "awp")
    return folder


@pytest.fixture
def start(monkeypatch, capsys, tmp_path):
    """Runs the script here; returns its exit status, what it printed and what it complained of."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("landscape_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def start(*args):
        status = None
        try:
            module.main([*map(str, args), "--device", "cpu"])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return start


def command(*args) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, args)]


def points(folder: Path) -> int:
    """How many points are on disk."""
    lines = [f.read_bytes().count(b"\n") - 1 for f in folder.glob("points/*.jsonl")]
    return sum(n for n in lines if n > 0)


def test_a_gallery_of_all_that_the_runs_allow(runs, start, tmp_path):
    status, printed, _ = start(runs, "--gallery", *SMALL)
    assert status is None
    out = tmp_path / "landscapes"
    drawn = {p.stem for p in out.glob("*.png")}
    assert drawn == {
        "learning", "methods", "epochs-at", "epochs-at-awp", "perturbed", "histogram",
        "directions", "surface", "on-the-fly",
    }  # fmt: skip
    assert {p.stem for p in out.glob("*.json")} == drawn
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("<img ") == len(drawn)
    for name in ("gamma", "sizes", "rwp"):
        assert f"<li>{name}: " in page
        assert f"left out: {name}: " in printed
    assert "16 of 32 training images, PGD-1 at linf eps 0.2" in page
    assert "16 of 32 training images" in printed
    curves = json.loads((out / "methods.json").read_text())["data"]
    assert curves["AT-AWP"][0]["alphas"] == [-0.5, 0.0, 0.5]
    before = points(out)
    status, *_ = start(runs, "--figure", "methods", *SMALL)
    assert status is None
    assert points(out) == before  # nothing was measured again


def test_a_surface_goes_on_after_a_kill(runs, tmp_path):
    args = (runs / "at", "--figure", "surface", *SMALL[:4], "--grid", 31, "--steps", 10)
    whole = subprocess.run(
        command(*args[:-3], 5, *args[-2:], "--out", tmp_path / "whole"), capture_output=True,
        text=True, timeout=240, env=ALONE,
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    with subprocess.Popen(
        command(*args, "--out", out), stdout=subprocess.DEVNULL, env=ALONE
    ) as process:
        deadline = time.monotonic() + 200
        while points(out) < 4:
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (out / "surface.png").exists()
    left = points(out)
    assert 4 <= left < 2 * 31 * 31
    # The coarser surface shares the first row's points with the finer one that was killed.
    go_on = command(*args[:-3], 5, *args[-2:], "--out", out)
    done = subprocess.run(go_on, capture_output=True, text=True, timeout=240, env=ALONE)
    assert done.returncode == 0, done.stderr
    surfaces = [
        json.loads((folder / "surface.json").read_text())["data"]
        for folder in (tmp_path / "whole", out)
    ]
    assert surfaces[0] == surfaces[1]


def test_ctrl_c_says_that_the_same_command_goes_on(runs, start, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("awp_optim.lab.reports.landscapes.loss_curve", interrupted)
    status, _, complaint = start(runs, "--figure", "methods", *SMALL)
    assert status == 130
    assert "the same command goes on" in complaint


def test_two_processes_share_the_points_and_draw_once(runs, tmp_path, start):
    args = (runs, "--figure", "methods", *SMALL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *command(*args, "--out", "both")[1:]],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env=ALONE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("methods.png") == 1
    assert start(*args, "--out", "one")[0] is None
    both, one = (
        json.loads((tmp_path / name / "methods.json").read_text())["data"]["AT"][0]
        for name in ("both", "one")
    )
    assert np.allclose(both["adv_losses"], one["adv_losses"], rtol=1e-5)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ((), "give --figure NAME, or --gallery"),
        (("--figure", "methods", "--gallery"), "give --figure NAME, or --gallery"),
        (("--figure", "none"), "invalid choice"),
        (("--gallery", "--points", 4), "--points must be an odd number"),
        (("--gallery", "--grid", 1), "--grid must be an odd number"),
        (("--gallery", "--limit", 0), "--limit must be at least 1"),
        (("--gallery", "--reach", 0), "--reach must be above 0"),
        (("--gallery", "--reach", 0.5, "--at", 0.6), "within --reach"),
        (("--gallery", "--gammas", 0, 1), "--gammas must be above 0"),
    ],
)
def test_options_that_make_no_sense(runs, start, args, complaint):
    status, _, said = start(runs, *args)
    assert status == 2
    assert complaint in said


def test_what_cannot_be_drawn_is_said_in_a_line(runs, start, tmp_path):
    assert start(runs, "--figure", "rwp", *SMALL)[0].startswith("error: --figure rwp: no run")
    for pattern, why in (("nothing", "none of AT; AT-AWP"), ("[", "not a regular expression")):
        assert why in start(runs, "--gallery", "--select", pattern, *SMALL)[0]
    assert "holds no run" in start(tmp_path, "--gallery")[0]
    shutil.copytree(runs / "at", tmp_path / "at")
    (tmp_path / "at/epoch_0002.pt").write_bytes(b"damaged")
    said = start(tmp_path / "at", "--figure", "histogram", *SMALL)[0]
    assert said.startswith("error: ")
    assert "at/epoch_0002.pt" in said


def test_a_setting_can_be_chosen(runs, start, tmp_path):
    assert start(runs, "--figure", "surface", "--select", "^AT$", *SMALL)[0] is None
    data = json.loads((tmp_path / "landscapes/surface.json").read_text())["data"]
    assert list(data) == ["AT, epoch 1", "AT, epoch 2"]


def test_help_names_every_figure():
    done = subprocess.run(command("--help"), capture_output=True, text=True, timeout=120)
    assert "on-the-fly  What adversarial examples" in done.stdout
