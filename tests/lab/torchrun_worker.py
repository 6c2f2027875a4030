"""What processes of torchrun train, to be compared with a single one: a program of its own.

    torchrun --nproc-per-node 2 --max-restarts 1 torchrun_worker.py FOLDER

It is in float64, where rounding does not turn the sign of a gradient, and goes on with the runs it
finds in FOLDER. The run "killed" is broken off by the death of a rank; then, started again, by a
signal to one. What each rank saw is in FOLDER/rank0.pt and so on. In between it is awp train, and
at the end awp train without an option that it needs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from awp_optim import AWP
from awp_optim.lab import building, tensorboard, trainer, training_set
from awp_optim.lab.augment import mixup
from awp_optim.lab.commands.ending import sentences
from awp_optim.lab.commands.train import main as train_command
from awp_optim.lab.config import Config
from awp_optim.lab.data import load_digits
from awp_optim.lab.interrupt import graceful_stop
from awp_optim.lab.job import Job, job
from awp_optim.lab.models import build_model
from awp_optim.lab.pseudo import PseudoLabeled

CONFIG = Config(
    arch="preact_resnet_small",
    eps=0.2,
    step_size=0.1,
    train_steps=2,
    test_steps=1,
    epochs=2,
    batch_size=24,
    train_eval=13,
    lr=0.05,
)
# 37 images: batches of 24 and 13; 25 and 12. The 129 to test on come as 128 and 1.
RUNS: dict[str, dict[str, Any]] = {
    "at": {},
    "at-awp": {"gamma": 0.01, "batch_size": 25, "cutout": 3, "epochs": 3},
    "cheap": {"gamma": 0.01, "ascent": "attack", "alternations": 2, "ema": 0.9, "ema_warmup": True},
    "gkl": {"method": "gkl", "gamma": 0.01, "ascent_below": 2.3, "batch_size": 25, "epochs": 3},
    "n-fgsm": {"gamma": 0.01, "train_attack": "n-fgsm", "batch_size": 25},
    "rst": {"method": "rst", "gamma": 0.01, "norm": "l2", "mixup": 1.0, "batch_size": 25},
    "rwp": {"gamma": 0.01, "direction": "random", "awp_start": 1, "eps_schedule": "linear"},
    "cutmix": {"gamma": 0.01, "cutmix": 1.0, "nesterov": True, "bn_decay": False, "epochs": 1},
    "killed": {"gamma": 0.01, "batch_size": 25, "epochs": 4},
}
DATA = load_digits().limit(37, 129)
UNLABELED = load_digits().split(90)[0]


@contextmanager
def double() -> Iterator[None]:
    """Inside, the trainer works in float64, and without TensorBoard, which takes long to load."""
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(tensorboard, "_open_writer", return_value=None):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def train(name: str, folder: Path, **kwargs: Any) -> dict[str, Any]:
    """Do, or continue, a run in FOLDER/name; its weights, its rows and the sizes of all v."""
    vs = []
    first_step = AWP.first_step

    def recorded(self: AWP, *args: Any, **kwargs: Any) -> None:
        first_step(self, *args, **kwargs)
        vs.append(sum(v.sum() for v in self.perturbation().values()))

    few = PseudoLabeled(UNLABELED.x_train[:30], UNLABELED.y_train[:30])
    with double(), mock.patch.object(AWP, "first_step", recorded):
        model, rows = trainer.fit(
            replace(CONFIG, **RUNS[name]),
            DATA,
            folder / name,
            unlabeled=few if name == "rst" else None,
            resume=True,
            **kwargs,
        )
    return {"weights": model.state_dict(), "rows": rows, "v": torch.tensor(vs)}


def dropout() -> dict[str, Any]:
    """A run whose model draws more numbers on the rank with more images, in bfloat16."""
    mixed = []

    def build(name: str, **kwargs: Any) -> nn.Module:
        model = build_model(name, **kwargs)
        model.linear = nn.Sequential(nn.Dropout(0.3), model.linear)
        return model

    def recorded(*args: Any) -> tuple[Tensor, Tensor]:
        x, y = mixup(*args)
        mixed.append(x.double().sum())
        return x, y

    config = replace(CONFIG, batch_size=9, gamma=0.01, mixup=1.0, precision="bfloat16", epochs=1)
    with (
        mock.patch.object(building, "build_model", build),
        mock.patch.object(training_set, "mixup", recorded),
    ):
        model, rows = trainer.fit(config, DATA)
    return {"weights": model.state_dict(), "rows": rows, "mixed": torch.tensor(mixed)}


def errors(ranks: Job) -> list[str]:
    """What every rank says to what goes wrong on all of them, or on the first or last alone."""

    def fail_on(rank: int) -> None:
        if ranks.rank == rank:
            raise FileNotFoundError(f"no data on rank {rank}")

    attempts = (
        lambda: trainer.fit(replace(CONFIG, batch_size=1), DATA),
        lambda: trainer.fit(replace(CONFIG, lr=1e30), DATA),
        lambda: trainer.fit(replace(CONFIG, lr=0.1), DATA, FOLDER / "at", resume=True),
        lambda: trainer.fit(CONFIG, DATA, FOLDER / "at"),
        lambda: ranks.first(lambda: fail_on(0)),
        lambda: ranks.in_turns(lambda: fail_on(0)),
        lambda: ranks.in_turns(lambda: fail_on(1)),
    )
    said = []
    for attempt in attempts:
        try:
            attempt()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def die(done: int, steps: int) -> None:
    """Kill the second rank in the middle of the third epoch."""
    if done == 5 and ranks.rank == 1:
        (FOLDER / "died").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)


def ask(done: int, steps: int) -> None:
    """Ask the second rank alone to stop, a step further."""
    if done == 7 and ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def command(ranks: Job, *arguments: str) -> None:
    """``awp train`` on these ranks."""
    small = ("--dataset", "digits", "--arch", "preact_resnet_small", "--limit", "64")
    quick = ("--epochs", "2", "--train-steps", "1", "--test-steps", "1", "--eval-every", "2")
    train_command([*small, *quick, "--out", str(FOLDER / "command"), *arguments], ranks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER = Path(sys.argv[1])
    with job() as ranks:
        if not (FOLDER / "died").exists():
            seen = {name: train(name, FOLDER) for name in RUNS if name != "killed"}
            seen["dropout"], seen["errors"] = dropout(), errors(ranks)
            torch.save(seen, FOLDER / f"rank{ranks.rank}.pt")
            command(ranks)
            try:
                with graceful_stop(lambda text: None, echo=5):
                    train("killed", FOLDER, on_step=die)
            except ConnectionError as error:
                sys.exit(f"error: {error}")
        print(f"begun again after {time.time() - float((FOLDER / 'died').read_text()):.1f} s")
        with graceful_stop(lambda text: None, echo=5) as request:
            train("killed", FOLDER, on_step=ask, stop=request)
        print(json.dumps({"statuses": ranks.gather(request.exit_status)}))
        with sentences():
            command(ranks, "--method", "pretrain", "--resume")
