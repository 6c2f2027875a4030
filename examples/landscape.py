"""Weight loss landscapes of run folders: the paper's Figures 1 to 8 and 11, a command each.

    python examples/landscape.py runs/at runs/at-awp --figure methods
    python examples/landscape.py runs/at --figure epochs --figure surface --limit 1000
    python examples/landscape.py runs --gallery --limit 1000
    torchrun --nproc-per-node 8 examples/landscape.py runs --gallery

Runs are what examples/cifar10.py --out, examples/quickstart.py --runs and examples/compare.py --out
leave; those that differ in the seed alone are drawn as one. Every point is on disk as soon as it is
done: after Ctrl-C or a kill the same command goes on, and with more alphas or directions only the
new points are computed. Under torchrun the points are shared out over the processes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from awp_optim._utils.io import atomic_write
from awp_optim.lab.job import Job, job
from awp_optim.lab.reports.figures import FIGURES, Drawing
from awp_optim.lab.reports.gallery import Picture, write_gallery
from awp_optim.lab.reports.landscapes import Landscapes, Measuring
from awp_optim.lab.reports.runs import NotEnough, find_runs, grouped, select

GAMMAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 0.6, 1.0)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    figures = "\n".join(f"  {name:12}{(f.__doc__ or '').strip()}" for name, f in FIGURES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nfigures:\n{figures}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run folders, or folders of them")
    add("--figure", choices=FIGURES, action="append", metavar="NAME", help="see above; repeatable")
    add("--gallery", action="store_true", help="all that the runs allow, and index.html")
    add("--select", metavar="REGEX", help="of the settings found, those whose label matches")
    add("--out", type=Path, default=Path("landscapes"), help="folder (%(default)s)")

    add("--reach", type=float, default=1.0, help="alphas go from -REACH to REACH (%(default)s)")
    add("--points", type=int, default=21, help="alphas on a curve, an odd number (%(default)s)")
    add("--grid", type=int, default=11, help="alphas on a side of a surface, odd (%(default)s)")
    add("--directions", type=int, default=3, help="random directions of a curve (%(default)s)")
    add("--at", type=float, help="alpha at which curves are compared in numbers (REACH / 2)")
    add("--gammas", type=float, nargs="+", default=GAMMAS, help="of --figure perturbed")
    add("--limit", type=int, help="training images at the most (all); their error is shown")
    add("--steps", type=int, help="of the attack (as many as in training)")
    add("--recompute-bn", action="store_true", help="BatchNorm's statistics anew at each point")
    add("--batch-size", type=int, default=128, help="(%(default)s)")
    add("--seed", type=int, default=0, help="of directions and attacks (%(default)s)")
    add("--data-dir", type=Path, default=Path("data"), help="of the images (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    args = parser.parse_args(argv)
    if bool(args.figure) == args.gallery:
        parser.error("give --figure NAME, or --gallery")
    for name in ("points", "grid", "directions", "limit", "steps", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    for name in ("points", "grid"):
        if getattr(args, name) < 3 or getattr(args, name) % 2 == 0:
            parser.error(f"--{name} must be an odd number, 3 or more, so that 0 is one of them")
    if not 0 < args.reach < float("inf"):
        parser.error(f"--reach must be above 0, not {args.reach:g}")
    args.at = args.reach / 2 if args.at is None else args.at
    if not 0 < args.at <= args.reach:
        parser.error(f"--at must be above 0 and within --reach, not {args.at:g}")
    if any(not 0 < gamma < float("inf") for gamma in args.gammas):
        parser.error("--gammas must be above 0")
    return args


def measuring(args: argparse.Namespace, ranks: Job) -> Measuring:
    def axis(count: int) -> tuple[float, ...]:
        return tuple(np.linspace(-args.reach, args.reach, count).round(12).tolist())

    return Measuring(
        alphas=axis(args.points),
        grid=axis(args.grid),
        gammas=tuple(sorted(args.gammas)),
        directions=args.directions,
        at=args.at,
        limit=args.limit,
        steps=args.steps,
        batch_size=args.batch_size,
        recompute_bn=args.recompute_bn,
        seed=args.seed,
        device=ranks.device(args.device),
        data_dir=args.data_dir,
    )


def draw(args: argparse.Namespace, console: Console, ranks: Job) -> None:
    start = time.perf_counter()
    groups = grouped(find_runs(args.runs))
    for label, runs in groups.items():
        console.print(f"{label}: {len(runs)} run{'s'[: len(runs) > 1]}", highlight=False)
    if args.select:
        groups = select(groups, args.select)
    landscapes = Landscapes(
        measuring(args, ranks),
        args.out / "points",
        lambda text: console.print(f"measuring {text}", style="dim", highlight=False),
    )
    pictures: list[Picture] = []
    left_out: list[tuple[str, str]] = []
    for name in FIGURES if args.gallery else dict.fromkeys(args.figure):
        try:
            drawings = FIGURES[name](groups, landscapes)
        except NotEnough as error:
            if not args.gallery:
                raise NotEnough(f"--figure {name}: {error}") from error
            left_out.append((name, str(error)))
            continue
        if ranks.rank == 0:
            pictures += [write(drawing, args.out, console) for drawing in drawings]
    if ranks.rank == 0 and args.gallery:
        command = shlex.join(["python", "examples/landscape.py", *sys.argv[1:]])
        page = args.out / "index.html"
        about = (
            f"Of {sum(map(len, groups.values()))} runs: {'; '.join(groups)}. torch"
            f" {torch.__version__}, {torch.device(args.device).type}."
        )
        write_gallery(page, "Weight loss landscapes", about, command, pictures, left_out)
        for name, why in left_out:
            console.print(f"left out: {name}: {why}", highlight=False, soft_wrap=True)
        console.print(f"The gallery is {page}.", highlight=False, soft_wrap=True)
    console.print(f"{time.perf_counter() - start:.0f} s in all", highlight=False)


def write(drawing: Drawing, out: Path, console: Console) -> Picture:
    """The picture, and its numbers beside it; the tables on the terminal, too."""
    file = out / f"{drawing.name}.png"
    drawing.draw(file, drawing.title)
    content = {"title": drawing.title, "caption": drawing.caption}
    content |= {"tables": list(drawing.tables), "data": drawing.data}
    with atomic_write(file.with_suffix(".json")) as numbers:
        numbers.write(json.dumps(content, indent=1).encode())
    for title, (head, *rows) in drawing.tables:
        console.print(f"{drawing.title}. {title}.", highlight=False, soft_wrap=True)
        table = Table()
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(drawing.caption, highlight=False, soft_wrap=True)
    console.print(f"{file}\n", highlight=False, soft_wrap=True)
    return Picture(drawing.title, drawing.caption, file, drawing.tables)


def main(argv: Sequence[str] | None = None) -> None:
    with job() as ranks:
        args = parse_args(argv)
        console = Console(width=None if sys.stdout.isatty() else 130, quiet=ranks.rank > 0)
        try:
            draw(args, console, ranks)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
