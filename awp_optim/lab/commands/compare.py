"""``awp compare``: the paper's comparisons, several seeds of each setting."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro

from awp_optim._utils.io import write_text
from awp_optim.lab.commands.options import (
    Device,
    Positive,
    check_writable,
    one_of,
    parse,
    print_table,
    terminal,
)
from awp_optim.lab.commands.train import fast_kernels
from awp_optim.lab.config import Config
from awp_optim.lab.data import ImageData, load
from awp_optim.lab.job import Job
from awp_optim.lab.recipes import QUICKSTART, QUICKSTART_IMAGES, RECIPES
from awp_optim.lab.reports.summary import Runs, accuracies, differences, markdown
from awp_optim.lab.run_folder import Row
from awp_optim.lab.self_training import pseudo_label_rest
from awp_optim.lab.studies import RECIPE_OF, STUDIES, Study
from awp_optim.lab.sweep import sweep
from awp_optim.lab.trainer import fit

__all__ = ["Options", "Task", "compare", "main", "train"]

HELP = """The paper's comparisons: many settings, several seeds of each, tables and a picture.

    methods        five methods, each with and without AWP: Table 2
    figure2        steps, size and norm of the perturbation: Figure 2
    regularizers   other regularization: Figure 3 (d), Tables 4 and 5
    rwp            random perturbation: Figure 3 (c)
    cifar10-small  AT, TRADES and MART with and without AWP, and RWP, on a part of CIFAR-10

Without a recipe the task is the quickstart's, 450 of scikit-learn's digits, a small network, a CPU;
that of cifar10-small is the recipe at/cifar10-small. With a recipe, methods compares AT, TRADES and
MART alone.
--out gets STUDY.json, STUDY.md and STUDY.png. A run is in STUDY.json as soon as it has finished:
the same command continues where it was interrupted, with a recipe also within a run.
"""


@dataclass(frozen=True)
class Options:
    """The options of ``awp compare``."""

    study: Annotated[str, tyro.conf.Positional, one_of(STUDIES)]
    """The comparison."""
    seeds: Positive = 3
    """Runs of each setting."""
    epochs: Positive | None = None
    """Epochs of each run; else those of the task."""
    recipe: (
        Annotated[str, one_of([k for k, recipe in RECIPES.items() if not recipe.needs], "NAME")]
        | None
    ) = None
    """The setting to start from; awp recipes lists them."""
    data_dir: Path = Path("data")
    """Folder of a recipe's images."""
    limit: Positive | None = None
    """Use at most this many training and test images."""
    device: Device = "cpu"
    """Device to train on."""
    workers: Positive | None = None
    """Runs at a time; else one for each core, or a single one on a GPU."""
    out: Path = Path("runs/compare")
    """Folder of the results."""

    @property
    def task(self) -> str | None:
        """The recipe that the study starts from; None for the quickstart's task."""
        return self.recipe or RECIPE_OF.get(self.study)


@dataclass(frozen=True)
class Task:
    """What all runs of a study share."""

    recipe: str | None
    base: Config
    data_dir: Path
    limit: int | None
    device: str
    out: Path

    def load(self) -> tuple[ImageData, int]:
        """All images, and how many of the training images have labels."""
        recipe = RECIPES[self.recipe] if self.recipe else None
        data = load(recipe.dataset if recipe else "digits", self.data_dir)
        if recipe and recipe.train_images:
            data = data.balanced(recipe.train_images)
        labeled = len(data.x_train) if recipe else QUICKSTART_IMAGES
        if self.limit:
            data = data.limit(None, min(self.limit, len(data.x_test)))
        return data.to(self.device), min(self.limit or labeled, labeled)

    def folder(self, config: Config) -> Path | None:
        """With a recipe, the run folder, named after what differs from the recipe."""
        base = asdict(self.base)
        changes = [f"{k}={v}" for k, v in asdict(config).items() if v != base[k]]
        return self.out / "runs" / (",".join(changes) or "base") if self.recipe else None


def train(task: Task, config: Config, report: Callable[[int, int], None]) -> list[Row]:
    """Train one run, after what it needs: pseudo-labels for RST, or pre-trained weights."""
    if task.device.startswith("cuda"):
        fast_kernels()
    data, labeled = task.load()
    unlabeled, init = None, None
    more: Row = {}
    stages = 2 if config.method in ("rst", "pretrain") else 1

    def on_step(done: int, steps: int, stage: int = 1) -> None:
        report((stage - 1) * steps + done, stages * steps)

    if config.method == "rst":
        made = pseudo_label_rest(config, data, labeled, on_step=on_step)
        assert made is not None  # nothing stops it
        data, unlabeled, more["pseudo_labels_right"] = made
    elif config.method == "pretrain":
        before = replace(task.base, seed=config.seed, eval_every=config.epochs)
        init = fit(before, _parity(data, labeled), on_step=on_step)[0].state_dict()
    if unlabeled is None and labeled < len(data.x_train):
        data = data.limit(labeled)
    folder = task.folder(config)
    _, (*rows, end) = fit(
        config,
        data,
        folder,
        unlabeled=unlabeled,
        init=init,
        resume=folder is not None,
        on_step=partial(on_step, stage=stages),
    )
    return [*rows, {**end, **more}]


