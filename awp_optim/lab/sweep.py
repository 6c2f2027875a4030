"""Many runs, side by side on a machine's cores, kept in a file as they finish."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from awp_optim._utils.io import atomic_write
from awp_optim.lab.config import REMOVED, Config
from awp_optim.lab.progress import step_bars
from awp_optim.lab.run_folder import Row

__all__ = ["Train", "sweep"]

Train = Callable[[Config, Callable[[int, int], None]], list[Row]]
"""A run: gets its settings and a function to tell the steps done and to do, returns its rows."""

MANY = 8
"""With more runs than these the bars of those that wait and those that are over are not shown."""


def sweep(
    configs: Mapping[str, Config],
    train: Train,
    *,
    file: Path | str | None = None,
    about: Mapping[str, Any] | None = None,
    workers: int | None = None,
    console: Any = None,
) -> dict[str, list[Row]]:
    """Train all of them, as many at a time as there are cores. Equal ones are trained once.

    With a file, every finished run is written to it at once, and runs that it has with the same
    settings are not trained again: a sweep that was broken off goes on. Runs with other settings
    that are in the file stay there.

    Args:
        configs: the runs, by a name such as "AT-AWP, seed 1".
        train: trains one. With several workers it is sent to other processes: a function at the top
            level of a module or script, or a ``functools.partial`` of one.
        file: a JSON file, made if needed; None keeps nothing.
        about: what else decides the runs (the data), to be kept with each and compared.
        workers: processes, between which the cores are shared out as threads; None for one a core.
            1 trains one after another in this process, with all of its threads, as suits a GPU.
        console: the ``rich.console.Console`` to draw the progress on; None for one of its own.

    Returns:
        The rows of each run by its name, in the order of ``configs``.

    Raises:
        ImportError: rich is not installed.
        OSError: the file could not be read or written; what it held before is intact.
        RuntimeError: a run failed; the text names it. Those still running are ended, those that had
            finished are in the file.
        ValueError: the file is damaged or something else, or ``workers`` is below 1.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    results = _Results(file, about or {})
    found = {config: results.find(config) for config in configs.values()}
    todo: dict[str, Config] = {}
    for name, config in configs.items():
        if found[config] is None and config not in todo.values():
            todo[name] = config
    # Of all runs, not of those to do: one that goes on rounds as one without a break.
    cores = _cores()
    workers = min(workers or cores, max(1, len(configs)))
    if todo:
        with step_bars(console) as progress:
            bars = _Bars(progress, list(todo), len(found))
            if workers == 1:
                runs = _one_by_one(todo, train, bars.update)
            else:
                runs = _side_by_side(todo, train, workers, max(1, cores // workers), bars.update)
            with closing(runs):
                for name, rows in runs:
                    found[todo[name]] = rows
                    results.add(name, todo[name], rows)
                    bars.finish(name)
    return {name: found[config] or [] for name, config in configs.items()}


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- Running ----------------------------------------------------------------------------------

OnStep = Callable[[str, int, int], None]
Finished = Generator[tuple[str, list[Row]], None, None]


def _one_by_one(todo: Mapping[str, Config], train: Train, on_step: OnStep) -> Finished:
    for name, config in todo.items():
        try:
            rows = train(config, partial(on_step, name))
        except Exception as error:
            raise _failed(name, error) from error
        yield name, rows


def _side_by_side(
    todo: Mapping[str, Config], train: Train, workers: int, threads: int, on_step: OnStep
) -> Finished:
    """The runs as they finish. Leaving it, also by an exception, ends the processes."""
    context = multiprocessing.get_context("spawn")  # neither CUDA nor threads survive a fork
    waiting = iter(todo.items())
    running: dict[Any, str] = {}  # by the pipe to its process
    processes: dict[Any, Any] = {}

    def start_next(pipe: Any) -> None:
        running.pop(pipe, None)
        for name, config in waiting:
            running[pipe] = name
            with suppress(OSError):  # of a process that is dead; to be found when it is heard
                pipe.send(config)
            return

    try:
        for _ in range(min(workers, len(todo))):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, train, threads), daemon=True)
            process.start()
            theirs.close()  # or the end of the process would not end the pipe
            processes[pipe] = process
            start_next(pipe)
        while running:
            heard: list[Any] = wait(list(running))
            for pipe in heard:
                name = running[pipe]
                try:
                    kind, content = pipe.recv()
                except (EOFError, OSError) as error:
                    processes[pipe].join()
                    raise RuntimeError(
                        f"{name!r} failed: its process ended with exit code "
                        f"{processes[pipe].exitcode}. If that is -9, try fewer workers: the memory "
                        "may not suffice"
                    ) from error
                if kind == "step":
                    on_step(name, *content)
                elif kind == "rows":
                    yield name, content
                    start_next(pipe)
                else:
                    text, trace = content
                    raise RuntimeError(f"{name!r} failed: {text}") from Exception(f"\n{trace}")
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


