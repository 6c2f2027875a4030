"""What do bfloat16, channels_last and torch.compile each buy in a training step on a CPU?

    python -m benchmarks.cpu_precision

A step of AT-AWP with PGD-10, timed in turn for every way to run it, on one thread and in CPU time,
so that other programs hardly matter. Writes cpu_precision.json and prints a table. Compiling takes
minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import RESULTS, environment, write_json
from benchmarks.report import about, markdown_table
from benchmarks.steps import EXACT, Step, images, network, training_step
from benchmarks.timing import Seconds, median_ratio

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


def cpu_seconds(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> Seconds:
    """The CPU time of every contestant's calls, one a round, after one that is not timed."""
    seconds: Seconds = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return seconds


def table(seconds: Seconds, batch: int) -> str:
    """Milliseconds an image, and how many times as fast as the first way."""
    return markdown_table(
        {
            "": lambda row: row["name"],
            "CPU ms an image": lambda row: f"{1e3 * statistics.median(row['seconds']) / batch:.1f}",
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
    torch.set_num_threads(1)
    content: dict[str, Any] = {**environment(), "batch": args.batch, "seconds": {}}
    for arch in args.arch:
        torch.compiler.reset()  # one network's versions count against the next one's
        steps = {name: build(arch, args.batch, way) for name, way in WAYS.items()}
        seconds = content["seconds"][arch] = cpu_seconds(steps, args.rounds)
        write_json(args.out / "cpu_precision.json", content)
        print(f"**{arch}, batch {args.batch}**\n\n{table(seconds, args.batch)}\n", flush=True)
    print(about(content))


if __name__ == "__main__":
    main()
