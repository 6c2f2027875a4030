"""The paper's comparisons, a command each: all settings, several seeds, tables and a picture.

    python examples/compare.py methods        # five methods, each with and without AWP: Table 2
    python examples/compare.py figure2        # steps, size and norm of the perturbation
    python examples/compare.py regularisers   # other regularisation: Figure 3 (d), Tables 4 and 5
    python examples/compare.py rwp            # random perturbation: Figure 3 (c)
    python examples/compare.py rwp --recipe at/cifar10-linf-preact18 --device cuda

Without a recipe it is the quickstart's task: 450 of scikit-learn's digits, a small network, a CPU.
--out gets STUDY.json, STUDY.md and STUDY.png. Runs are in STUDY.json as soon as they are over: the
same command goes on where it was broken off, with a recipe also within a run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from awp_optim.lab.config import Config
from awp_optim.lab.data import ImageData, load
from awp_optim.lab.recipes import QUICKSTART, QUICKSTART_IMAGES, RECIPES
from awp_optim.lab.reports.summary import accuracies, differences, markdown
from awp_optim.lab.run_folder import Row
from awp_optim.lab.self_training import pseudo_label_rest
from awp_optim.lab.studies import STUDIES
from awp_optim.lab.sweep import sweep
from awp_optim.lab.trainer import fit


@dataclass(frozen=True)
class Task:
    """What all runs of a study have in common."""

    recipe: str | None
    base: Config
    data_dir: Path
    limit: int | None
    device: str
    out: Path

    def load(self) -> tuple[ImageData, int]:
        """All images, and how many of the training images have labels."""
        data = load(RECIPES[self.recipe].dataset if self.recipe else "digits", self.data_dir)
        labeled = len(data.x_train) if self.recipe else QUICKSTART_IMAGES
        if self.limit:
            data = data.limit(None, min(self.limit, len(data.x_test)))
        return data.to(self.device), min(self.limit or labeled, labeled)

    def folder(self, config: Config) -> Path | None:
        """Where a run of hours has its checkpoints, named after what is not as in the recipe."""
        base = asdict(self.base)
        changes = [f"{k}={v}" for k, v in asdict(config).items() if v != base[k]]
        return self.out / "runs" / (",".join(changes) or "base") if self.recipe else None


def train(task: Task, config: Config, report: Callable[[int, int], None]) -> list[Row]:
    """One run, and before it what it needs: pseudo-labels for RST, pre-trained weights."""
    if task.device.startswith("cuda"):  # TF32, and convolutions by the fastest algorithm
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    data, labeled = task.load()
    unlabeled, init = None, None
    more: Row = {}
    stages = 2 if config.method in ("rst", "pretrain") else 1

    def on_step(done: int, steps: int, stage: int = 1) -> None:
        report((stage - 1) * steps + done, stages * steps)

    if config.method == "rst":
        made = pseudo_label_rest(config, data, labeled, on_step=on_step)
        assert made  # nothing stops it
        data, unlabeled, more["pseudo_labels_right"] = made
    elif config.method == "pretrain":
        rest, _ = data.split(labeled)
        y_train, y_test = rest.y_train % 2, rest.y_test % 2
        rest = replace(rest, y_train=y_train, y_test=y_test, classes=("even", "odd"))
        before = replace(task.base, seed=config.seed, eval_every=config.epochs)
        init = fit(before, rest, on_step=on_step)[0].state_dict()
    if unlabeled is None and labeled < len(data.x_train):
        data = data.limit(labeled)
    folder = task.folder(config)
    *rows, end = fit(
        config,
        data,
        folder,
        unlabeled=unlabeled,
        init=init,
        resume=folder is not None,
        on_step=partial(on_step, stage=stages),
    )[1]
    return [*rows, {**end, **more}]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", choices=STUDIES)
    add("--seeds", type=int, default=3, help="runs of each setting (%(default)s)")
    add("--epochs", type=int, help="of each run (40, or the recipe's)")
    recipes = [name for name, recipe in RECIPES.items() if not recipe.needs]
    add("--recipe", choices=recipes, metavar="NAME", help="see cifar10.py --list-recipes")
    add("--data-dir", type=Path, default=Path("data"), help="of a recipe's images (%(default)s)")
    add("--limit", type=int, help="use this many training and test images at the most")
    add("--device", default="cpu", help="(%(default)s)")
    add("--workers", type=int, help="runs at a time (one a core; on a GPU one)")
    add("--out", type=Path, default=Path("runs/compare"), help="folder (%(default)s)")
    args = parser.parse_args(argv)
    for name in ("seeds", "epochs", "limit", "workers"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")
    return args


def compare(args: argparse.Namespace) -> None:
    base = RECIPES[args.recipe].config if args.recipe else QUICKSTART
    base = replace(base, method="at", gamma=0.0, epochs=args.epochs or base.epochs)
    task = Task(args.recipe, base, args.data_dir, args.limit, args.device, args.out)
    data, labeled = task.load()
    if not args.recipe:  # as many steps, also with more images
        base = replace(base, epoch_images=labeled)
        task = replace(task, base=base)
    study = STUDIES[args.study](base, args.recipe is None)
    console = Console(width=None if sys.stdout.isatty() else 130)
    seeds = range(args.seeds)
    rows = sweep(
        {f"{k}, seed {s}": replace(c, seed=s) for s in seeds for k, c in study.configs.items()},
        partial(train, task),
        file=args.out / f"{args.study}.json",
        about={"dataset": data.name, "images": labeled, "test_images": len(data.x_test)},
        workers=args.workers or (1 if args.device.startswith("cuda") else None),
        console=console,
    )
    runs = {label: [rows[f"{label}, seed {seed}"] for seed in seeds] for label in study.configs}
    about = (
        f"{data.name}, {labeled} labelled training and {len(data.x_test)} test images, {base.arch},"
        f" {base.norm} {base.eps:.3g}, training attack PGD-{base.train_steps}, test attack"
        f" PGD-{base.test_steps}, epochs: {base.epochs}, seeds: {args.seeds}. {study.note}"
        ' "best" is the epoch with the highest robust test accuracy of those evaluated (every'
        f' {base.eval_every}), "gap" robust accuracy on training images less that on test images.'
    )
    if right := [of[-1]["pseudo_labels_right"] for of in runs.get("RST", ())]:
        about += f" Of the pseudo-labels {100 * sum(right) / len(right):.1f}% are right."
    text = [f"# {study.title}", about]
    for title, cells in (
        ("Accuracy in %, mean ± standard deviation over seeds", accuracies(runs)),
        ("Differences seed by seed, in points", differences(runs, study.compared_with)),
    ):
        table = Table(title=title)
        for i, name in enumerate(cells[0]):
            table.add_column(name, justify="right" if i else "left", no_wrap=not i)
        for row in cells[1:]:
            table.add_row(*row)
        console.print(table)
        text += [f"{title}:", markdown(cells)]
    console.print(about, highlight=False, soft_wrap=True)
    text.append(f"![{study.title}]({args.study}.png)")
    command = shlex.join(["python", "examples/compare.py", *sys.argv[1:]])
    text.append(f"torch {torch.__version__}, {args.device}; `{command}`")
    study.draw(runs, args.out / f"{args.study}.png", study.title)
    (args.out / f"{args.study}.md").write_text("\n\n".join([*text, ""]), encoding="utf-8")
    console.print(f"All in {args.out}/{args.study}.md, .json and .png.", highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        compare(args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
