"""Adversarial training with and without AWP on real images, in a few minutes on a CPU.

    python examples/quickstart.py
    python examples/quickstart.py --seeds 1 --epochs 10      # to try it
    python examples/quickstart.py --runs runs/quickstart     # keep the runs, for awp landscape

scikit-learn's digits (1,797 images of 8x8 pixels inside its wheel, no download), a small PreAct
ResNet, PGD-10 at eps 0.2 in L_inf, the same seeds for both methods. It prints a table and draws
quickstart.png.

The setting is QUICKSTART in awp_optim/lab/recipes/small.py; gamma is that of AT-AWP in Section 4.4
of the paper.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.backend_bases import FigureCanvasBase
from rich.table import Table

from awp_optim import AWP, AdversarialStep
from awp_optim.lab.commands.ending import run
from awp_optim.lab.commands.options import Number, Positive, check_writable, parse, terminal
from awp_optim.lab.config import Config
from awp_optim.lab.data import load_digits
from awp_optim.lab.job import Job
from awp_optim.lab.models import build_model
from awp_optim.lab.recipes import QUICKSTART, QUICKSTART_IMAGES
from awp_optim.lab.reports.plots import learning_curves
from awp_optim.lab.reports.summary import Runs, spread, summary
from awp_optim.lab.run_folder import Row
from awp_optim.lab.sweep import sweep
from awp_optim.lab.trainer import fit


@dataclass(frozen=True)
class Options:
    """The command line."""

    seeds: Positive = 3
    """Runs of each method."""
    epochs: Positive = 40
    """Epochs of each run."""
    gamma: Number = 1e-2
    """Size of AWP's perturbation."""
    out: Path = Path("quickstart.png")
    """The picture."""
    runs: Path | None = None
    """Keep run folders there, to draw landscapes of."""


def main(ranks: Job) -> None:
    """Train with and without AWP, print a table, draw the learning curves."""
    options = parse(Options, sys.argv[1:], "python examples/quickstart.py", str(__doc__))
    if (kind := options.out.suffix[1:]) not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"{options.out}: matplotlib writes no files of type {kind!r}")
    configs = settings(options)
    check_writable(options.out)
    start = time.perf_counter()
    console = terminal()
    console.out(
        f"Adversarial training on {QUICKSTART_IMAGES} digits, {options.epochs} epochs, PGD-"
        f"{QUICKSTART.train_steps} at eps {QUICKSTART.eps}; with AWP (gamma {options.gamma:g}) and "
        f"without, {options.seeds} seeds each."
    )
    found = sweep(configs, partial(train, options.runs), console=console)
    runs = {
        label: [rows for name, rows in found.items() if name.split()[0] == label]
        for label in ("AT", "AT-AWP")
    }
    console.print(table(runs, options.gamma))
    console.out(
        'Test attack PGD-20; "best" is the epoch with the highest robust test accuracy of those '
        f'evaluated (every {QUICKSTART.eval_every}), "gap" is robust accuracy on training images '
        "minus that on test images. Seconds an epoch are of runs side by side and drift with the "
        "machine; the time of a step does not."
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    learning_curves(runs, options.out, f"Digits, PGD-20 at eps {QUICKSTART.eps}")
    console.out(f"Learning curves in {options.out}; {time.perf_counter() - start:.0f} s in all.")


def settings(options: Options) -> dict[str, Config]:
    """The runs by name, the same seeds with and without AWP."""
    save_every = QUICKSTART.eval_every if options.runs else 0
    base = replace(QUICKSTART, epochs=options.epochs, save_every=save_every)
    return {
        f"{label:6} seed {seed}": replace(base, gamma=gamma, seed=seed)
        for seed in range(options.seeds)
        for label, gamma in (("AT", 0.0), ("AT-AWP", options.gamma))
    }


def train(runs: Path | None, config: Config, report: Callable[[int, int], None]) -> list[Row]:
    """One run, in a process of its own."""
    name = f"{'at-awp' if config.gamma else 'at'}-seed{config.seed}"
    folder = None if runs is None else runs / name
    data = load_digits().limit(QUICKSTART_IMAGES)
    return fit(config, data, folder, resume=True, on_step=report)[1]


def table(runs: dict[str, Runs], gamma: float) -> Table:
    """Accuracies and times of both methods, and their differences seed by seed."""
    result = Table(title="Accuracy in %, mean ± standard deviation over seeds")
    for column in ("", *runs, "difference, by seed"):
        result.add_column(column, justify="right" if column else "left")
    at, awp = ([figures(rows) for rows in of_method] for of_method in runs.values())
    for name in at[0]:
        digits = 2 if name.startswith("seconds") else 1
        pairs = [(a[name], b[name]) for a, b in zip(at, awp, strict=True)]
        columns = [*zip(*pairs, strict=True), [b - a for a, b in pairs]]
        result.add_row(name, *(spread(column, digits) for column in columns))
    result.add_row("time of a step, in turn", "x 1", f"x {overhead(gamma):.2f}", "")
    return result


def figures(rows: list[Row]) -> dict[str, float]:
    """The figures of one run, in percent and seconds."""
    seconds = statistics.median(row["seconds"] for row in rows)
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
        trainers.append(AdversarialStep(model, optimizer, QUICKSTART.training_attack))
    for _ in range(steps):
        for step in trainers:
            start = time.perf_counter()
            step(x, y)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1::2]) / statistics.median(times[::2])


if __name__ == "__main__":
    run(main)
