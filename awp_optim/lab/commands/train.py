"""``awp train``: adversarial training with AWP, as in Section 4.4 of the paper."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from awp_optim.lab.building import check_arch
from awp_optim.lab.commands.options import (
    DataOptions,
    Dataset,
    Device,
    Flag,
    Number,
    Positive,
    check_writable,
    default_device,
    one_of,
    parse,
    peek,
    terminal,
)
from awp_optim.lab.config import THREATS, Config, Method
from awp_optim.lab.data import ImageData
from awp_optim.lab.interrupt import StopRequest, graceful_stop
from awp_optim.lab.job import Job
from awp_optim.lab.precision import resolve_precision
from awp_optim.lab.progress import StepBar, step_bars
from awp_optim.lab.pseudo import PseudoLabeled, load_pseudo_labeled
from awp_optim.lab.recipes import RECIPES, defaults
from awp_optim.lab.reports.plots import learning_curves
from awp_optim.lab.run_folder import Row, best, refuse_run, reported
from awp_optim.lab.self_training import pseudo_label_rest
from awp_optim.lab.trainer import check_inputs, fit, is_over
from awp_optim.lab.weights import load_weights

__all__ = ["Options", "main", "train"]

HELP = """Adversarial training with or without AWP (--gamma 0).

A recipe, a data set, a method and a threat decide the defaults of the settings; every setting can
be changed by its option. The run folder gets config.json, metrics.csv, best.pt, best.safetensors,
last.pt, curves.png and, where TensorBoard is installed, its logs. Ctrl-C or SIGTERM finishes the
step and saves; --resume continues the run. Numbers can be fractions: --eps 8/255.

Under torchrun, the same command and the same results, within rounding; the batch size is that of
all processes together.
"""

Recipe = Annotated[str, one_of(RECIPES, "NAME")]
Threat = Annotated[str, one_of(sorted(THREATS))]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``awp train``."""

    out: Path
    """The run folder."""
    resume: Flag = False
    """Continue the run in --out."""
    recipe: Recipe | None = None
    """A named run, such as one of the paper; awp recipes lists them."""
    threat: Threat | None = None
    """Norm, eps and step size of the paper's threat model."""
    unlabeled: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=("--extra-data",))] = ()
    """More images, with labels of a classifier or a generator: .npz files, read as needed."""
    train_images: Positive | None = None
    """Train on this many images, as many of each class and always the same ones."""
    labeled: Positive | None = None
    """Keep the labels of this many training images, and let a classifier label the others."""
    init: Path | None = None
    """Checkpoint to start from, with its normalization if it holds one."""
    max_minutes: Number = math.inf
    """Stop after this many minutes; --resume continues the run."""
    device: Device = field(default_factory=default_device)
    """Device to train on."""
    data: tyro.conf.OmitArgPrefixes[DataOptions] = field(default_factory=DataOptions)
    """The images to use."""
    settings: tyro.conf.OmitArgPrefixes[Config]
    """The settings of the run, as config.json keeps them."""

    def __post_init__(self) -> None:
        if self.unlabeled and self.labeled is not None:
            raise ValueError("--unlabeled and --labeled: give one of the two")
        if self.train_images is not None and self.data.limit is not None:
            raise ValueError("--train-images and --limit: give one of the two")
        if not self.max_minutes >= 0:
            raise ValueError(f"--max-minutes must be at least 0, not {self.max_minutes:g}")

    def load_data(self) -> ImageData:
        """The images to train and test on."""
        data = self.data.load()
        return data if self.train_images is None else data.balanced(self.train_images)


def starting_point(
    recipe: Recipe | None = None,
    dataset: Dataset | None = None,
    threat: Threat | None = None,
    method: Method = "at",
    limit: Positive | None = None,
) -> Options:
    """The options before any other changes them."""
    images = None
    if recipe is None:
        dataset = dataset or "cifar10"
        config = defaults(dataset, threat or "linf", method)
        if dataset != "digits":  # 8x8 pixels gain nothing from bfloat16
            config = replace(config, precision="auto")
    else:
        images = None if limit else RECIPES[recipe].train_images
        config = RECIPES[recipe].config
        dataset = dataset or RECIPES[recipe].dataset
        config = config if threat is None else replace(config, **THREATS[threat])
    config = replace(config, augment=dataset != "digits")
    data = DataOptions(dataset)
    return Options(out=tyro.MISSING, train_images=images, data=data, settings=config)


def main(arguments: Sequence[str], ranks: Job) -> None:
    """Train the run that the command line describes."""
    # These options decide the defaults of the others, so they are read first.
    default = peek(starting_point, arguments, "awp train")
    options = parse(Options, arguments, "awp train", HELP, default=default)
    given = {word.partition("=")[0].replace("_", "-") for word in arguments}
    train(options, given, ranks)


