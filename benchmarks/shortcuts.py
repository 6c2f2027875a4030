"""What the cheaper ways to v give up: accuracy on the quickstart's task, and the angle to exact v.

    python -m benchmarks.shortcuts --seeds 5

Every mode trains on scikit-learn's digits with the quickstart's settings and the same seeds. One
more run, trained with exact v, asks at every step what v the shortcuts would have had there. It
writes ``shortcuts.json`` as it goes, prints two tables and draws ``shortcuts.png``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from awp_optim import AWP, frozen_batch_norm
from awp_optim.lab.data import load_digits
from awp_optim.lab.models import build_model
from awp_optim.lab.recipes import QUICKSTART, QUICKSTART_IMAGES
from awp_optim.lab.reports.summary import spread, summary
from awp_optim.lab.trainer import fit
from awp_optim.objectives import at
from benchmarks.harness import RESULTS, environment, write_json

SETTING = replace(QUICKSTART, gamma=1e-2)  # as the quickstart runs without arguments

MODES: dict[str, dict[str, Any]] = {
    "AT": {"gamma": 0.0},
    "exact": {},
    "attack": {"ascent": "attack"},
}

Vector = dict[Tensor, Tensor]


def train(mode: str, seed: int, epochs: int) -> dict[str, float]:
    """One run's figures, in percent."""
    torch.set_num_threads(1)
    config = replace(SETTING, seed=seed, epochs=epochs, **MODES[mode])
    rows = fit(config, load_digits().limit(QUICKSTART_IMAGES))[1]
    return summary(rows)


def cosines(seed: int, epochs: int) -> list[dict[str, float]]:
    """For each epoch of a run with exact v, the mean cosine of each shortcut's v with it.

    The shortcuts are asked at the same weights and the same adversarial examples.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = load_digits().limit(QUICKSTART_IMAGES)
    model = build_model(SETTING.arch, num_classes=data.num_classes, in_channels=data.in_channels)
    opt = AWP(
        model.parameters(),
        torch.optim.SGD,
        gamma=SETTING.gamma,
        lr=SETTING.lr,
        momentum=SETTING.momentum,
        weight_decay=SETTING.weight_decay,
    )
    attack = SETTING.training_attack
    weights = [p for p in model.parameters() if p.ndim >= 2]
    batches = len(data.x_train) // SETTING.batch_size
    scheduler = torch.optim.lr_scheduler.MultiStepLR(
        opt, [epochs * batches // 2, epochs * batches * 3 // 4]
    )
    past: list[Vector] = []  # exact v of the steps before, the latest last
    by_epoch = []
    for _ in range(epochs):
        found: dict[str, list[float]] = {}
        order = torch.randperm(len(data.x_train))
        for index in torch.split(order, SETTING.batch_size)[:batches]:
            x, y = data.x_train[index] / 255, data.y_train[index]
            x_adv, gradients = attack.with_weight_gradients(model, x, y, weights)
            shortcuts = {
                "attack": _v(opt, dict(zip(weights, gradients, strict=True))),
                "momentum": _v(opt, opt.momenta()),
            }
            shortcuts |= {f"kept {k}": past[-k] for k in (1, 2, 3) if len(past) >= k}
            opt.zero_grad()
            with frozen_batch_norm(model):
                at(model(x_adv), y).backward()  # type: ignore[no-untyped-call]
            opt.first_step(zero_grad=True)
            exact = opt.perturbation()
            for name, v in shortcuts.items():
                if v:  # there is no momentum before the first update
                    found.setdefault(name, []).append(_cosine(v, exact))
            past = [*past, exact][-3:]
            at(model(x_adv), y).backward()  # type: ignore[no-untyped-call]
            opt.second_step(zero_grad=True)
            scheduler.step()
        by_epoch.append({name: statistics.mean(values) for name, values in found.items()})
    return by_epoch


def _v(opt: AWP, along: Any) -> Vector:
    opt.first_step(along=along)
    v = opt.perturbation()
    opt.restore()
    return v


def _cosine(a: Vector, b: Vector) -> float:
    """Of all layers together."""
    dot, aa, bb = (sum((s[p] * t[p]).sum().item() for p in a) for s, t in ((a, b), (a, a), (b, b)))
    return float(dot / (aa * bb) ** 0.5)


def accuracy_table(runs: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Mean and standard deviation over seeds, and the difference to exact v, seed by seed."""
    table = Table(title="Accuracy in %, mean ± standard deviation over seeds")
    names = list(next(iter(runs["exact"].values())))
    for column in ("", "seeds", *names, "robust, last, less exact", "gap less exact"):
        table.add_column(column, justify="left" if not column else "right")
    for mode, by_seed in runs.items():
        cells = [spread([run[name] for run in by_seed.values()]) for name in names]
        for name in ("robust, last", "gap, last"):
            shared = by_seed.keys() & runs["exact"].keys()
            cells.append(spread([by_seed[s][name] - runs["exact"][s][name] for s in shared]))
        table.add_row(mode, str(len(by_seed)), *cells)
    return table


