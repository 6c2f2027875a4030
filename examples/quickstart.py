"""Adversarial training with and without AWP on real images, in a few minutes on a CPU.

scikit-learn's digits (1,797 images of 8x8 pixels inside its wheel, no download), a small PreAct
ResNet, PGD-10 at eps 0.2 in L_inf, the same seeds for both methods. It prints a table and draws
quickstart.png.

The setting is QUICKSTART in awp_optim/lab/recipes.py; gamma is the paper's for AT-AWP, Section 4.4.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from awp_optim import AWP, AdversarialStep
from awp_optim.lab.config import Config
from awp_optim.lab.data import load_digits
from awp_optim.lab.models import build_model
from awp_optim.lab.recipes import QUICKSTART, QUICKSTART_IMAGES
from awp_optim.lab.reports.plots import learning_curves
from awp_optim.lab.reports.summary import spread, summary
from awp_optim.lab.run_folder import Row
from awp_optim.lab.sweep import sweep
from awp_optim.lab.trainer import fit


def train(runs: Path | None, config: Config, report: Callable[[int, int], None]) -> list[Row]:
    """One run, in a process of its own."""
    name = f"{'at-awp' if config.gamma else 'at'}-seed{config.seed}"
    folder = None if runs is None else runs / name
    data = load_digits().limit(QUICKSTART_IMAGES)
    return fit(config, data, folder, resume=True, on_step=report)[1]


def figures_of(rows: list[Row]) -> dict[str, float]:
    """The figures of one run, in percent and seconds."""
    seconds = statistics.median(row["train_seconds"] for row in rows)
    return {**summary(rows), "seconds an epoch": seconds}


def overhead(gamma: float, steps: int = 40) -> float:
    """Time of a step with AWP over one without, taken in turn: the speed of a machine drifts."""
    torch.set_num_threads(1)
    data = load_digits().limit(QUICKSTART.batch_size)
    x, y = data.x_train / 255, data.y_train
    trainers, times = [], []
    for g in (0.0, gamma):
        model = build_model(
            QUICKSTART.arch, num_classes=data.num_classes, in_channels=data.in_channels
        ).to(memory_format=torch.channels_last)
        optimizer = AWP(model.parameters(), torch.optim.SGD, gamma=g, lr=1e-3, momentum=0.9)
        attack = QUICKSTART.training_attack
        trainers.append(AdversarialStep(model, optimizer, attack))
    for _ in range(steps):
        for step in trainers:
            start = time.perf_counter()
            step(x, y)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1::2]) / statistics.median(times[::2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default 3)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each run (default 40)")
    parser.add_argument("--gamma", type=float, default=1e-2, help="AWP's gamma (default 0.01)")
    parser.add_argument("--out", default="quickstart.png", help="the picture")
    parser.add_argument("--runs", type=Path, help="keep run folders there, to draw landscapes of")
    args = parser.parse_args()
    console = Console()
    console.print(
        f"Adversarial training on {QUICKSTART_IMAGES} digits, {args.epochs} epochs, PGD-"
        f"{QUICKSTART.train_steps} at eps {QUICKSTART.eps}; with AWP (gamma {args.gamma:g}) and "
        f"without, {args.seeds} seeds each.",
        highlight=False,
        soft_wrap=True,
    )
    start = time.perf_counter()
    labels = {"AT": 0.0, "AT-AWP": args.gamma}
    seeds = range(args.seeds)
    found = sweep(
        {
            f"{label:6} seed {seed}": replace(
                QUICKSTART,
                epochs=args.epochs,
                gamma=gamma,
                seed=seed,
                save_every=QUICKSTART.eval_every if args.runs else 0,
            )
            for seed in seeds
            for label, gamma in labels.items()
        },
        partial(train, args.runs),
        console=console,
    )
    runs = {label: [found[f"{label:6} seed {seed}"] for seed in seeds] for label in labels}
    figures = {label: [figures_of(rows) for rows in of_label] for label, of_label in runs.items()}

    table = Table(title="Accuracy in %, mean ± standard deviation over seeds")
    table.add_column("")
    for label in figures:
        table.add_column(label, justify="right")
    table.add_column("difference, by seed", justify="right")
    for name in figures["AT"][0]:
        digits = 2 if name.startswith("seconds") else 1
        columns = [[run[name] for run in figures[label]] for label in figures]
        difference = [awp - at for at, awp in zip(*columns, strict=True)]
        cells = [spread(column, digits) for column in columns]
        table.add_row(name, *cells, spread(difference, digits))
    table.add_row("time of a step, in turn", "x 1", f"x {overhead(args.gamma):.2f}", "")
    console.print(table)
    console.print(
        'Test attack PGD-20; "best" is the epoch with the highest robust test accuracy of those '
        f'evaluated (every {QUICKSTART.eval_every}), "gap" is robust accuracy on training images '
        "less that on test images. Seconds "
        "an epoch are of runs side by side and drift with the machine; the time of a step is not.",
        highlight=False,
        soft_wrap=True,
    )
    learning_curves(runs, args.out, f"Digits, PGD-20 at eps {QUICKSTART.eps}")
    console.print(
        f"Learning curves in {args.out}; {time.perf_counter() - start:.0f} s in all.",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
