"""Which accuracy does AutoAttack leave to the best checkpoint of a training run?

    python -m benchmarks.gpu.autoattack --data-dir data --run-dir runs/at-awp

The reference AutoAttack in its standard version, on one part of the test images after another: a
run cut short has the exact figure for the images so far. Needs numpy and pyautoattack.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awp_optim.attacks import AutoAttack
from awp_optim.lab.loading import from_checkpoint, settings_of
from benchmarks.gpu.attacks import optional_module
from benchmarks.gpu.networks import SMALL
from benchmarks.gpu.question import Details, Options, Record, answer
from benchmarks.steps import EPS, images


def cases(options: Options) -> dict[str, partial[Details]]:
    return {"standard": partial(measure, options)}


def measure(options: Options, record: Record) -> Details:
    missing = [name for name in ("numpy", "pyautoattack") if optional_module(name) is None]
    if missing:
        record.note(f"{' and '.join(missing)} not installed: left out")
        return {}
    deadline = time.monotonic() + 60 * options.minutes
    model, x, y, attack = load(options)
    size = 4 if options.quick else 500
    parts: list[Details] = []
    natural = robust = done = 0
    for x_part, y_part in zip(torch.split(x, size), torch.split(y, size), strict=True):
        start = time.monotonic()
        x_part = x_part.float() / 255 if x_part.dtype == torch.uint8 else x_part
        natural += count_right(model, x_part, y_part)
        robust += count_right(model, attack(model, x_part, y_part), y_part)
        done += len(y_part)
        seconds = time.monotonic() - start
        parts.append({"images": len(y_part), "seconds": seconds})
        record.update(images=done, natural=natural / done, robust=robust / done, parts=parts)
        if time.monotonic() + seconds > deadline:
            break
    record.figure("images", done)
    record.figure("natural accuracy, %", 100 * natural / done)
    record.figure("AutoAttack, % (published: about 50)", 100 * robust / done)
    return {"attack": str(attack), "precision": "float32 (TF32)"}


@torch.no_grad()
def count_right(model: nn.Module, x: Tensor, y: Tensor) -> int:
    return int((model(x).argmax(1) == y).sum())


def load(options: Options) -> tuple[nn.Module, Tensor, Tensor, Any]:
    """The model, the test images and their labels, the attack; quick: few, random, untrained."""
    if options.quick:
        model = SMALL.build(options.device, torch.channels_last).eval()
        return model, *images(8, options.device), AutoAttack(EPS)
    from awp_optim.lab.data import load_cifar10

    data = load_cifar10(options.extra.data_dir, download=False).to(options.device)
    path = options.extra.run_dir / "best.pt"
    model = from_checkpoint(path).to(options.device).to(memory_format=torch.channels_last)
    config = settings_of(path)
    limit = options.extra.limit
    attack = AutoAttack(config["eps"], norm=config["norm"])
    return model, data.x_test[:limit], data.y_test[:limit], attack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="CIFAR-10 (default: %(default)s)")
    add("--run-dir", type=Path, default=Path("runs/at-awp"), help="(default: %(default)s)")
    add("--limit", type=int, help="test images (default: all)")


def main(argv: list[str] | None = None) -> int:
    return answer("autoattack", __doc__, cases, argv, add_arguments)


if __name__ == "__main__":
    sys.exit(main())