def cosine_table(by_seed: dict[str, list[dict[str, float]]]) -> Table:
    """The mean cosine in the first, second, third and last quarter of training."""
    table = Table(title="Cosine with exact v, mean over steps, by quarter of training")
    for column in ("", "1st", "2nd", "3rd", "4th"):
        table.add_column(column, justify="left" if not column else "right")
    for name in next(iter(by_seed.values()))[0]:
        cells = []
        for quarter in range(4):
            values = [
                epoch[name]
                for epochs in by_seed.values()
                for i, epoch in enumerate(epochs)
                if i * 4 // len(epochs) == quarter and name in epoch
            ]
            cells.append(f"{statistics.mean(values):.2f}" if values else "")
        table.add_row(name, *cells)
    return table


def draw(by_seed: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Cosines along training, one line a shortcut."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    styles = ["-", "--", "-.", ":", (0, (1, 1))]
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"]  # Okabe and Ito's
    runs = list(by_seed.values())
    for name, style, color in zip(runs[0][0], styles, colors, strict=False):
        means = [statistics.mean(run[i][name] for run in runs) for i in range(len(runs[0]))]
        axes.plot(range(1, len(means) + 1), means, linestyle=style, color=color, label=name)
    axes.set(xlabel="epoch", ylabel="cosine with exact v", ylim=(-0.1, 1))
    axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axes.legend(ncols=3, frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of each mode (default 5)")
    parser.add_argument("--epochs", type=int, default=SETTING.epochs, help="default 40")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, metavar="MODE")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu", help="folder of the results")
    args = parser.parse_args()
    modes = list(dict.fromkeys(["exact", *args.modes]))
    result: dict[str, Any] = {
        "environment": environment(),
        "setting": {
            **vars(SETTING),
            "epochs": args.epochs,
            "train_images": QUICKSTART_IMAGES,
        },
        "runs": {mode: {} for mode in modes},
        "cosines": {},
    }
    console = Console()
    context = multiprocessing.get_context("spawn")  # threads do not survive a fork
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        futures: dict[Any, tuple[str, str]] = {}
        for seed in range(args.seeds):
            for mode in modes:
                futures[pool.submit(train, mode, seed, args.epochs)] = mode, str(seed)
        for seed in range(min(args.seeds, 3)):
            futures[pool.submit(cosines, seed, args.epochs)] = "cosines", str(seed)
        for done, future in enumerate(as_completed(futures), 1):
            kind, key = futures[future]
            (result["cosines"] if kind == "cosines" else result["runs"][kind])[key] = (
                future.result()
            )
            write_json(args.out / "shortcuts.json", result)
            console.print(f"{done}/{len(futures)} {kind}, seed {key}", highlight=False)
    draw(result["cosines"], args.out / "shortcuts.png")
    console.print(accuracy_table(result["runs"]), cosine_table(result["cosines"]))


if __name__ == "__main__":
    main()
