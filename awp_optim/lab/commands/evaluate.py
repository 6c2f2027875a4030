"""``awp evaluate``: robust accuracy, the columns of the paper's Table 2."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn
from tyro.constructors import PrimitiveConstructorSpec

import awp_optim
from awp_optim._utils.checks import check_choice, check_real
from awp_optim._utils.io import write_text
from awp_optim.attacks import APGD, CW, FGSM, PGD, Attack
from awp_optim.evaluation import Evaluation, EvaluationWarning, evaluate
from awp_optim.lab.commands.attacks import NAMES, make_attack, make_attacks
from awp_optim.lab.commands.options import (
    CLASSIFIER,
    ClassifierOptions,
    DataOptions,
    Flag,
    Number,
    Positive,
    check_writable,
    number,
    one_of,
    parse,
    print_table,
    terminal,
)
from awp_optim.lab.data import DATASETS, ImageData
from awp_optim.lab.job import Job
from awp_optim.lab.loading import (
    from_checkpoint,
    from_function,
    from_robustbench,
    normalized,
    settings_of,
)
from awp_optim.lab.reports.plots import accuracy_by_radius, adversarial_images
from awp_optim.lab.reports.tables import (
    as_csv,
    as_json,
    as_report,
    findings,
    per_attack,
    per_example,
    radius,
    title,
)
from awp_optim.lab.shipped import locate
from awp_optim.lab.submission import (
    BLANK,
    check_test_set,
    leaderboard_attack,
    model_info,
    submission_form,
)
from awp_optim.lab.training_set import as_inputs

__all__ = ["Options", "main"]

HELP = """Robust accuracy of a classifier, from FGSM to AutoAttack.

The classifier is a checkpoint of awp train or a state dict (--checkpoint), what a function of your
own returns (--model MODULE:FUNCTION: this imports the module and calls the function, so it runs
that code), or a model of RobustBench (--robustbench NAME). The data set, the network and the threat
are those in the checkpoint, unless options say otherwise.

--out gets results.json, results.csv, results.md, record.csv (an image a line) and, with --plot,
pictures. After an interruption --resume continues at the attack and batch it was at.
"""

NORMS = ("linf", "l2", "l1")
CURVE = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Radii of --plot, as multiples of eps."""
CURVE_IMAGES, GRID_IMAGES = 200, 8
PIPED_SECONDS = 30
"""Where standard error is not a terminal: the time between two lines of progress."""


def _radii(words: Sequence[str]) -> tuple[float, ...]:
    values = tuple(sorted({number(part) for word in words for part in word.split(",")}))
    if values and values[0] < 0:
        raise ValueError("radii must not be negative")
    return values


