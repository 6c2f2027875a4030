"""Accuracies of runs as tables: for each setting, the mean and the spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from awp_optim.lab.run_folder import Row, best, reported

__all__ = [
    "Cells",
    "Runs",
    "accuracies",
    "differences",
    "markdown",
    "spread",
    "summary",
    "values_of",
]

Runs = Sequence[Sequence[Row]]
"""The rows of several runs (seeds) with the same settings, evaluated at the same epochs."""
Cells = list[list[str]]
"""A table, row by row; the first row holds the names of the columns."""


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """The accuracies of one run, and their differences, in percent.

    Args:
        rows: of the run's epochs, the last of which must have been evaluated.

    Returns:
        Natural and robust test accuracy at the best epoch (see
        :func:`~awp_optim.lab.run_folder.best`) and at the last; robust accuracy on training images
        at the last epoch, and the gap between training and test images there. All of them are those
        of the averaged weights, if the run has some.
    """
    last, top = reported(rows[-1]), reported(best(list(rows)))
    return {
        "natural, best": 100 * top["test_natural_acc"],
        "natural, last": 100 * last["test_natural_acc"],
        "robust, best": 100 * top["test_robust_acc"],
        "robust, last": 100 * last["test_robust_acc"],
        "robust, training set, last": 100 * last["train_robust_acc"],
        "gap, last": 100 * (last["train_robust_acc"] - last["test_robust_acc"]),
    }


def values_of(runs: Runs, name: str) -> list[float]:
    """One of the values of :func:`summary`, for each run."""
    return [summary(rows)[name] for rows in runs]


def spread(values: Sequence[float], digits: int = 1, *, signed: bool = False) -> str:
    """Mean and sample standard deviation, such as "70.1 ± 1.6"; for one value, the value.

    Args:
        values: one or more.
        digits: after the point.
        signed: whether a positive mean gets a plus.
    """
    mean = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def accuracies(runs: Mapping[str, Runs]) -> Cells:
    """A table of :func:`summary`, a row for each label.

    Args:
        runs: by label.
    """
    return _table({label: [summary(rows) for rows in seeds] for label, seeds in runs.items()})


def differences(runs: Mapping[str, Runs], compared_with: Mapping[str, str]) -> Cells:
    """A table of differences between two labels, mean and spread of the differences of each seed.

    The variation from seed to seed that both labels share cancels.

    Args:
        runs: by label, with the same seeds in the same order.
        compared_with: by label, the label to subtract.
    """
    pairs = {
        f"{label} minus {other}": zip(runs[label], runs[other], strict=True)
        for label, other in compared_with.items()
    }
    subtracted = {
        name: [_subtract(summary(rows), summary(others)) for rows, others in seeds]
        for name, seeds in pairs.items()
    }
    return _table(subtracted, signed=True)


def _subtract(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: a[name] - b[name] for name in a}


def _table(
    summaries: Mapping[str, Sequence[Mapping[str, float]]], *, signed: bool = False
) -> Cells:
    names = list(next(iter(summaries.values()))[0])
    rows = [
        [label, *(spread([run[name] for run in seeds], signed=signed) for name in names)]
        for label, seeds in summaries.items()
    ]
    return [["", *names], *rows]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, with the first row as its head and numbers aligned to the right."""
    head, *rows = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, "|---" + "|---:" * (len(cells[0]) - 1) + "|", *rows])
