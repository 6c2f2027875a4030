"""Progress bars of training runs."""

from __future__ import annotations

import statistics

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
    """A bar for each run that is running, below one for all of them.

    Args:
        progress: the display.
        todo: how many runs there are to do.
        runs: how many there are, including those done before.

    Attributes:
        running: the runs that have begun and have not finished.
    """

    def __init__(self, progress: Progress, todo: int, runs: int) -> None:
        self._progress, self._todo, self._runs = progress, todo, runs
        self._finished = runs - todo
        self._all = progress.add_task("", total=None)
        self._bars: dict[str, TaskID] = {}
        self._steps: dict[str, tuple[int, int]] = {}  # done and to do, of those that have begun
        self._update_all()

    @property
    def running(self) -> list[str]:
        return list(self._bars)

    def update(self, name: str, done: int, steps: int) -> None:
        """Show how far a run is; ``steps`` is 0 as long as it is not known."""
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name)
        if steps:
            self._steps[name] = done, steps
        self._progress.update(self._bars[name], completed=done, total=steps or None)
        self._update_all()

    def finish(self, name: str) -> None:
        """Count a run as finished, and remove its bar."""
        self._finished += 1
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name))
        self._update_all()

    def _update_all(self) -> None:
        steps = self._steps.values()
        # A run that has not begun is taken to have as many steps as the others on average.
        each = statistics.mean(total for _, total in steps) if steps else 0
        self._progress.update(
            self._all,
            description=f"{self._finished} of {self._runs} runs",
            completed=sum(done for done, _ in steps),
            total=each * self._todo or None,
        )