_RADII: PrimitiveConstructorSpec[tuple[float, ...]] = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[EPS,EPS,...]",
    instance_from_str=_radii,
    is_instance=lambda value: True,
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True, kw_only=True)
class Options(ClassifierOptions):
    """The options of ``awp evaluate``."""

    robustbench: Annotated[str | None, CLASSIFIER, tyro.conf.arg(metavar="NAME")] = None
    """A model of RobustBench."""
    ema: Flag = False
    """Evaluate the checkpoint's averaged weights, by which best.pt was picked, instead of the
    model's own."""
    mean: tuple[float, ...] | None = None
    """Mean to normalize with, a number for each channel, if the model does not normalize."""
    std: tuple[float, ...] | None = None
    """The same for the standard deviation; give both or none."""
    attacks: Annotated[str, tyro.conf.arg(help=f"Separated by commas: {NAMES}.")] = (
        "fgsm,pgd20,pgd100,cw"
    )
    eps: Number | None = None
    """Radius, for images in [0, 1]; else the run's, or 8/255."""
    norm: Annotated[str | None, one_of(NORMS)] = None
    """Norm of the radius; else the run's, or linf. l1 is for APGD and AutoAttack."""
    backend: Annotated[str, one_of(("reference", "native"))] = "reference"
    """AutoAttack by its authors' package, or with the faster APGD of this package."""
    skip_broken: Flag = False
    """Attack only images that no earlier attack broke: the worst case, sooner."""
    seed: int = 0
    """Seed of the attacks."""
    batch_size: Positive = 128
    """Images at a time."""
    out: Path = Path("evaluation")
    """Folder of the results."""
    resume: Flag = False
    """Continue the evaluation in --out; --attacks may name more attacks after the same ones."""
    plot: Annotated[tuple[float, ...] | None, _RADII] = None
    """Draw curves.png, accuracy by radius (0 to 8 times --eps, or those given), and images.png."""
    submission: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Write RobustBench's entry for the model to this file, and its form to FILE.md."""
    data: tyro.conf.OmitArgPrefixes[DataOptions] = field(default_factory=DataOptions)
    """The images to use; else the test images of the run, or of cifar10."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint is None and self.ema:
            raise ValueError("--ema goes with --checkpoint")
        if self.robustbench is not None and (self.mean or self.std):
            raise ValueError(
                "RobustBench's models take images in [0, 1] and normalize them themselves: leave "
                "--mean and --std out"
            )
        if self.submission is not None and (self.submission.suffix != ".json" or self.skip_broken):
            raise ValueError(
                "--submission is a .json file, of an evaluation without --skip-broken: there, an "
                "accuracy counts the attacks before it"
            )

    @property
    def name(self) -> str:
        """What is evaluated."""
        return self.robustbench or self.model or str(self.checkpoint)


@dataclass(frozen=True)
class _Task:
    """An evaluation whose settings are all known."""

    options: Options
    dataset: str
    eps: float
    norm: str
    attacks: dict[str, Attack]
    run: dict[str, Any]

    def attack(self, name: str, eps: float) -> Attack:
        """An attack at another radius."""
        return make_attack(name, eps, self.norm, self.options.backend)


def main(arguments: Sequence[str], ranks: Job) -> None:
    """Evaluate the classifier that the command line names."""
    options = parse(Options, arguments, "awp evaluate", HELP)
    # What needs no images is checked before they are loaded, or even downloaded.
    task = _complete(options)
    if not options.resume:
        _refuse(options.out)
    check_writable(options.out / "results.json")
    given = _given(task)
    data = replace(options.data, dataset=task.dataset).load()
    if options.submission is not None:
        check_test_set(len(data.x_test))
        check_writable(options.submission)
    model = _model(task, data, given).to(options.device)
    model.to(memory_format=torch.channels_last)  # the layout of the images, too
    options.out.mkdir(parents=True, exist_ok=True)
    result = _evaluate(task, model, data)
    console = terminal()
    about = _about(task, shlex.join(["awp", "evaluate", *arguments]))
    _write(task, data.name, result, about, console)
    if options.submission is not None:
        _submit(task, options.submission, result, about)
        console.out(f"Submission: {options.submission}; what to fill in begins with {BLANK}")
    if options.plot is not None:
        _draw_curves(task, model, data, result)
        _draw_images(task, model, data, result)
    console.out(f"All in {options.out}.")


def _complete(options: Options) -> _Task:
    """Fill in options that were not given from the settings in the checkpoint."""
    run = {} if options.checkpoint is None else settings_of(options.checkpoint)
    norm = options.norm or run.get("norm", "linf")
    eps = run.get("eps", 8 / 255) if options.eps is None else options.eps
    dataset = options.data.dataset or run.get("dataset", "cifar10")
    try:
        check_choice("norm", norm, NORMS)
        check_real("eps", eps)
    except (TypeError, ValueError) as error:
        is_given = options.eps is not None
        raise ValueError(str(error) if is_given else f"{options.checkpoint}: {error}") from error
    if dataset not in DATASETS:
        raise ValueError(
            f"the checkpoint's data set {dataset!r} cannot be loaded by its name: give --dataset "
            "folder or npz, and its place with --data-dir"
        )
    attacks = make_attacks(options.attacks, eps, norm, options.backend)
    if options.submission is not None:
        leaderboard_attack(dataset, norm, eps, attacks)
    task = _Task(options, dataset, eps, norm, attacks, run)
    for name, at in product(_cheap(task), options.plot or ()):
        task.attack(name, at)  # a radius that is not possible is an error now
    return task


def _refuse(out: Path) -> None:
    """Raise FileExistsError if a folder holds results."""
    if (out / "state.jsonl").exists():
        raise FileExistsError(
            f"{out} already holds an evaluation: continue it with --resume, or choose another --out"
        )


def _given(task: _Task) -> nn.Module | None:
    """The model of --model or --robustbench; None for a checkpoint, whose network needs images."""
    options = task.options
    if options.model is not None:
        return from_function(options.model)
    if options.robustbench is not None:
        folder = options.data.data_dir / "robustbench"
        return from_robustbench(options.robustbench, task.dataset, task.norm, folder)
    return None


def _model(task: _Task, data: ImageData, given: nn.Module | None) -> nn.Module:
    options = task.options
    if given is not None:
        return normalized(given, options.mean, options.std, data.in_channels)
    assert options.checkpoint is not None
    return from_checkpoint(
        options.checkpoint,
        arch=options.arch,
        num_classes=options.num_classes,
        in_channels=data.in_channels,
        ema=options.ema,
        mean=options.mean,
        std=options.std,
    )


class _Batches:
    """Images as floats in [0, 1], a batch at a time; reports where stderr is not a terminal."""

    def __init__(self, x: Tensor, y: Tensor, size: int) -> None:
        self._x, self._y, self._size = x, y, size

    def __len__(self) -> int:
        return -(-len(self._x) // self._size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        reported = -math.inf
        for i, start in enumerate(range(0, len(self._x), self._size)):
            if not sys.stderr.isatty() and time.monotonic() > reported + PIPED_SECONDS:
                reported = time.monotonic()
                print(f"evaluating: batch {i + 1} of {len(self)}", file=sys.stderr, flush=True)
            part = slice(start, start + self._size)
            yield as_inputs(self._x[part]), self._y[part]


def _evaluate(task: _Task, model: nn.Module, data: ImageData) -> Evaluation:
    options = task.options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EvaluationWarning)  # the report has them
        return evaluate(
            model,
            _Batches(data.x_test, data.y_test, options.batch_size),
            task.attacks,
            device=options.device,
            skip_broken=options.skip_broken,
            seed=options.seed,
            state=options.out / "state.jsonl",
            key=options.model or options.robustbench,
        )


def _write(
    task: _Task, dataset: str, r: Evaluation, about: Mapping[str, Any], console: Console
) -> None:
    """The results, in files and on the terminal."""
    out, name, norm = task.options.out, task.options.name, task.norm
    what = f"{name} on {dataset}: {r.n} test images, {norm}, eps {radius(task.eps)}"
    if r.skip_broken:
        what += "; each attack on the images that earlier ones did not break"
    write_text(out / "results.json", as_json(r, about))
    write_text(out / "results.csv", as_csv(r))
    write_text(out / "results.md", as_report(r, what, name, norm))
    write_text(out / "record.csv", per_example(r))
    print_table(console, per_attack(r, norm), what, bold=title("worst_case"))
    if r.warnings:
        console.print("Warnings: there are reasons to doubt these accuracies.", style="bold")
        console.out(findings(r))


def _submit(task: _Task, file: Path, r: Evaluation, about: Mapping[str, Any]) -> None:
    """RobustBench's entry, and the text of its form."""
    options, checkpoint = task.options, ""
    attack = leaderboard_attack(task.dataset, task.norm, task.eps, task.attacks)
    arch = options.arch or task.run.get("arch")
    info = model_info(r, attack, dataset=task.dataset, eps=task.eps, arch=arch, run=task.run)
    if options.checkpoint is not None:
        checkpoint = f"{options.checkpoint.name}, SHA-256 {about['checkpoint_sha256']}"
    form = submission_form(info, r, norm=task.norm, method=about["command"], checkpoint=checkpoint)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(info, indent=2) + "\n")
    write_text(file.with_suffix(".md"), form)


