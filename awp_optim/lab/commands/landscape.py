"""``awp landscape``: weight loss landscapes of run folders, the paper's Figures 1 to 8 and 11."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from awp_optim._utils.io import write_text
from awp_optim.lab.commands.options import (
    Device,
    Flag,
    check_writable,
    default_device,
    one_of,
    parse,
    print_table,
    terminal,
)
from awp_optim.lab.job import Job
from awp_optim.lab.reports.figures import FIGURES, Drawing
from awp_optim.lab.reports.gallery import write_gallery
from awp_optim.lab.reports.landscapes import Landscapes, Measuring
from awp_optim.lab.reports.runs import NotEnough, Run, find_runs, grouped, select

__all__ = ["Options", "main"]

HELP = """Weight loss landscapes of training runs.

Runs are what awp train --out, awp compare with a recipe and examples/quickstart.py --runs leave;
those that differ in the seed alone are drawn as one. A checkpoint will do for a figure that needs
no metrics. Every point is on disk as soon as it is measured: after
Ctrl-C or a kill the same command continues, and with more alphas or directions only the new points
are measured. Under torchrun the processes share the points.

Figures:

""" + "\n".join(
    f"    {name:12}{' '.join((figure.__doc__ or '').split())}" for name, figure in FIGURES.items()
)

WHAT = tyro.conf.create_mutex_group(required=True, title="what to draw")
Figure = Annotated[str, one_of(FIGURES, "NAME")]


@dataclass(frozen=True)
class Options:
    """The options of ``awp landscape``."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUNS [RUNS ...]")
    ]
    """Run folders, folders of them, checkpoints, or names of networks that ship with awp."""
    figure: Annotated[tyro.conf.UseAppendAction[tuple[Figure, ...]], WHAT] = ()
    """One of the figures above."""
    gallery: Annotated[Flag, WHAT] = False
    """All figures that the runs allow, and index.html."""
    select: str | None = None
    """Regular expression: draw only the settings whose label matches."""
    out: Path = Path("landscapes")
    """Folder of the figures."""
    device: Device = field(default_factory=default_device)
    """Device to measure on."""

    measuring: tyro.conf.OmitArgPrefixes[Measuring] = field(default_factory=Measuring)
    """How landscapes are measured."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("name one run folder or more")


def main(arguments: Sequence[str], ranks: Job) -> None:
    """Draw the figures that the command line names."""
    options = parse(Options, arguments, "awp landscape", HELP)
    start = time.perf_counter()
    ranks.first(lambda: check_writable(options.out / "index.html"))
    console = terminal()
    groups = grouped(find_runs(options.runs))
    if options.select is not None:
        groups = select(groups, options.select)
    for label, runs in groups.items():
        console.out(f"{label}: {len(runs)} run{'s' * (len(runs) > 1)}")
    names = list(FIGURES if options.gallery else dict.fromkeys(options.figure))
    pictures, left_out = _draw(names, groups, options, ranks, console)
    if left_out and not options.gallery:
        raise NotEnough("; ".join(f"--figure {name}: {why}" for name, why in left_out.items()))
    if options.gallery and ranks.rank == 0:
        command = shlex.join(["awp", "landscape", *arguments])
        _write_gallery(options, groups, command, pictures, left_out, console)
    console.out(f"{time.perf_counter() - start:.0f} s in all")


def _draw(
    names: Sequence[str],
    groups: dict[str, list[Run]],
    options: Options,
    ranks: Job,
    console: Console,
) -> tuple[list[tuple[Drawing, Path]], dict[str, str]]:
    """Draw the figures that the runs allow; returns them, and why others were left out."""
    landscapes = Landscapes(
        options.measuring,
        options.out / "points",
        ranks.device(options.device),
        lambda text: console.print(f"measuring {text}", style="dim"),
    )
    pictures: list[tuple[Drawing, Path]] = []
    left_out: dict[str, str] = {}
    for name in names:
        try:
            drawings = FIGURES[name](groups, landscapes)
        except NotEnough as error:
            left_out[name] = str(error)
            continue
        if ranks.rank == 0:
            pictures += [(d, _write(d, options.out, console)) for d in drawings]
    return pictures, left_out


def _write(drawing: Drawing, out: Path, console: Console) -> Path:
    """Write the picture, its numbers beside it, and its tables on the terminal."""
    file = out / f"{drawing.name}.png"
    drawing.draw(file, drawing.title)
    content = {
        "title": drawing.title,
        "caption": drawing.caption,
        "tables": list(drawing.tables),
        "data": drawing.data,
    }
    write_text(file.with_suffix(".json"), json.dumps(content, indent=1))
    for title, cells in drawing.tables:
        console.out(f"{drawing.title}. {title}.")
        print_table(console, cells)
    console.out(drawing.caption)
    console.out(f"{file}\n")
    return file


def _write_gallery(
    options: Options,
    groups: dict[str, list[Run]],
    command: str,
    pictures: list[tuple[Drawing, Path]],
    left_out: dict[str, str],
    console: Console,
) -> None:
    page = options.out / "index.html"
    about = (
        f"{sum(map(len, groups.values()))} runs: {'; '.join(groups)}. torch {torch.__version__}, "
        f"{torch.device(options.device).type}."
    )
    write_gallery(page, "Weight loss landscapes", about, command, pictures, left_out)
    for name, why in left_out.items():
        console.out(f"left out: {name}: {why}")
    console.out(f"The gallery is {page}.")
