"""``awp pseudo-label``: label images with a classifier, for robust self-training (RST)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from awp_optim.lab.commands.options import (
    ClassifierOptions,
    Number,
    Positive,
    check_writable,
    parse,
    print_table,
    terminal,
)
from awp_optim.lab.job import Job
from awp_optim.lab.loading import from_checkpoint, from_function
from awp_optim.lab.progress import StepBar, step_bars
from awp_optim.lab.pseudo import (
    PseudoLabeled,
    classify,
    confident,
    load_images,
    save_pseudo_labeled,
)

__all__ = ["Options", "main"]

HELP = """Label images with a classifier, for robust self-training (RST, Carmon et al., 2019).

Images are uint8, (N, H, W, C) or (N, C, H, W): an .npy file, or an .npz file with x, image, data or
a single array. If it also holds labels (y or label), the share that agrees is printed. The
classifier is a checkpoint of awp train, a state dict with --arch, or what a function of your own
returns (--model MODULE:FUNCTION: this runs that code).
"""


@dataclass(frozen=True, kw_only=True)
class Options(ClassifierOptions):
    """The options of ``awp pseudo-label``."""

    images: Path
    """The images, .npy or .npz."""
    out: Path
    """The .npz file to write: x and y."""
    min_confidence: Number = 0.0
    """Drop images whose label has a lower probability than this."""
    batch_size: Positive = 512
    """Images at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"--min-confidence must be in [0, 1], not {self.min_confidence:g}")
        if self.out.resolve() == self.images.resolve():
            raise ValueError("--out would replace --images: choose another file")


def main(arguments: Sequence[str], ranks: Job) -> None:
    """Label the images that the command line names."""
    options = parse(Options, arguments, "awp pseudo-label", HELP)
    check_writable(options.out)
    given = None if options.model is None else from_function(options.model)
    x, truth = load_images(options.images)
    model = _classifier(options, x.shape[1]) if given is None else given
    console = terminal()
    with step_bars(console) as progress:
        bar = StepBar(progress, options.images.name)
        y, confidence = classify(model.to(options.device), x, options.batch_size, on_step=bar)
    kept = confident(confidence, options.min_confidence).nonzero().flatten()
    labeled = PseudoLabeled(x[kept], y[kept])
    save_pseudo_labeled(labeled, options.out)
    counts = [
        [str(label), str(n), f"{n / len(labeled):.1%}"]
        for label, n in enumerate(labeled.y.bincount().tolist())
    ]
    print_table(console, [["label", "images", "share"], *counts], "Images by label")
    shape = "x".join(map(str, x.shape[1:]))
    console.out(
        f"{len(x)} images of {shape}, {len(labeled)} kept ({len(labeled) / len(x):.2%}), with a "
        f"mean confidence of {confidence[kept].double().mean().item():.2%}. All in {options.out}."
    )
    if truth is not None:
        right = (labeled.y == truth[kept]).double().mean().item()
        console.out(f"Of those kept, {right:.2%} agree with the labels in {options.images}.")


def _classifier(options: Options, channels: int) -> nn.Module:
    assert options.checkpoint is not None
    return from_checkpoint(
        options.checkpoint,
        arch=options.arch,
        num_classes=options.num_classes,
        in_channels=channels,
    )
