"""Label images with a classifier, for robust self-training (RST, Carmon et al., 2019).

    python examples/pseudo_label.py --images x.npy --checkpoint runs/natural/last.pt --out xy.npz
    python examples/pseudo_label.py --images x.npz --model mine:classifier --out xy.npz

Images are uint8, (N, H, W, C) or (N, C, H, W): an .npy file, or x or data of an .npz file. If there are labels in it, too (y), it is said how many
agree. The classifier is a checkpoint of examples/cifar10.py, a state dict with --arch, or what a
function of one's own returns.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from awp_optim.lab.loading import from_checkpoint, from_function
from awp_optim.lab.models import MODELS
from awp_optim.lab.progress import step_bars
from awp_optim.lab.pseudo import (
    PseudoLabeled,
    classify,
    confident,
    load_images,
    load_labels,
    save_pseudo_labeled,
)


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], not {text}")
    return value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, help="the images, .npy or .npz")
    add("--out", type=Path, required=True, help="the .npz file to write: x and y")
    classifier = parser.add_mutually_exclusive_group(required=True)
    classifier.add_argument("--checkpoint", type=Path, help="the classifier's weights")
    classifier.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="what, called, returns the classifier: a torch module of images in [0, 1]",
    )
    add(
        "--arch",
        help=f"the checkpoint's network (its own): {', '.join(sorted(MODELS))}, torchvision/NAME",
    )
    add("--num-classes", type=int, help="the checkpoint's classes (as many as its head has)")
    add(
        "--min-confidence",
        type=probability,
        default=0.0,
        help="drop images with a lower probability of their label (%(default)s)",
    )
    add("--batch-size", type=int, default=512, help="(%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser.parse_args()


def report(console: Console, labeled: PseudoLabeled) -> None:
    table = Table(title="Images by label")
    for column in ("label", "images", "share"):
        table.add_column(column, justify="right")
    for label, n in enumerate(labeled.y.bincount().tolist()):
        table.add_row(str(label), str(n), f"{n / len(labeled):.1%}")
    console.print(table)


def main() -> None:
    args = parse_args()
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    try:
        if args.out.resolve() == args.images.resolve():
            raise ValueError("--out would take the place of --images: choose another file")
        x = load_images(args.images)
        truth = load_labels(args.images)
        if truth is not None and len(truth) != len(x):
            raise ValueError(f"{args.images} has {len(x)} images and {len(truth)} labels")
        if args.model is None:
            model = from_checkpoint(
                args.checkpoint,
                arch=args.arch,
                num_classes=args.num_classes,
                in_channels=x.shape[1],
            )
        else:
            model = from_function(args.model)
        model.to(args.device)
        with step_bars(console) as progress:
            bar = progress.add_task(args.images.name, total=None)
            y, confidence = classify(
                model,
                x,
                args.batch_size,
                on_step=lambda done, steps: progress.update(bar, completed=done, total=steps),
            )
        kept = confident(confidence, args.min_confidence)
        labeled = PseudoLabeled(x[kept], y[kept])
        save_pseudo_labeled(labeled, args.out)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    report(console, labeled)
    shape = "x".join(map(str, x.shape[1:]))
    say(
        f"{len(x)} images of {shape}, {len(labeled)} kept ({len(labeled) / len(x):.2%}), with a "
        f"mean confidence of {confidence[kept].double().mean().item():.2%}. All in {args.out}."
    )
    if truth is not None:
        right = (labeled.y == truth[kept]).double().mean().item()
        say(f"Of those kept, {right:.2%} agree with the labels in {args.images}.")


if __name__ == "__main__":
    main()