def _parity(data: ImageData, labeled: int) -> ImageData:
    """The images that are not labeled, as odd or even: the task of pre-training."""
    rest, _ = data.split(labeled)
    y_train, y_test = rest.y_train % 2, rest.y_test % 2
    return replace(rest, y_train=y_train, y_test=y_test, classes=("even", "odd"))


def main(arguments: Sequence[str], ranks: Job) -> None:
    """Run the comparison that the command line names."""
    options = parse(Options, arguments, "awp compare", HELP)
    compare(options, command=shlex.join(["awp", "compare", *arguments]))


def compare(options: Options, *, executor: Executor | None = None, command: str = "") -> None:
    """Train all runs of a study, and write its tables and its picture.

    Args:
        options: which study, and how.
        executor: trains the runs, as for :func:`~awp_optim.lab.sweep.sweep`; on a cluster,
            ``dask.distributed.Client(address).get_executor()``.
        command: how to repeat it, for the file of tables.
    """
    check_writable(options.out / f"{options.study}.json")
    task, data, labeled = _task(options)
    study = STUDIES[options.study](task.base, digits=options.task is None)
    seeds = range(options.seeds)
    rows = sweep(
        {f"{k}, seed {s}": replace(c, seed=s) for k, c in study.configs.items() for s in seeds},
        partial(train, task),
        file=options.out / f"{options.study}.json",
        about={"dataset": data.name, "images": labeled, "test_images": len(data.x_test)},
        workers=options.workers or (1 if options.device.startswith("cuda") else None),
        executor=executor,
        console=terminal(),
    )
    runs = {label: [rows[f"{label}, seed {seed}"] for seed in seeds] for label in study.configs}
    about = _about(task.base, study, runs, data, labeled)
    machine = f"torch {torch.__version__}, {options.device}" + (f"; `{command}`" if command else "")
    _write(options, study, runs, about, machine)


def _task(options: Options) -> tuple[Task, ImageData, int]:
    """What the runs share, their images, and how many of these have labels."""
    base = RECIPES[options.task].config if options.task else QUICKSTART
    # The recipe's beta would be that of its own method.
    beta, epochs = Config().beta, options.epochs or base.epochs
    base = replace(base, method="at", gamma=0.0, beta=beta, epochs=epochs)
    task = Task(options.task, base, options.data_dir, options.limit, options.device, options.out)
    data, labeled = task.load()
    if not options.task:  # RST trains on more images, but in as many steps
        task = replace(task, base=replace(base, epoch_images=labeled))
    return task, data, labeled


def _about(
    base: Config, study: Study, runs: Mapping[str, Runs], data: ImageData, labeled: int
) -> str:
    """What a reader must know about the figures."""
    seeds = len(next(iter(runs.values())))
    tested = min(base.test_eval or len(data.x_test), len(data.x_test))
    about = (
        f"{data.name}, {labeled} labeled training and {tested} test images, {base.arch}, "
        f"{base.norm} {base.eps:.3g}, training attack PGD-{base.train_steps}, test attack "
        f"PGD-{base.test_steps}, epochs: {base.epochs}, seeds: {seeds}. {study.note} "
        f'"best" is the epoch with the highest robust test accuracy of those evaluated (every '
        f'{base.eval_every}), "gap" robust accuracy on training images minus that on test images.'
    )
    if right := [rows[-1]["pseudo_labels_right"] for rows in runs.get("RST", ())]:
        about += f" Of the pseudo-labels {100 * sum(right) / len(right):.1f}% are right."
    return about


def _write(
    options: Options, study: Study, runs: Mapping[str, Runs], about: str, machine: str
) -> None:
    """The tables, in a file and on the terminal, and the picture."""
    console = terminal()
    text = [f"# {study.title}", about]
    for title, cells in (
        ("Accuracy in %, mean ± standard deviation over seeds", accuracies(runs)),
        ("Differences seed by seed, in points", differences(runs, study.compared_with)),
    ):
        print_table(console, cells, title)
        text += [f"{title}:", markdown(cells)]
    console.out(about)
    text += [f"![{study.title}]({options.study}.png)", machine, ""]
    study.draw(runs, options.out / f"{options.study}.png", study.title)
    write_text(options.out / f"{options.study}.md", "\n\n".join(text))
    console.out(f"All in {options.out}/{options.study}.md, .json and .png.")