def _work(pipe: Any, train: Train, threads: int) -> None:
    """What a process does: one run after another, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    torch.set_num_threads(threads)
    last = 0.0

    def report(done: int, steps: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == steps or now - last > 0.1:
            last = now
            pipe.send(("step", (done, steps)))

    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            config = pipe.recv()
            try:
                message: Any = "rows", train(config, report)
            except Exception as error:
                message = "error", (_text(error), traceback.format_exc())
            pipe.send(message)


def _failed(name: str, error: Exception) -> RuntimeError:
    return RuntimeError(f"{name!r} failed: {_text(error)}")


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class _Bars:
    """A bar for each run; and, with many, one for all, and those of the runs that run."""

    def __init__(self, progress: Any, names: list[str], runs: int) -> None:
        self.progress = progress
        self.runs = runs  # with those that there are already
        self.many = len(names) > MANY
        self.all = progress.add_task("", total=None, visible=self.many)
        self.bars = {name: progress.add_task(name, visible=not self.many) for name in names}
        self.steps: dict[str, tuple[int, int]] = {}  # done and to do, of those that have begun
        self.finished = runs - len(names)
        self._update_all()

    def update(self, name: str, done: int, steps: int) -> None:
        self.steps[name] = done, steps
        self.progress.update(self.bars[name], completed=done, total=steps, visible=True)
        self._update_all()

    def finish(self, name: str) -> None:
        self.finished += 1
        self.progress.update(self.bars[name], visible=not self.many)
        self._update_all()

    def _update_all(self) -> None:
        steps = self.steps.values()
        # Those that have not begun count as the others on average.
        each = statistics.mean(total for _, total in steps) if steps else 0
        self.progress.update(
            self.all,
            description=f"{self.finished} of {self.runs} runs",
            completed=sum(done for done, _ in steps),
            total=each * len(self.bars) or None,
        )


# --- Keeping ----------------------------------------------------------------------------------


class _Results:
    """The runs in a file: ``{"runs": [{"name": ..., "config": {...}, "rows": [...]}, ...]}``."""

    def __init__(self, file: Path | str | None, about: Mapping[str, Any]) -> None:
        self.file = None if file is None else Path(file)
        self.about = about
        self.runs: list[dict[str, Any]] = []
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)  # an error now, not after an hour
        if self.file.exists():
            try:
                self.runs = list(json.loads(self.file.read_text(encoding="utf-8"))["runs"])
                for run in self.runs:
                    dict(run["config"]), [dict(row) for row in run["rows"]]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.file} is damaged, or no file of a sweep ({_text(error)}): put a copy "
                    "of it back, or remove it to begin again"
                ) from error

    def find(self, config: Config) -> list[Row] | None:
        """The rows of the run with these settings, if there is one."""
        wanted = self._settings(config)
        for run in self.runs:
            # A file may be older than a setting, or have one removed since: both at the default.
            if {**REMOVED, **asdict(Config()), **run["config"]} == {**REMOVED, **wanted}:
                return [dict(row) for row in run["rows"]]
        return None

    def add(self, name: str, config: Config, rows: list[Row]) -> None:
        """Write the file with one run more, as a whole or not at all."""
        if self.file is None:
            return
        self.runs.append({"name": name, "config": self._settings(config), "rows": rows})
        try:
            with atomic_write(self.file) as file:
                file.write(_lines(self.runs).encode())
        except OSError as error:
            raise OSError(
                f"{self.file} could not be written ({error.strerror}). It is as it was, without "
                f"{name!r}: make room, and start the sweep again"
            ) from error

    def _settings(self, config: Config) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(json.dumps({**asdict(config), **self.about}))
        return settings


def _lines(runs: list[dict[str, Any]]) -> str:
    """JSON with a line for each run, which a diff can tell apart."""
    return '{"runs": [\n' + ",\n".join(map(json.dumps, runs)) + "\n]}\n"