def train(options: Options, given: set[str], ranks: Job) -> None:
    """Train, print an epoch a line, and draw the learning curves.

    Args:
        options: the run.
        given: the options on the command line, such as "--train-eval".
        ranks: the processes that share the run.

    Raises:
        SystemExit: a signal has stopped it.
    """
    deadline = time.monotonic() + 60 * options.max_minutes
    fast_kernels()
    if not options.resume:
        ranks.first(lambda: refuse_run(options.out))
    ranks.first(lambda: check_writable(options.out / "config.json"))
    if not options.unlabeled and given & {"--unlabeled", "--extra-data"}:
        raise ValueError("--unlabeled: name one file or more")
    labels = bool(options.unlabeled) or options.labeled is not None
    check_inputs(options.settings, unlabeled=labels, init=options.init is not None)
    check_arch(options.settings)
    device = ranks.device(options.device)
    init = None if options.init is None else load_weights(options.init)
    unlabeled = None
    if options.unlabeled:  # in turns, since a compressed file is unpacked
        unlabeled = ranks.in_turns(lambda: load_pseudo_labeled(*options.unlabeled))
    data = ranks.in_turns(options.load_data).to(device)
    config = _fit_to_data(options, given, data)
    console = terminal()
    continued = options.out if options.resume else None
    console.out(_how(resolve_precision(config, data.x_train.device, continued), device))
    with step_bars(console) as progress, _signals(ranks) as request:

        def stop() -> bool:
            return request() or time.monotonic() >= deadline

        run = _Run(options, config, init, console, progress, stop)
        rows = run.train(data, unlabeled)
    status = max(ranks.gather(request.exit_status))
    if ranks.rank == 0:
        _summarize(options, config, data.name, rows, console)
    if status and not is_over(config, rows):
        raise SystemExit(status)


def _how(config: Config, device: str) -> str:
    """The choices that decide how fast a run is."""
    compiled = ", compiled" if config.compile else ""
    return f"{config.arch} in {config.precision}{compiled}, on {device}"


def fast_kernels() -> None:
    """Let a GPU use TF32, and the fastest algorithm for each convolution."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True


def _fit_to_data(options: Options, given: set[str], data: ImageData) -> Config:
    """Set what depends on the number of images, unless it was given or a recipe names it."""
    config, images = options.settings, len(data.x_train)
    if options.recipe is None and "--train-eval" not in given:
        config = replace(config, train_eval=max(1, min(config.train_eval, images // 4)))
    if options.labeled is not None:
        if options.labeled >= images:
            raise ValueError(
                f"--labeled must be below the {images} training images, not {options.labeled}"
            )
        if "--epoch-images" not in given:
            config = replace(config, epoch_images=images)
    return config


@dataclass
class _Run:
    """A run, and with --labeled the training of its classifier, under one progress display."""

    options: Options
    config: Config
    init: dict[str, torch.Tensor] | None
    console: Console
    progress: Progress
    stop: Callable[[], bool]

    def train(self, data: ImageData, unlabeled: PseudoLabeled | None) -> list[Row]:
        if self.options.labeled is not None:
            made = self._label(data, self.options.labeled)
            if made is None:  # stopped
                return []
            data, unlabeled = made
        out = self.options.out
        more = {"unlabeled": unlabeled, "on_epoch": self._report, **self._hooks(out.name)}
        return fit(self.config, data, out, **more)[1]

    def _label(self, data: ImageData, labeled: int) -> tuple[ImageData, PseudoLabeled] | None:
        out, hooks = self.options.out / "classifier", self._hooks("classifier")
        made = pseudo_label_rest(self.config, data, labeled, out, **hooks)
        if made is None:
            return None
        kept, others, right = made
        self.console.out(
            f"{len(others)} images were labeled by a classifier trained on {labeled}; "
            f"{right:.1%} of the labels are right"
        )
        return kept, others

    def _hooks(self, name: str) -> dict[str, Any]:
        return {
            "init": self.init,
            "resume": self.options.resume,
            "on_step": StepBar(self.progress, name),
            "stop": self.stop,
        }

    def _report(self, row: Row) -> None:
        text = (
            f"epoch {row['epoch'] + 1:.0f}/{self.config.epochs}  lr {row['lr']:g}  "
            f"{row['seconds']:.1f} s  training steps: loss {row['step_robust_loss']:.3f}, "
            f"robust {row['step_robust_acc']:.1%}"
        )
        if "test_robust_acc" in row:
            tested = reported(row)
            natural, robust = tested["test_natural_acc"], tested["test_robust_acc"]
            text += f"  test: natural {natural:.1%}, robust {robust:.1%}"
        self.console.out(text)


def _signals(ranks: Job) -> AbstractContextManager[StopRequest]:
    """Catch Ctrl-C and SIGTERM; the first rank reports them. torchrun sends a Ctrl-C twice."""
    if ranks.world == 1:
        return graceful_stop()
    return graceful_stop(None if ranks.rank == 0 else lambda text: None, echo=5)


def _summarize(
    options: Options, config: Config, dataset: str, rows: list[Row], console: Console
) -> None:
    """Draw the learning curves and print the result so far."""
    if not is_over(config, rows):
        console.out(f"Stopped after {len(rows)} of {config.epochs} epochs; continue with --resume.")
    evaluated = [row for row in rows if "test_robust_acc" in row]
    if not evaluated:
        return
    label = config.method.upper()
    if config.gamma:
        label += f"-{'RWP' if config.direction == 'random' else 'AWP'}, gamma {config.gamma:g}"
    learning_curves({label: [rows]}, options.out / "curves.png", f"{dataset}, {config.arch}")
    top, last = reported(best(rows)), reported(evaluated[-1])
    console.out(
        f"Robust test accuracy (PGD-{config.test_steps}): best {top['test_robust_acc']:.2%} after "
        f"epoch {top['epoch'] + 1:.0f}, last {last['test_robust_acc']:.2%}; natural "
        f"{top['test_natural_acc']:.2%} and {last['test_natural_acc']:.2%}. All in {options.out}."
    )
