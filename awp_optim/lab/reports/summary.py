"""What is reported of runs: the figures of each, their mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from awp_optim.lab.run_folder import Row, best

__all__ = ["Cells", "Runs", "accuracies", "differences", "markdown", "spread", "summary"]

Runs = Sequence[Sequence[Row]]
"""The rows of one run or more (seeds) with the same settings, evaluated at the same epochs."""
Cells = list[list[str]]
"""A table, row by row; the first holds the columns' names."""


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """The figures of one run, accuracies and their differences in percent.

    Args:
        rows: of its epochs, some of them evaluated; the last must be, as the trainer sees to.

    Returns:
        Natural and robust test accuracy at the best epoch (see
        :func:`~awp_optim.lab.run_folder.best`) and at the last; at the last, robust accuracy on
        training images and the gap, that less robust accuracy on test images.
    """
    last, top = rows[-1], best(list(rows))
    return {
        "natural, best": 100 * top["test_natural_acc"],
        "natural, last": 100 * last["test_natural_acc"],
        "robust, best": 100 * top["test_robust_acc"],
        "robust, last": 100 * last["test_robust_acc"],
        "robust, training set, last": 100 * last["train_robust_acc"],
        "gap, last": 100 * (last["train_robust_acc"] - last["test_robust_acc"]),
    }


def spread(values: Sequence[float], digits: int = 1, *, signed: bool = False) -> str:
    """Mean and sample standard deviation, such as "70.1 ± 1.6"; of one value, the value.

    Args:
        values: one or more.
        digits: after the point.
        signed: give a mean that is not negative a plus.
    """
    mean = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def accuracies(runs: Mapping[str, Runs]) -> Cells:
    """A table of the figures of runs: their names, then a row for each label.

    Args:
        runs: by label the rows of one run or more (seeds).
    """
    figures = {label: [summary(rows) for rows in seeds] for label, seeds in runs.items()}
    return _cells(figures, signed=False)


def differences(runs: Mapping[str, Runs], compared_with: Mapping[str, str]) -> Cells:
    """A table of differences seed by seed, which the spread between seeds does not blur.

    Args:
        runs: by label the rows of runs, with the same seeds in the same order.
        compared_with: by label, the label to subtract.
    """
    figures = {label: [summary(rows) for rows in seeds] for label, seeds in runs.items()}
    less = {
        f"{label} less {other}": [
            {name: a[name] - b[name] for name in a}
            for a, b in zip(figures[label], figures[other], strict=True)
        ]
        for label, other in compared_with.items()
    }
    return _cells(less, signed=True)


def _cells(figures: Mapping[str, Sequence[Mapping[str, float]]], signed: bool) -> Cells:
    names = list(next(iter(figures.values()))[0])
    return [["", *names]] + [
        [label, *(spread([run[name] for run in seeds], signed=signed) for name in names)]
        for label, seeds in figures.items()
    ]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, numbers to the right; the first row is the head."""
    head, *rows = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, "|---" + "|---:" * (len(cells[0]) - 1) + "|", *rows])
