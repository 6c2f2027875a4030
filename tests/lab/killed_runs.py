"""Runs that are killed: a program of its own, for it forks, which threads would not survive.

    python killed_runs.py FOLDER KILLS SIGNAL

Trains once without a break in FOLDER/one. Then starts the same run again and again and sends it
the signal at random times, until it has been killed KILLS times (in FOLDER/0, FOLDER/1 and so on:
as soon as a run is over, the next one begins). Prints, for each, how often it was killed and in
what its end differs from that of the one without a break: weights, optimizer, random states,
metrics.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from awp_optim.lab.config import Config
from awp_optim.lab.data import load_digits
from awp_optim.lab.interrupt import graceful_stop
from awp_optim.lab.run_folder import read_metrics
from awp_optim.lab.trainer import fit

CONFIG = Config(
    arch="preact_resnet_small",
    gamma=0.01,
    eps=0.2,
    step_size=0.1,
    train_steps=1,
    test_steps=1,
    epochs=8,
    batch_size=16,
    train_eval=8,
    ema=0.9,
    mixup=1.0,
    select_on="val",
    val_images=8,
)


def run(folder: Path) -> None:
    with graceful_stop(lambda text: None) as request:
        fit(CONFIG, data, folder, resume=True, stop=request)


def fork(folder: Path) -> int:
    """The run in a child; its process number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run(folder)
        status = 0
    finally:
        os._exit(status)


def differences(a: object, b: object, path: str = "") -> list[str]:
    """Where two checkpoints differ, times aside."""
    if "seconds" in path:
        return []
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [path]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def is_complete(folder: Path) -> bool:
    try:
        return len(read_metrics(folder)) == CONFIG.epochs
    except FileNotFoundError:
        return False


BEST = "best.safetensors"


if __name__ == "__main__":
    torch.set_num_threads(1)
    base, kills, number = Path(sys.argv[1]), int(sys.argv[2]), signal.Signals[sys.argv[3]]
    data = load_digits().limit(41, 16)
    start = time.perf_counter()
    assert os.waitpid(fork(base / "one"), 0)[1] == 0
    duration = time.perf_counter() - start
    expected = torch.load(base / "one/last.pt", weights_only=True)
    metrics = [{**row, "seconds": 0, "eval_seconds": 0} for row in read_metrics(base / "one")]
    rng = random.Random(0)
    killed, runs = 0, 0
    while killed < kills:
        folder, times = base / str(runs), 0
        while not is_complete(folder):
            child = fork(folder)
            if times < min(10, kills - killed):  # then it is left to finish
                time.sleep(rng.uniform(0, duration / 3))
                os.kill(child, number)
            _, status = os.waitpid(child, 0)
            ended = os.WIFSIGNALED(status) if number == signal.SIGKILL else not is_complete(folder)
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a run failed"
            times += ended
        found = torch.load(folder / "last.pt", weights_only=True)
        rows = [{**row, "seconds": 0, "eval_seconds": 0} for row in read_metrics(folder)]
        different = differences(found, expected) + (["metrics"] if rows != metrics else [])
        if (folder / BEST).read_bytes() != (base / "one" / BEST).read_bytes():
            different.append(BEST)
        names = sorted(p.name for p in folder.iterdir() if p.name != "tensorboard")
        print(f"killed {times} times; different: {different}; files: {' '.join(names)}", flush=True)
        killed, runs = killed + times, runs + 1
