"""Results of the benchmarks as Markdown tables.

``python -m benchmarks.report FILE.json ...`` prints what ``pytest benchmarks
--benchmark-json=FILE.json`` and the questions of :mod:`benchmarks.gpu` wrote.
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

from benchmarks.steps import EXACT, REFERENCE_AWP

Row = dict[str, Any]


def read(path: Path | str) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a result file, and what they were measured with.

    Raises:
        ValueError: the file was not written by the suites or by a question, or in quick mode.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if "question" in content:
            return _gpu_rows(content), content["environment"]
        rows = [b["extra_info"] for b in content["benchmarks"] if "suite" in b["extra_info"]]
        return rows, content["machine_info"]
    except (ValueError, KeyError, TypeError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} cannot be reported: {reason}") from error


def _gpu_rows(content: dict[str, Any]) -> list[Row]:
    if content["quick"]:
        raise ValueError("it was written in quick mode")
    title = content["question"]
    if content["status"] != "complete":
        title += f" ({content['status']})"
    return [{"suite": "gpu", "comparison": title, **f} for f in content["figures"]]


def markdown(rows: Sequence[Row]) -> str:
    """All rows, a table for each comparison."""
    tables = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        mine = [row for row in rows if row["suite"] == suite]
        if suite == "weights":
            tables.append(_weights(mine))
        else:
            show = {"memory": _memory, "gpu": figures_table}.get(suite, _times)
            tables += [f"**{g[0]['comparison']}**\n\n{show(g)}" for g in _by(mine, "comparison")]
    return "\n\n".join(tables)


def about(info: dict[str, Any]) -> str:
    """One line that says what the figures were measured with."""
    threads = "1 thread" if info["threads"] == 1 else f"{info['threads']} threads"
    return (
        f"{info['device']}, {threads}, torch {info['torch']}, Python {info['python']}; commit "
        f"{info['commit'] or 'unknown'}, {info['date'][:10]}; `{info['command']}`"
    )


def markdown_table(columns: dict[str, Callable[[Row], str]], rows: Iterable[Row]) -> str:
    """A Markdown table; the first column is aligned left, the others right.

    Args:
        columns: for each heading, what gives the cell of a row.
        rows: one for each line.
    """
    cells = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _times(rows: list[Row]) -> str:
    """Medians and ratios, and the accuracies where there are any."""
    columns: dict[str, Callable[[Row], str]] = {
        "": lambda row: row["contestant"],
        "median": lambda row: duration(row["median"]),
        f"ratio to {rows[0]['base']}": _ratio,
    }
    for name in ("natural_accuracy", "robust_accuracy", "pixels_as_ours"):
        if name in rows[0]:
            columns[name.replace("_", " ")] = partial(_percent, name)
    return "\n\n".join([markdown_table(columns, rows), *_speedup(rows)])


def _speedup(rows: list[Row]) -> list[str]:
    """A line that compares the paper's step with the plain implementation of it."""
    seconds = {row["contestant"]: row["seconds"] for row in rows}
    if not {EXACT, REFERENCE_AWP} <= seconds.keys():
        return []
    ratio = statistics.median(seconds[REFERENCE_AWP]) / statistics.median(seconds[EXACT])
    return [f"{EXACT} is {ratio:.2f} times as fast as {REFERENCE_AWP}."]


def _memory(rows: list[Row]) -> str:
    return markdown_table(
        {
            "": lambda row: row["contestant"],
            "peak": lambda row: f"{row['peak_bytes'] / 1e6:.1f} MB",
            "over its AT": lambda row: f"{row['over_base_bytes'] / 1e6:.1f} MB",
            "the same, in bytes of the perturbed parameters": lambda row: (
                f"{row['over_base_in_parameters']:.3f}"
            ),
        },
        rows,
    )


def figures_table(rows: list[Row]) -> str:
    """Figures of a GPU question, with their targets."""

    def value(row: Row) -> str:
        return (
            f"{row['value']:.4g}" if isinstance(row["value"], (int, float)) else str(row["value"])
        )

    return markdown_table(
        {
            "case": lambda row: row["case"],
            "figure": lambda row: row["name"],
            "value": value,
            "target": lambda row: row["target"] or "",
            "met": lambda row: {None: "", True: "yes", False: "no"}[row["met"]],
        },
        rows,
    )


def _weights(rows: list[Row]) -> str:
    """A line for each size and base optimizer."""
    rows = sorted(rows, key=lambda row: (row["optimizer"], row["parameters"], row["tensors"]))
    groups = [{row["contestant"]: row for row in group} for group in _by(rows, "comparison")]
    lines = [next(iter(group.values())) | {"all": group} for group in groups]

    def time(name: str, line: Row) -> str:
        row = line["all"].get(name)
        if row is None:
            return ""
        ratio = f" (x {row['ratio']:.2f})" if name.startswith("first_step") else ""
        return duration(row["median"]) + ratio

    names = dict.fromkeys(name for group in groups for name in group)
    return markdown_table(
        {
            "parameters": lambda line: f"{line['parameters']:,}",
            "tensors": lambda line: f"{line['tensors']:,}",
            "optimizer": lambda line: line["optimizer"],
            **{name: partial(time, name) for name in names},
            "share of a copy's bandwidth": lambda line: f"{100 * line['bandwidth_fraction']:.0f}%",
        },
        lines,
    )


def _by(rows: Iterable[Row], key: str) -> list[list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return list(groups.values())


def _percent(name: str, row: Row) -> str:
    return f"{100 * row[name]:.1f}%"


def _ratio(row: Row) -> str:
    low, high = row["ratio_quartiles"]
    if row["contestant"] == row["base"]:
        return "1"
    spread = f" ({low:.2f} to {high:.2f})" if len(row["seconds"]) > 1 else ""
    return f"{row['ratio']:.3f}{spread}"


def duration(seconds: float) -> str:
    """A time with its unit, in three significant digits."""
    units = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
    unit = next((u for u, size in units.items() if seconds >= size), "µs")
    value = seconds / units[unit]
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files")
    args = parser.parse_args(argv)
    runs: dict[str, list[Row]] = {}  # by what they were measured with
    try:
        for path in args.results:
            rows, info = read(path)
            runs.setdefault(about(info), []).extend(rows)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(f"{markdown(rows)}\n\n{info}" for info, rows in runs.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
