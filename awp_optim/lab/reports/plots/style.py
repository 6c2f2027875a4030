"""The style that all plots share, and the pieces that several of them draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from awp_optim._utils.io import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DASHED",
    "MARKERS",
    "MAX_LABELS",
    "MAX_PAIRS",
    "Array",
    "band",
    "by_epoch",
    "error_bars",
    "mean_and_deviation",
    "note",
    "picture",
    "with_colors",
]

Array = np.ndarray[Any, Any]
V = TypeVar("V")

STYLE_SHEET = Path(__file__).with_name("paper.mplstyle")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MAX_LABELS = 8
"""How many labels a reader can tell apart in one panel; their colors are "C0" to "C7"."""
MAX_PAIRS = 4
"""The same where each label has two lines, a solid and a dashed one."""
DASHED: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white"}
"""The second line of a pair; the first has filled markers."""


@contextmanager
def picture(path: Path | str, title: str, width: float, height: float) -> Iterator[Figure]:
    """A figure of a size in inches, written to a file when the block ends without an exception.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    path = Path(path)
    with style.context(STYLE_SHEET):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.suptitle(title)
        with atomic_write(path) as file:
            figure.savefig(file, format=path.suffix.removeprefix(".") or "png")


def with_colors(labeled: Mapping[str, V], most: int = MAX_LABELS) -> Iterator[tuple[str, str, V]]:
    """A color, the label and the value, for each label.

    Raises:
        ValueError: there are more than ``most`` labels.
    """
    if len(labeled) > most:
        raise ValueError(f"a panel shows at most {most} labels, got {list(labeled)}")
    return ((f"C{i}", label, value) for i, (label, value) in enumerate(labeled.items()))


def band(
    axes: Axes, x: Sequence[float] | Array, values: Array, color: Any, label: str, **line: Any
) -> None:
    """A line through the means over the first axis, in a band from the minimum to the maximum."""
    line.setdefault("marker", "o" if len(x) == 1 else None)  # a line of one point shows nothing
    axes.plot(x, values.mean(0), color=color, label=label, **line)
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)


def error_bars(
    axes: Axes, x: Sequence[float], samples: Sequence[Sequence[float]], **line: Any
) -> None:
    """A point at the mean of each sample, with its standard deviation if it has several values."""
    means, deviations = zip(*map(mean_and_deviation, samples), strict=True)
    axes.errorbar(x, means, deviations if any(deviations) else None, **line)


def mean_and_deviation(sample: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation, which is 0 for a single value."""
    return float(np.mean(sample)), float(np.std(sample, ddof=1)) if len(sample) > 1 else 0.0


def by_epoch(axes: Axes) -> None:
    """Epochs on the x axis, labeled at integers."""
    axes.set_xlabel("epoch")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def note(axes: Axes, text: str) -> None:
    """Text in the middle of a panel that has nothing to show."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.4")
