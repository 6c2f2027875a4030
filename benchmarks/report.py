"""Results of the benchmarks as Markdown tables and a picture of a step's phases.

``python -m benchmarks.report RESULTS.json ... --out benchmarks/results/cpu --readme README.md``
reads what ``pytest benchmarks --benchmark-json=RESULTS.json`` and ``benchmarks.accelerator`` wrote.
The tables are printed and, with ``--readme``, written between the two marker lines of that file.
``step.png``, where steps were timed phase by phase, goes to the folder ``--out``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Row = dict[str, Any]

EXACT, REFERENCE = "AT-AWP exact", "reference AT-AWP"  # as in benchmarks/suites.py
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
# Okabe and Ito's palette: told apart by the colour-blind, too.
PHASES = {"attack": "#0072B2", "ascent": "#E69F00", "descent": "#56B4E9", "update": "#000000"}


def read(path: Path | str) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one result file, and what they were measured with.

    Raises:
        ValueError: the file is not one that the suites or the accelerator run wrote; or it is of
            a quick run, which measures nothing.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if "item" in content:
            if content["quick"]:
                raise ValueError("the figures of a quick run are void")
            rows, info = _accelerator_rows(content), content["environment"]
        else:
            rows = [b["extra_info"] for b in content["benchmarks"] if "suite" in b["extra_info"]]
            info = content["machine_info"]
    except (ValueError, KeyError, TypeError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} cannot be reported: {reason}") from error
    if not rows:
        raise ValueError(f"{path} holds no results")
    return rows, info


def _accelerator_rows(content: dict[str, Any]) -> list[Row]:
    title = f"accelerator: {content['item']}"
    if content["status"] != "complete":
        title += f" ({content['status']})"
    return [{"suite": "accelerator", "comparison": title, **f} for f in content["figures"]]


# ------------------------------------------------------------------------- tables


def markdown(rows: Sequence[Row]) -> str:
    """All rows as Markdown, a table for each comparison."""
    tables = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        mine = [row for row in rows if row["suite"] == suite]
        if suite == "weights":
            tables.append(_weights(mine))
        else:
            of = {"memory": _memory, "accelerator": _figures}.get(suite, _times)
            tables += [of(group) for group in _by(mine, "comparison")]
    return "\n\n".join(tables)


def _times(rows: list[Row]) -> str:
    """Medians and ratios; then the phases or the accuracies, where there are any."""
    columns: dict[str, Callable[[Row], str]] = {
        "": lambda row: row["contestant"],
        "median": lambda row: _duration(row["median"]),
        f"ratio to {rows[0]['base']}": _ratio,
    }
    if "phases" in rows[0]:
        columns |= {phase: partial(_phase, phase) for phase in PHASES}
    for name in ("natural_accuracy", "robust_accuracy", "pixels_as_ours"):
        if name in rows[0]:
            columns[name.replace("_", " ")] = partial(_percent, name)
    return "\n\n".join([_title(rows[0]), _table(columns, rows), *_speedup(rows)])


def _speedup(rows: list[Row]) -> list[str]:
    """A line on the step that is the paper's, against the plain implementation of the same."""
    times = {row["contestant"]: row["seconds"] for row in rows}
    if not {EXACT, REFERENCE} <= times.keys():
        return []
    times_as_fast = statistics.median(times[REFERENCE]) / statistics.median(times[EXACT])
    return [f"{EXACT} is {times_as_fast:.2f} times as fast as {REFERENCE}."]


def _memory(rows: list[Row]) -> str:
    table = _table(
        {
            "": lambda row: row["contestant"],
            "peak": lambda row: _size(row["peak_bytes"]),
            "over its AT": lambda row: _size(row["over_base_bytes"]),
            "the same, in bytes of the perturbed parameters": lambda row: (
                f"{row['over_base_in_parameters']:.3f}"
            ),
        },
        rows,
    )
    return f"{_title(rows[0])}\n\n{table}"


def _figures(rows: list[Row]) -> str:
    """Figures of the accelerator run, with their targets."""

    def value(row: Row) -> str:
        is_number = isinstance(row["value"], (int, float))
        return f"{row['value']:.4g}" if is_number else str(row["value"])

    table = _table(
        {
            "": lambda row: row["name"],
            "value": value,
            "target": lambda row: row["target"] or "",
            "met": lambda row: {None: "", True: "yes", False: "no"}[row["met"]],
        },
        rows,
    )
    return f"{_title(rows[0])}\n\n{table}"


