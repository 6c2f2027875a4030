"""Which accuracy does the paper's training run reach, and how long does it take?

    python -m benchmarks.gpu.reproduce --data-dir data --run-dir runs/at-awp
    python -m benchmarks.gpu.reproduce --gamma 0 --data-dir data --run-dir runs/at

CIFAR-10, PreAct ResNet-18, L_inf 8/255, PGD-10 in training, PGD-20 in testing, 200 epochs as in
Section 4.4 of the paper. The run stops after ``--minutes`` and the next command resumes it. Needs
numpy.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import RESULTS
from benchmarks.gpu.attacks import optional_module
from benchmarks.gpu.question import Details, Options, Record, answer

# Table 3 of Wu, Xia & Wang (2020): best and last robust accuracy under PGD-20 in %, five runs.
PAPER = {"at-awp": {"best": 55.39, "last": 54.73}, "at": {"best": 52.79, "last": 44.44}}
# The training logs published with the paper's code, one run for each method.
PUBLISHED = RESULTS / "published.csv"
QUICK: dict[str, Any] = {
    "arch": "preact_resnet_small",
    "epochs": 2,
    "batch_size": 16,
    "train_steps": 2,
    "test_steps": 2,
    "augment": False,
    "train_eval": 16,
}


def cases(options: Options) -> dict[str, partial[Details]]:
    return {"at-awp" if options.extra.gamma else "at": partial(train, options)}


def train(options: Options, record: Record) -> Details:
    """Train until the end or until the time is over."""
    if optional_module("numpy") is None:
        record.note("numpy is not installed: left out")
        return {}
    from awp_optim.lab.config import Config
    from awp_optim.lab.trainer import fit

    deadline = time.monotonic() + 60 * options.minutes
    config = Config(
        gamma=options.extra.gamma, precision="bfloat16", **(QUICK if options.quick else {})
    )
    folder = options.out / "run" if options.quick else options.extra.run_dir
    rows: list[dict[str, float]] = []
    if (last := folder / "last.pt").exists():
        rows += torch.load(last, map_location="cpu", weights_only=True)["rows"]

    def on_epoch(row: dict[str, float]) -> None:
        rows.append(row)
        record.update(epochs_done=len(rows), rows=rows)
        print(f"epoch {len(rows)}/{config.epochs}, {row['seconds']:.1f} s", flush=True)

    if len(rows) < config.epochs:
        fit(
            config,
            load_data(options),
            folder,
            resume=True,
            on_epoch=on_epoch,
            stop=lambda: time.monotonic() >= deadline,
        )
    summarize(record, rows, config)
    return {"config": vars(config), "epochs_done": len(rows), "rows": rows}


def summarize(record: Record, rows: list[dict[str, float]], config: Any) -> None:
    """Add the figures of a run so far. Nothing is extrapolated."""
    record.figure("epochs done", len(rows))
    if not rows:
        return
    method = "at-awp" if config.gamma else "at"
    training = [row["seconds"] for row in rows]
    testing = [row["eval_seconds"] for row in rows if "eval_seconds" in row]
    robust = {int(row["epoch"]) + 1: 100 * row["test_robust_acc"] for row in rows}
    record.figure("seconds an epoch, training", statistics.median(training))
    record.figure("seconds an epoch, testing", statistics.median(testing))
    compare_with_published(record, robust, published_curve(method))
    if len(rows) == config.epochs:
        paper = PAPER[method] if config.gamma in (0, 1e-2) else {}
        record.figure("best, %", max(robust.values()), at_least=paper.get("best"))
        record.figure("last, %", robust[len(rows)], at_least=paper.get("last"))
        record.figure("minutes in all", (sum(training) + sum(testing)) / 60, at_most=20)


def compare_with_published(
    record: Record, robust: dict[int, float], published: dict[int, float]
) -> None:
    """Add robust accuracies after the latest epoch that the published log has, too."""
    epoch = max(robust.keys() & published.keys(), default=None)
    if epoch is not None:
        record.figure(f"robust accuracy after {epoch} epochs, %", robust[epoch])
        record.figure("published log at that epoch, %", published[epoch])


def published_curve(method: str) -> dict[int, float]:
    """Robust test accuracy in % by epochs done."""
    with PUBLISHED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == method]
    return {int(row["epochs"]): 100 * float(row["test_robust_acc"]) for row in rows}


def load_data(options: Options) -> Any:
    """CIFAR-10 from a folder, on the device; in quick mode a few random images."""
    from awp_optim.lab.data import ImageData, load_cifar10

    if not options.quick:
        return load_cifar10(options.extra.data_dir, download=False).to(options.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (48, 3, 8, 8), generator=generator, dtype=torch.uint8)
    y = torch.arange(48) % 10
    names = tuple("0123456789")
    return ImageData(x, y, x[:16], y[:16], names, "random").to(options.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="CIFAR-10 (default: %(default)s)")
    add("--run-dir", type=Path, default=Path("runs/at-awp"), help="(default: %(default)s)")
    add("--gamma", type=float, default=1e-2, help="0 is plain AT (default: %(default)s)")


def main(argv: list[str] | None = None) -> int:
    return answer("reproduce", __doc__, cases, argv, add_arguments)


if __name__ == "__main__":
    sys.exit(main())
