"""Progress bars of the examples."""

from __future__ import annotations

from typing import Any

__all__ = ["step_bars"]


def step_bars(console: Any = None) -> Any:
    """A ``rich.progress.Progress`` of training steps: a bar, steps done and to do, time left.

    Args:
        console: the ``rich.console.Console`` to draw on; None for one of its own.

    Raises:
        ImportError: rich is not installed.
    """
    try:
        from rich import progress
    except ImportError as error:
        raise ImportError("progress needs rich: pip install 'awp_optim[examples]'") from error
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("steps"),
        progress.TimeRemainingColumn(),
        console=console,
    )