def _weights(rows: list[Row]) -> str:
    """A line for each size and base optimizer."""
    rows = sorted(rows, key=lambda row: (row["optimizer"], row["parameters"], row["tensors"]))
    groups = [{row["contestant"]: row for row in group} for group in _by(rows, "comparison")]
    lines = [next(iter(group.values())) | {"all": group} for group in groups]

    def time(name: str) -> Callable[[Row], str]:
        def cell(line: Row) -> str:
            row = line["all"].get(name)
            if row is None:
                return ""
            return _duration(row["median"]) + (
                f" (x {row['ratio']:.2f})" if name.startswith("first_step") else ""
            )

        return cell

    times = dict.fromkeys(name for group in groups for name in group)
    return _table(
        {
            "parameters": lambda line: f"{line['parameters']:,}",
            "tensors": lambda line: f"{line['tensors']:,}",
            "optimizer": lambda line: line["optimizer"],
            **{name: time(name) for name in times},
            "share of a copy's bandwidth": lambda line: f"{100 * line['bandwidth_fraction']:.0f}%",
        },
        lines,
    )


def about(info: dict[str, Any]) -> str:
    """One line that says what the figures were measured with."""
    threads = "1 thread" if info["threads"] == 1 else f"{info['threads']} threads"
    return (
        f"{info['device']}, {threads}, torch {info['torch']}, Python {info['python']}; commit "
        f"{info['commit'] or 'unknown'}, {info['date'][:10]}; `{info['command']}`"
    )


def _table(columns: dict[str, Callable[[Row], str]], rows: Iterable[Row]) -> str:
    cells = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _by(rows: Iterable[Row], key: str) -> list[list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return list(groups.values())


def _title(row: Row) -> str:
    return f"**{row['comparison']}**"


def _phase(name: str, row: Row) -> str:
    return _duration(row["phases"][name])


def _percent(name: str, row: Row) -> str:
    return f"{100 * row[name]:.1f}%"


def _ratio(row: Row) -> str:
    low, high = row["ratio_quartiles"]
    if row["contestant"] == row["base"]:
        return "1"
    spread = f" ({low:.2f} to {high:.2f})" if len(row["seconds"]) > 1 else ""
    return f"{row['ratio']:.3f}{spread}"


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 1e-6)} µs" if seconds else "-"


def _size(n: float) -> str:
    return f"{n / 1e6:.1f} MB"


def _digits(value: float) -> str:
    """Three significant digits, and no power of ten."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


# ------------------------------------------------------------------------- README and picture


def write_readme(path: Path | str, text: str) -> None:
    """Put ``text`` between the two marker lines, in place of what is there.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    content = Path(path).read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ValueError(f"{path} needs the lines {BEGIN} and {END}, once each, to write between")
    before, rest = content.split(BEGIN)
    if END not in rest:
        raise ValueError(f"{path} has {END} before {BEGIN}")
    after = rest.split(END)[1]
    Path(path).write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def draw(rows: Sequence[Row], path: Path | str) -> None:
    """Stacked bars, one for each contestant whose phases were timed; a panel for each comparison.

    Args:
        rows: those without phases are left out; there must be some with.
        path: the PNG file.
    """
    from matplotlib.figure import Figure

    panels = _by([row for row in rows if "phases" in row], "comparison")
    height = sum(0.42 * len(panel) + 1.3 for panel in panels)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(
        len(panels), 1, squeeze=False, height_ratios=[len(panel) + 1 for panel in panels]
    )
    for ax, panel in zip(axes[:, 0], panels, strict=True):
        totals = {row["contestant"]: sum(row["phases"].values()) for row in panel}
        base = totals.get(panel[0]["base"])
        names = list(totals)
        left = [0.0] * len(panel)
        for phase, colour in PHASES.items():
            widths = [row["phases"].get(phase, 0.0) for row in panel]
            ax.barh(names, widths, left=left, color=colour, label=phase, height=0.7)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for name, total in totals.items():
            ratio = f"   x {total / base:.2f}" if base else ""
            ax.text(total, name, f" {_duration(total)}{ratio}", va="center", fontsize=9)
        ax.set_xlim(0, max(left) * 1.22)
        ax.invert_yaxis()
        ax.set_title(panel[0]["comparison"], fontsize=11, loc="left")
        ax.set_xlabel("seconds a step")
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PHASES), frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of pytest-benchmark")
    parser.add_argument("--out", type=Path, required=True, help="folder for step.png")
    parser.add_argument("--readme", type=Path, help="file to write the tables into")
    args = parser.parse_args(argv)
    try:
        runs: dict[str, list[Row]] = {}  # by what they were measured with
        for path in args.results:
            found, info = read(path)
            runs.setdefault(about(info), []).extend(found)
        text = "\n\n".join(f"{markdown(found)}\n\n{info}" for info, found in runs.items())
        rows = [row for found in runs.values() for row in found]
        if args.readme:
            write_readme(args.readme, text)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))
    if any("phases" in row for row in rows):
        draw(rows, args.out / "step.png")
        print(f"{args.out / 'step.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
