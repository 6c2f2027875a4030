"""What do bfloat16, channels_last and torch.compile each buy in a training step on a CPU?

    OMP_NUM_THREADS=1 python -m benchmarks.cpu_precision

A step of AT-AWP with PGD-10, timed in turn for every way to run it. Writes cpu_precision.json and
prints a table. Compiling takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import RESULTS, environment, write_json
from benchmarks.report import about, markdown_table
from benchmarks.steps import EXACT, Step, images, network, training_step
from benchmarks.timing import Seconds, interleaved, median_ratio

BASE = "float32"
WAYS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "float32, channels_last": ("channels_last",),
    "bfloat16": ("bfloat16",),
    "bfloat16, channels_last": ("bfloat16", "channels_last"),
    "bfloat16, channels_last, compiled": ("bfloat16", "channels_last", "compiled"),
}
"""How a step is run."""


def build(arch: str, batch: int, way: Sequence[str]) -> partial[Any]:
    """A step with a network and a batch of its own."""
    layout = torch.channels_last if "channels_last" in way else torch.contiguous_format
    model = network(arch, memory_format=layout)
    if "compiled" in way:
        model.compile(dynamic=True)
    autocast = torch.bfloat16 if "bfloat16" in way else None
    step: Step = training_step(EXACT, model, autocast=autocast)
    return partial(step, *images(batch, memory_format=layout))


def table(seconds: Seconds, batch: int) -> str:
    """Milliseconds an image, and how many times as fast as the first way."""
    return markdown_table(
        {
            "": lambda row: row["name"],
            "ms an image": lambda row: f"{1e3 * statistics.median(row['seconds']) / batch:.1f}",
            "speed-up": lambda row: f"{1 / median_ratio(seconds, row['name'], BASE):.2f}",
        },
        [{"name": name, "seconds": each} for name, each in seconds.items()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arch", nargs="+", default=["preact_resnet10_32", "preact_resnet18"], help="%(default)s")
    add("--batch", type=int, default=32, help="images in a step (%(default)s)")
    add("--rounds", type=int, default=5, help="(%(default)s)")
    add("--out", type=Path, default=RESULTS / "cpu", help="(%(default)s)")
    args = parser.parse_args()
    content: dict[str, Any] = {**environment(), "batch": args.batch, "seconds": {}}
    for arch in args.arch:
        steps: Mapping[str, Any] = {n: build(arch, args.batch, way) for n, way in WAYS.items()}
        seconds = content["seconds"][arch] = interleaved(steps, rounds=args.rounds)
        write_json(args.out / "cpu_precision.json", content)
        print(f"**{arch}, batch {args.batch}**\n\n{table(seconds, args.batch)}\n", flush=True)
    print(about(content))


if __name__ == "__main__":
    main()
