"""A progress bar on a terminal, where rich is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(
    show: bool, description: str, total: int | None
) -> Iterator[Callable[[str], None]]:
    """A bar on the standard error; nothing where that is no terminal, or without rich.

    Args:
        show: whether to show it at all.
        description: what stands before the bar.
        total: steps to do, or None if nobody knows.

    Yields:
        A function that moves the bar on by a step and changes its description.
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
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip
    with progress:
        task = progress.add_task(description, total=total)
        yield lambda text: progress.update(task, advance=1, description=text)
