"""A progress bar on a terminal, if rich is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(
    description: str, total: int | None, *, show: bool = True
) -> Iterator[Callable[[str], None]]:
    """Show a progress bar on standard error if that is a terminal and rich is installed.

    Args:
        description: text in front of the bar.
        total: number of steps, or None if it is unknown.
        show: False shows nothing.

    Yields:
        A function that advances the bar by one step and replaces its description.
    """
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        show = False
    if not show or not (console := Console(stderr=True)).is_terminal:
        yield lambda text: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda text: progress.update(task, advance=1, description=text)
