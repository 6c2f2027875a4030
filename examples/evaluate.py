"""Robust accuracy of a classifier, from FGSM to AutoAttack: the columns of the paper's Table 2.

    python examples/evaluate.py --checkpoint runs/at-awp/best.pt
    python examples/evaluate.py --checkpoint runs/at-awp/best.pt \\
        --attacks fgsm,pgd20,pgd100,cw,spsa,autoattack --out results
    python examples/evaluate.py --model mine:classifier --mean 0.5 0.5 0.5 --std 0.2 0.2 0.2
    python examples/evaluate.py --robustbench Wu2020Adversarial --attacks autoattack

The data set, the network and the threat are those of the checkpoint's run, unless options say
otherwise. --out gets results.json, .csv, .md, record.csv (an image a line) and, with --plot,
pictures. A run that was stopped or killed goes on with --resume, at the attack and batch it was at.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import awp_optim
from awp_optim._utils.io import atomic_write
from awp_optim.attacks import APGD, CW, FGSM, PGD, SPSA, Attack, AutoAttack
from awp_optim.evaluation import Evaluation, EvaluationWarning, evaluate
from awp_optim.lab.data import DATASETS, ImageData
from awp_optim.lab.data import load as load_dataset
from awp_optim.lab.loading import (
    from_checkpoint,
    from_function,
    from_robustbench,
    normalized,
    settings_of,
)
from awp_optim.lab.models import MODELS
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

DEFAULT_ATTACKS = "fgsm,pgd20,pgd100,cw"
ATTACKS = (
    "fgsm, pgdN (pgd20, pgd100), cw, spsa, apgd, apgd-dlr, apgd-t, square, autoattack,"
    " autoattack-plus, autoattack-rand"
)
CURVE = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Radii of --plot, as multiples of eps."""
CURVE_IMAGES, GRID_IMAGES = 200, 8


def number(text: str) -> float:
    """A number, or a fraction such as 8/255."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, such as 8/255") from error


def radii(text: str) -> tuple[float, ...]:
    """Numbers with commas between them, none below 0."""
    values = tuple(sorted({number(part) for part in text.split(",")}))
    if values[0] < 0:
        raise argparse.ArgumentTypeError(f"radii must not be negative, got {text}")
    return values


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text}")
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("the model").add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="of examples/cifar10.py, or a state dict")
    model.add_argument(
        "--model", metavar="MODULE:FUNCTION", help="what, called, returns a torch module"
    )
    model.add_argument("--robustbench", metavar="NAME", help="a model of RobustBench")
    add = parser.add_argument
    add(
        "--arch",
        help=f"the checkpoint's network (its own): {', '.join(sorted(MODELS))}, wide_resnetD_W,"
        " torchvision/NAME; or as in papers, WideResNet-34-10",
    )
    add("--num-classes", type=positive, help="the checkpoint's classes (as many as its head has)")
    add("--ema", action="store_true", help="the checkpoint's averaged weights")
    add(
        "--mean",
        type=number,
        nargs="+",
        help="normalise with it, a number a channel, if the model does not (no normalisation)",
    )
    add("--std", type=number, nargs="+", help="the same; both or none")

    add("--attacks", default=DEFAULT_ATTACKS, help=f"of {ATTACKS} (%(default)s)")
    add("--eps", type=number, help="radius, of images in [0, 1] (the run's, or 8/255)")
    add("--norm", choices=("linf", "l2", "l1"), help="(the run's, or linf); l1: APGD, AutoAttack")
    add(
        "--backend",
        choices=("reference", "native"),
        default="reference",
        help="of AutoAttack: its authors' package, or faster APGD parts of ours (reference)",
    )
    add(
        "--skip-broken",
        action="store_true",
        help="spare attacks the images broken before, for a sooner worst case",
    )
    add("--seed", type=int, default=0, help="(%(default)s)")

    add("--dataset", choices=DATASETS, help="its test images (the run's, or cifar10)")
    add("--data-dir", type=Path, default=Path("data"), help="(%(default)s)")
    add("--image-size", type=positive, help="side to resize the images of a folder to")
    add("--limit", type=positive, help="use this many test images at the most")
    add("--batch-size", type=positive, default=128, help="(%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")

    add("--out", type=Path, default=Path("evaluation"), help="folder of results (%(default)s)")
    add("--resume", action="store_true", help="go on with the evaluation in --out")
    add(
        "--plot",
        type=radii,
        nargs="?",
        const=(),
        metavar="EPS,EPS,...",
        help="draw curves.png, accuracy by eps (0 to 8 times --eps), and images.png",
    )
    return parser.parse_args()


def make_attack(name: str, eps: float, norm: str, backend: str) -> Attack:
    """An attack by its name on the command line, with the paper's settings."""
    step_size = eps / (4 if norm == "linf" else 8) or 1.0  # with eps=0 there are no steps
    if pgd := re.fullmatch(r"pgd([1-9]\d*)", name):
        return PGD(eps, step_size, int(pgd[1]), norm)
    losses = {"apgd": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}
    if name in losses:
        return APGD(eps, norm=norm, loss=losses[name], drop_fooled=True)
    if name == "square":
        return AutoAttack(eps, norm, "custom", ("square",))
    versions = {"autoattack": "standard", "autoattack-plus": "plus", "autoattack-rand": "rand"}
    if name in versions:
        return AutoAttack(eps, norm, versions[name], backend=backend)
    if name == "fgsm":
        return FGSM(eps, norm)
    if name == "cw":
        return CW(eps, norm=norm)
    if name == "spsa":
        return SPSA(eps, norm=norm)
    raise ValueError(f"no attack {name!r}; there are: {ATTACKS}")


