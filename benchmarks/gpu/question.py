"""What every question shares: the command line, the JSON file, the table at the end."""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import RESULTS, device_slug, environment, write_json
from benchmarks.report import figures_table
from benchmarks.timing import Seconds, medians

Details = dict[str, Any]
"""What a case leaves in the JSON file beside its figures."""


@dataclass(frozen=True)
class Options:
    """The command line.

    Attributes:
        device: cuda or cpu.
        quick: the smallest sizes; the figures mean nothing.
        case: only cases whose name contains this text.
        minutes: no case is started later than this.
        out: the folder of the JSON files.
        extra: the options that one question alone has.
    """

    device: torch.device
    quick: bool = False
    case: str = ""
    minutes: float = 7.0
    out: Path = RESULTS
    extra: argparse.Namespace = field(default_factory=argparse.Namespace)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


class Record:
    """The JSON file of one run of a question, written anew after every case and figure."""

    def __init__(self, question: str, options: Options) -> None:
        now = datetime.now(timezone.utc)
        self.path = options.out / f"{question}-{now:%Y%m%d-%H%M%S}.json"
        self.content: dict[str, Any] = {
            "question": question,
            "status": "running",
            "quick": options.quick,
            "environment": environment(options.device),
            "figures": [],
            "cases": {},
            "notes": [],
        }
        self._quick = options.quick
        self._case = ""
        self._failed = False
        self.write()

    def measure(self, case: str, function: Callable[[Record], Details]) -> None:
        """Run a case; if it raises an exception, record the traceback."""
        print(f"{self.content['question']}: {case}", flush=True)
        self._case = case
        start = time.perf_counter()
        try:
            self.update(**function(self))
        except Exception:
            error = traceback.format_exc()
            print(error, flush=True)
            self._failed = True
            self.update(error=error)
            self.figure("error", error.strip().splitlines()[-1])
        self.update(took_seconds=time.perf_counter() - start)

    def update(self, **details: Any) -> None:
        """Record what is known about the current case so far."""
        self.content["cases"].setdefault(self._case, {}).update(details)
        self.write()

    def figure(
        self,
        name: str,
        value: float | str | None,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """A figure of the current case, with its target if it has one."""
        met: bool | None = None
        if isinstance(value, (int, float)) and not self._quick:
            if at_least is not None:
                met = value >= at_least
            elif at_most is not None:
                met = value <= at_most
        target = f">= {at_least:g}" if at_least is not None else None
        target = f"<= {at_most:g}" if at_most is not None else target
        self.content["figures"].append(
            {"case": self._case, "name": name, "value": value, "target": target, "met": met}
        )
        self.write()

    def figures(self, unit: str, values: Mapping[str, float]) -> None:
        """A figure for each name, all in one unit and without a target."""
        for name, value in values.items():
            self.figure(f"{name}, {unit}", value)

    def note(self, text: str) -> None:
        """Something that a reader of the figures must know."""
        self.content["notes"].append(text)
        self.write()

    def close(self) -> int:
        """Print the table; returns the exit code."""
        self.content["status"] = "failed" if self._failed else "complete"
        self.write()
        print(f"\n{table(self.content)}\n\nWritten to {self.path}")
        return int(self._failed)

    def write(self) -> None:
        write_json(self.path, self.content)


def table(content: Mapping[str, Any]) -> str:
    """The title, the figures and the notes of a JSON file."""
    about = content["environment"]
    title = f"{content['question']}: {about['device']}, torch {about['torch']}"
    if content["quick"]:
        title += " (quick: the figures mean nothing)"
    return "\n".join([title, "", figures_table(content["figures"]), *content["notes"]])


def milliseconds(seconds: Seconds) -> Details:
    """The medians and every repeat, in milliseconds."""
    return {
        "median_ms": {name: 1e3 * s for name, s in medians(seconds).items()},
        "ms": {name: [1e3 * s for s in each] for name, each in seconds.items()},
    }


def answer(
    question: str,
    description: str,
    cases: Callable[[Options], Mapping[str, Callable[[Record], Details]]],
    argv: list[str] | None = None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Run the command line of a question.

    Args:
        question: its name, which the JSON file has, too.
        description: its module's docstring.
        cases: maps the options to what is measured, by name. A case is called with the record,
            adds its figures to it and returns details for the JSON file.
        argv: the arguments; those of the process by default.
        add_arguments: adds the options that this question alone has.

    Returns:
        The exit code: 0 if every case could be measured.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.gpu.{question}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if add_arguments is not None:
        add_arguments(parser)
    options = _parse(parser, argv)
    torch.set_float32_matmul_precision("high")  # TF32
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    found = cases(options)
    selected = {name: case for name, case in found.items() if options.case in name}
    if not selected:
        parser.error(f"--case {options.case}: there are only {', '.join(found)}")
    record = Record(question, options)
    begin = time.monotonic()
    for name, case in selected.items():
        if time.monotonic() - begin > 60 * options.minutes:
            record.note(f"{name}: not measured, {options.minutes:g} minutes were over")
            continue
        record.measure(name, case)
        free_memory(options)
    return record.close()


def free_memory(options: Options) -> None:
    """Release what the last case held, and forget what was compiled for it."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if options.on_gpu:
        torch.cuda.empty_cache()


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> Options:
    add = parser.add_argument
    add("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    add("--quick", action="store_true", help="smallest sizes; the figures mean nothing")
    add("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    add("--minutes", type=float, default=7.0, help="start no case later (default: %(default)s)")
    add("--out", type=Path, help="folder of the JSON file (default: benchmarks/results/DEVICE)")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; try --device cpu --quick")
    out = args.out
    if out is None:
        quick = Path(tempfile.gettempdir()) / "awp-benchmarks-quick"
        out = quick if args.quick else RESULTS / device_slug(device)
    return Options(device, args.quick, args.case, args.minutes, out, args)
