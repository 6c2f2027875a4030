"""Progress bars of training runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

__all__ = ["StepBar", "SweepBars", "step_bars"]

MANY = 8
"""With more runs than these, the bars of those that wait and of those that are over are hidden."""


def step_bars(console: Console | None = None) -> Progress:
    """A display of training steps: a bar, steps done and to do, time left.

    Args:
        console: where to draw; None for the standard output.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),  # brackets in a run's name are no markup
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
        console=console,
    )


class StepBar:
    """A bar for one run, from its first step on: one that fails before that leaves no trace.

    Args:
        progress: the display.
        name: of the run.
    """

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name
        self._bar: TaskID | None = None

    def __call__(self, done: int, steps: int) -> None:
        if self._bar is None:
            self._bar = self._progress.add_task(self._name)
        self._progress.update(self._bar, completed=done, total=steps)


class SweepBars:
    """A bar for each run; with many runs, a bar for all and those of the runs that are running.

    Args:
        progress: the display.
        names: of the runs to do.
        runs: how many there are with those done before.

    Attributes:
        running: the runs that have begun and have not finished.
    """

    def __init__(self, progress: Progress, names: Iterable[str], runs: int) -> None:
        names = list(names)
        self._progress = progress
        self._runs = runs
        self._finished = runs - len(names)
        self._many = len(names) > MANY
        self._all = progress.add_task("", total=None, visible=self._many)
        self._bars = {
            name: progress.add_task(name, total=None, visible=not self._many) for name in names
        }
        self._steps: dict[str, tuple[int, int]] = {}  # done and to do, of those that have begun
        self.running: list[str] = []
        self._update_all()

    def update(self, name: str, done: int, steps: int) -> None:
        """Show how far a run is; ``steps`` is 0 as long as it is not known."""
        if name not in self.running:
            self.running.append(name)
        if steps:
            self._steps[name] = done, steps
        self._progress.update(self._bars[name], completed=done, total=steps or None, visible=True)
        self._update_all()

    def finish(self, name: str) -> None:
        """Count a run as finished."""
        self._finished += 1
        if name in self.running:
            self.running.remove(name)
        self._progress.update(self._bars[name], visible=not self._many)
        self._update_all()

    def _update_all(self) -> None:
        steps = self._steps.values()
        # Runs that have not begun count as the others on average.
        each = statistics.mean(total for _, total in steps) if steps else 0
        self._progress.update(
            self._all,
            description=f"{self._finished} of {self._runs} runs",
            completed=sum(done for done, _ in steps),
            total=each * len(self._bars) or None,
        )
