"""What all pictures have in common: size, colours, lines, axes, and how they get to disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from awp_optim._utils.io import atomic_write

__all__ = ["COLOURS", "MARKERS", "band", "by_epoch", "canvas", "coloured", "save", "tidy"]

# Okabe & Ito's colours, told apart by colour-blind readers, without the yellow (too light for a
# line), and a grey. The first four suit panels with several lines of a colour.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

V = TypeVar("V")


def canvas(width: float, height: float) -> Any:
    """An empty figure, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'awp_optim[examples]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path | str, title: str) -> None:
    """Write it as its suffix says, whole or not at all."""
    figure.suptitle(title)
    path = Path(path)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format=path.suffix.removeprefix(".") or "png")


def coloured(labelled: Mapping[str, V], most: int = 4) -> Iterator[tuple[str, tuple[str, V]]]:
    """A colour for each label."""
    if len(labelled) > most:
        raise ValueError(f"at most {most} can be told apart in one panel, got {list(labelled)}")
    return zip(COLOURS, labelled.items(), strict=False)


def band(
    axes: Any, x: Sequence[float] | Any, values: Any, colour: str, label: str, **style: Any
) -> None:
    """The mean over the first axis, and from the lowest to the highest; with one x, a point."""
    style.setdefault("marker", "o" if len(x) == 1 else None)
    axes.plot(x, values.mean(0), color=colour, label=label, **style)
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)


def tidy(axes: Any) -> None:
    """A light grid, and no frame but the axes."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def by_epoch(axes: Any) -> None:
    """Epochs to the right, in whole numbers."""
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    tidy(axes)