def make_attacks(names: str, eps: float, norm: str, backend: str) -> dict[str, Attack]:
    attacks: dict[str, Attack] = {}
    for name in (part.strip() for part in names.split(",")):
        name = "autoattack" + name[2:] if re.match(r"aa(-|$)", name) else name
        if name in attacks:
            raise ValueError(f"--attacks names {name} twice")
        attacks[name] = make_attack(name, eps, norm, backend)
    return attacks


class Batches:
    """Test images as floats in [0, 1], a batch at a time."""

    def __init__(self, x: Tensor, y: Tensor, size: int) -> None:
        self._x, self._y, self._size = x, y, size

    def __len__(self) -> int:
        return -(-len(self._x) // self._size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, len(self._x), self._size):
            yield self._x[i : i + self._size].float() / 255, self._y[i : i + self._size]


def run_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the run that the checkpoint is of says of itself."""
    if args.checkpoint is None:
        return {}
    config = dict(settings_of(args.checkpoint))
    beside = args.checkpoint.parent / "config.json"
    if beside.exists():
        try:
            config |= json.loads(beside.read_text())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{beside} is damaged ({error}): delete it") from error
    return config


def load_data(args: argparse.Namespace, dataset: str) -> ImageData:
    if args.image_size is not None and dataset != "folder":
        raise ValueError("--image-size is for --dataset folder")
    options = {} if args.image_size is None else {"size": args.image_size}
    data = load_dataset(dataset, args.data_dir, **options)
    if args.limit is not None:
        data = data.limit(min(args.limit, len(data.x_train)), min(args.limit, len(data.x_test)))
    return data


def refuse(state: Path) -> None:
    """Raise ValueError if there are results of an evaluation; remove one that never got to any."""
    if not state.exists():
        return
    content = state.read_bytes()
    only_settings = content.count(b"\n") <= 1 and content.startswith(b'{"evaluation":')
    if content and not only_settings:
        raise ValueError(
            f"{state.parent} already holds an evaluation: go on with --resume, or choose another"
            " --out"
        )
    state.unlink()


def load_model(args: argparse.Namespace, data: ImageData, dataset: str, norm: str) -> nn.Module:
    if args.checkpoint is not None:
        return from_checkpoint(
            args.checkpoint,
            arch=args.arch,
            num_classes=args.num_classes,
            in_channels=data.in_channels,
            ema=args.ema,
            mean=args.mean,
            std=args.std,
        )
    if args.arch or args.num_classes or args.ema:
        raise ValueError("--arch, --num-classes and --ema go with --checkpoint")
    if args.model is not None:
        return normalized(from_function(args.model), args.mean, args.std)
    if args.mean or args.std:
        raise ValueError(
            "RobustBench's models take images in [0, 1] and normalise them themselves: leave --mean"
            " and --std away"
        )
    return from_robustbench(args.robustbench, dataset, norm, args.data_dir / "robustbench")


def about(args: argparse.Namespace, dataset: str, eps: float, norm: str) -> dict[str, Any]:
    """What was measured, with what, for results.json."""
    checksum = None
    if args.checkpoint is not None:
        checksum = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()
    return {
        "command": shlex.join(["examples/evaluate.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "checkpoint_sha256": checksum,
        "dataset": dataset,
        "eps": eps,
        "norm": norm,
        "device": str(args.device),
        "awp_optim": awp_optim.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def plot(
    args: argparse.Namespace,
    model: nn.Module,
    data: ImageData,
    attacks: dict[str, Attack],
    eps: float,
    norm: str,
    r: Evaluation,
) -> None:
    """Accuracy by radius, and some images as they are and attacked."""
    cheap = [name for name, a in attacks.items() if isinstance(a, (FGSM, PGD, CW, APGD))][:4]
    if not cheap:
        cheap = ["pgd20"] if norm != "l1" else ["apgd"]
    few = Batches(data.x_test[:CURVE_IMAGES], data.y_test[:CURVE_IMAGES], args.batch_size)
    points: dict[str, dict[float, float]] = {title(name, norm): {} for name in cheap}
    scales = [scale * eps for scale in CURVE if scale * eps <= 1 or norm != "linf"]
    for at_eps in args.plot or scales:
        at = {name: make_attack(name, at_eps, norm, args.backend) for name in cheap}
        result = evaluate(model, few, at, device=args.device, checks=False, seed=args.seed)
        for name, accuracy in result.robust.items():
            points[title(name, norm)][at_eps] = accuracy
    name = args.checkpoint or args.model or args.robustbench
    accuracy_by_radius(
        points,
        args.out / "curves.png",
        f"{name}: {min(CURVE_IMAGES, r.n)} images, {norm}",
        chance=1 / data.num_classes,
        marked=eps,
    )
    broken = [i for i, by in enumerate(r.broken_by) if by not in ("", "natural")]
    stood = [i for i, by in enumerate(r.broken_by) if by == ""]
    half = max(GRID_IMAGES // 2, GRID_IMAGES - len(stood))
    shown = (broken[:half] + stood)[:GRID_IMAGES]
    if not shown:
        return
    x, y = data.x_test[shown].to(args.device).float() / 255, data.y_test[shown].to(args.device)
    attack = make_attack(cheap[-1], eps, norm, args.backend)
    torch.manual_seed(args.seed)
    x_adv = attack(model, x, y)
    with torch.no_grad():
        said = [model(z).argmax(1).tolist() for z in (x, x_adv)]
    names = [
        tuple(data.classes[k] for k in of_image) for of_image in zip(y.tolist(), *said, strict=True)
    ]
    adversarial_images(
        x.cpu().numpy(),
        x_adv.cpu().numpy(),
        names,
        args.out / "images.png",
        f"{title(cheap[-1], norm)}, eps {radius(eps)}, {norm}: what the model says, wrong: orange",
    )


def report(console: Console, r: Evaluation, about: str, norm: str) -> None:
    head, *rows = per_attack(r, norm)
    table = Table(title=escape(about))
    for i, column in enumerate(head):
        widest = max(len(row[i]) for row in rows)  # only the head is broken on a narrow terminal
        table.add_column(column, justify="right" if i else "left", min_width=widest)
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == title("worst_case") else None)
    console.print(table)
    if r.warnings:
        console.print("[bold]Warnings[/], which make these figures doubtful:")
        console.print(findings(r), markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    args = parse_args()
    console = Console()
    state = args.out / "state.jsonl"
    try:
        config = run_settings(args)
        eps = args.eps if args.eps is not None else config.get("eps", 8 / 255)
        norm = args.norm or config.get("norm", "linf")
        if norm == "linf" and eps > 1:
            raise ValueError(
                f"eps {eps:g} is more than the images' whole range, [0, 1]: for 8 of 255 levels"
                " give --eps 8/255"
            )
        dataset = args.dataset or config.get("dataset", "cifar10")
        if dataset not in DATASETS:
            raise ValueError(
                f"the run's data set {dataset!r} is one's own: give --dataset folder or npz, and"
                " its place with --data-dir"
            )
        attacks = make_attacks(args.attacks, eps, norm, args.backend)
        if not args.resume:
            refuse(state)
        data = load_data(args, dataset)
        model = load_model(args, data, dataset, norm).to(args.device)
        args.out.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EvaluationWarning)  # the report has them
            r = evaluate(
                model,
                Batches(data.x_test, data.y_test, args.batch_size),
                attacks,
                device=args.device,
                skip_broken=args.skip_broken,
                seed=args.seed,
                state=state,
            )
        name = args.robustbench or args.model or str(args.checkpoint)
        what = f"{name} on {data.name}: {r.n} test images, {norm}, eps {radius(eps)}"
        if r.skip_broken:
            what += "; each attack on what those before left"
        write(args.out / "results.json", as_json(r, about(args, dataset, eps, norm)))
        write(args.out / "results.csv", as_csv(r))
        write(args.out / "results.md", as_report(r, what, name, norm))
        write(args.out / "record.csv", per_example(r))
        report(console, r, what, norm)
        if args.plot is not None:
            plot(args, model, data, attacks, eps, norm, r)
    except KeyboardInterrupt:
        sys.exit(f"Stopped; go on with --resume. What is done is in {state}.")
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    console.print(f"All in {args.out}.", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