def _about(task: _Task, command: str) -> dict[str, Any]:
    """What was measured and with which versions, for results.json."""
    checkpoint, checksum = task.options.checkpoint, None
    if checkpoint is not None:
        checksum = hashlib.sha256(locate(checkpoint).read_bytes()).hexdigest()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "checkpoint_sha256": checksum,
        "dataset": task.dataset,
        "eps": task.eps,
        "norm": task.norm,
        "device": task.options.device,
        "awp_optim": awp_optim.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cheap(task: _Task) -> list[str]:
    """Up to four attacks that can be repeated at several radii."""
    cheap = [k for k, attack in task.attacks.items() if isinstance(attack, (FGSM, PGD, CW, APGD))]
    return cheap[:4] or (["apgd"] if task.norm == "l1" else ["pgd20"])


def _draw_curves(task: _Task, model: nn.Module, data: ImageData, r: Evaluation) -> None:
    """Draw accuracy by radius."""
    options, names = task.options, _cheap(task)
    few = as_inputs(data.x_test[:CURVE_IMAGES]), data.y_test[:CURVE_IMAGES]
    settings: dict[str, Any] = {
        "batch_size": options.batch_size,
        "device": options.device,
        "seed": options.seed,
    }
    scaled = [scale * task.eps for scale in CURVE]
    points: dict[str, dict[float, float]] = {title(name, task.norm): {} for name in names}
    for eps in options.plot or [eps for eps in scaled if eps <= 1 or task.norm != "linf"]:
        attacks = {name: task.attack(name, eps) for name in names}
        at_eps = evaluate(model, few, attacks, checks=False, **settings)
        for name, accuracy in at_eps.robust.items():
            points[title(name, task.norm)][eps] = accuracy
    accuracy_by_radius(
        points,
        options.out / "curves.png",
        f"{options.name}: {min(CURVE_IMAGES, r.n)} images, {task.norm}",
        chance=1 / data.num_classes,
        marked=task.eps,
    )


def _draw_images(task: _Task, model: nn.Module, data: ImageData, r: Evaluation) -> None:
    """Draw some images and their adversarial examples, half of them broken."""
    options, norm, name = task.options, task.norm, _cheap(task)[-1]
    broken = [i for i, by in enumerate(r.broken_by) if by not in ("", "natural")]
    robust_ones = [i for i, by in enumerate(r.broken_by) if by == ""]
    half = max(GRID_IMAGES // 2, GRID_IMAGES - len(robust_ones))
    shown = (broken[:half] + robust_ones)[:GRID_IMAGES]
    if not shown:
        return
    x = as_inputs(data.x_test[shown].to(options.device))
    y = data.y_test[shown].to(options.device)
    torch.manual_seed(options.seed)
    x_adv = task.attack(name, task.eps)(model, x, y)
    with torch.no_grad():
        predicted = [model(z).argmax(1).tolist() for z in (x, x_adv)]
    labels = [
        tuple(data.classes[k] for k in image) for image in zip(y.tolist(), *predicted, strict=True)
    ]
    adversarial_images(
        x.cpu().numpy(),
        x_adv.cpu().numpy(),
        labels,
        options.out / "images.png",
        f"{title(name, norm)}, eps {radius(task.eps)}, {norm}: predictions, wrong ones orange",
    )
