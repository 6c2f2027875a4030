"""The trainer on two processes of torchrun, against the same run in a single one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from awp_optim.lab.distributed import TrainingRanks
from awp_optim.lab.run_folder import read_metrics
from awp_optim.objectives import AT

WORKER = Path(__file__).parent / "torchrun_worker.py"
_spec = importlib.util.spec_from_file_location("torchrun_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="no torchrun"
)


def start(*arguments: object, restarts: int = 0, cwd: Path) -> subprocess.Popen[str]:
    """Two processes under torchrun, on this machine alone."""
    where = (
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        "--local-addr",
        "127.0.0.1",
    )
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", *where),
            *("--nproc-per-node", "2", "--max-restarts", str(restarts), *map(str, arguments)),
        ],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def own(stderr: str) -> list[str]:
    """What our processes wrote, without torchrun's own report."""
    return [line for line in stderr.splitlines() if "error: " in line or "stopping" in line]


class Runs:
    """The same runs alone (in one) and on two ranks, and what torchrun's processes said."""

    def __init__(self, folder: Path) -> None:
        one, two = folder / "one", folder / "two"
        # Begun alone, and resumed on two ranks from the end of the first epoch's steps.
        worker.train("at-awp", two, stop=iter([False] * 3 + [True]).__next__)
        process = start(WORKER, two, restarts=1, cwd=folder)
        self.alone = {name: worker.train(name, one) for name in worker.RUNS}
        self.out, self.err = process.communicate(timeout=240)
        self.status = process.returncode
        assert (two / "rank1.pt").exists(), self.err
        self.ranks = [torch.load(two / f"rank{r}.pt") for r in (0, 1)]
        self.one, self.two = one, two


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Runs(tmp_path_factory.mktemp("runs"))
    torch.set_num_threads(threads)


def differences(a, b):
    """The largest difference of two runs in weights and in figures, times aside."""
    weights = max((v - b["weights"][k]).abs().max().item() for k, v in a["weights"].items())
    assert len(a["rows"]) == len(b["rows"])
    rows = [
        abs(x[k] - y[k])
        for x, y in zip(a["rows"], b["rows"], strict=True)
        for k in x
        if "seconds" not in k
    ]
    return weights, max(rows)


@pytest.mark.parametrize("name", [name for name in worker.RUNS if name != "killed"])
def test_two_ranks_give_the_curve_and_the_weights_of_one(runs, name):
    """Also with shares of 12 and 13 images, and from a checkpoint of a single process."""
    alone, (first, second) = runs.alone[name], (r[name] for r in runs.ranks)
    weights, figures = differences(alone, first)
    assert weights < 1e-11
    assert figures < 1e-6  # losses of steps are summed in float32
    assert (len(first["v"]) > 0) == bool(worker.RUNS[name].get("gamma"))
    torch.testing.assert_close(
        first["v"], alone["v"][-len(first["v"]) or None :], rtol=1e-9, atol=1e-9
    )
    # One v, and the same weights to the last bit.
    assert torch.equal(first["v"], second["v"])
    assert differences(first, second) == (0, 0)


def test_training_moves_more_than_the_differences(runs):
    at, awp = runs.alone["at"]["weights"], runs.alone["at-awp"]["weights"]
    assert max((at[k].double() - awp[k].double()).abs().max() for k in at) > 1e-2


def test_ranks_write_one_set_of_files_and_no_prefixes(runs):
    for name in ("at", "at-awp", "cheap", "rst"):
        ours = {p.name for p in (runs.two / name).iterdir()}
        assert ours == {p.name for p in (runs.one / name).iterdir()}
        for file in ("last.pt", "best.pt"):
            a, b = (torch.load(f / name / file) for f in (runs.one, runs.two))
            assert a.keys() == b.keys()
            assert a["model"].keys() == b["model"].keys()
        assert (runs.one / name / "config.json").read_text() == (
            runs.two / name / "config.json"
        ).read_text()
        a, b = (read_metrics(f / name) for f in (runs.one, runs.two))
        assert [row.keys() for row in a] == [row.keys() for row in b]


def test_a_model_that_draws_numbers_leaves_the_ranks_together(runs):
    first, second = (r["dropout"] for r in runs.ranks)
    assert torch.equal(first["mixed"], second["mixed"])
    assert len(first["mixed"]) == 4
    assert differences(first, second) == (0, 0)


def test_errors_are_the_same_on_all_ranks(runs):
    first, second = (r["errors"] for r in runs.ranks)
    assert first == second
    expected = (
        "ValueError: a batch has 1 images for 2 processes",
        "FloatingPointError: the loss is not finite at step",
        "ValueError: the run in",
        "FileExistsError: ",
        "FileNotFoundError: no data on rank 0",
        "FileNotFoundError: no data on rank 0",
        "FileNotFoundError: no data on rank 1",
    )
    assert len(first) == len(expected)
    for said, beginning in zip(first, expected, strict=True):
        assert said.startswith(beginning)


def test_the_command_speaks_once(runs):
    names = {p.name for p in (runs.two / "command").iterdir()} - {"tensorboard"}
    assert names == {
        "best.pt",
        "best.safetensors",
        "last.pt",
        "config.json",
        "metrics.csv",
        "curves.png",
    }
    assert len(list((runs.two / "command").glob("tensorboard/*"))) <= 1
    assert len(read_metrics(runs.two / "command")) == 2
    for text in ("epoch 1/2", "epoch 2/2", "Robust test accuracy (PGD-1): best"):
        assert runs.out.count(text) == 1
    # At the very end, with an option that is wrong on every rank.
    assert own(runs.err)[1:] == [
        "error: method 'pretrain' needs weights to start from: --init CHECKPOINT"
    ]


def test_the_death_of_a_rank_is_named_and_the_run_goes_on(runs):
    """By itself under --max-restarts; then on a single process, to the end it would have had."""
    line, _ = own(runs.err)
    assert line.startswith("error: rank 1 of 2 processes has ended")
    assert "continue with --resume" in line
    (again,) = [line for line in runs.out.splitlines() if line.startswith("begun again")]
    assert float(again.split()[-2]) < 40
    # The signal to one rank stopped both, in the middle of an epoch, and saved.
    (said,) = [json.loads(line) for line in runs.out.splitlines() if line.startswith("{")]
    assert said == {"statuses": [0, 143]}
    assert runs.status != 0
    saved = torch.load(runs.two / "killed/last.pt")
    assert (len(saved["rows"]), saved["epoch"]["step"]) == (3, 1)
    weights, figures = differences(runs.alone["killed"], worker.train("killed", runs.two))
    assert weights < 1e-11
    assert figures < 1e-6


def test_a_loss_of_another_batch_than_the_last_is_refused():
    ranks = TrainingRanks()
    ranks.world = 2
    objective = ranks.shared_objective(AT())
    x, y = ranks.shard(torch.rand(8, 3), torch.arange(8) % 3)
    objective(x, None, y)
    ranks.shard(torch.rand(6, 3))  # by an evaluation, say
    with pytest.raises(AssertionError, match="sharded last"):
        objective(x, None, y)
