"""Many runs, on an executor of ``concurrent.futures``, kept in a file as they finish."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from awp_optim._utils.io import atomic_write
from awp_optim.lab.config import Config
from awp_optim.lab.progress import SweepBars, step_bars
from awp_optim.lab.run_folder import Row

__all__ = ["RunFailed", "Train", "sweep"]

Report = Callable[[int, int], None]
Train = Callable[[Config, Report], list[Row]]
"""A run: gets its settings and a function to report the steps done and to do, returns its rows."""

Finish = Callable[[str, list[Row]], None]

POLL = 0.05
"""Seconds between two looks at the runs, and between two reports of a run."""


def sweep(
    configs: Mapping[str, Config],
    train: Train,
    *,
    file: Path | str | None = None,
    about: Mapping[str, Any] | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    console: Console | None = None,
) -> dict[str, list[Row]]:
    """Train all of them, by default as many at a time as there are cores. Equal runs are one.

    With a file, every finished run is written to it at once, and a run that it holds is not trained
    again: an interrupted sweep continues. Runs with other settings in the file stay there.

    Args:
        configs: the runs, by a name such as "AT-AWP, seed 1".
        train: trains one. Unless it runs in this process it is pickled: a function at the top level
            of a module or script, or a ``functools.partial`` of one.
        file: a JSON file, made if needed; None keeps nothing.
        about: what else decides the runs (the data), kept with each and compared.
        workers: processes of this machine, which share its cores as threads; None for one a core.
            1 trains one run after another in this process with all its threads, as suits a GPU.
        executor: trains the runs instead, on whatever machines it has: dask's
            ``Client(...).get_executor()``, ``mpi4py.futures``, submitit, loky. Its workers must do
            one run at a time each (torch's random state belongs to a process). It is not shut down.
        console: where to draw the progress; None for the standard output.

    Returns:
        The rows of each run by its name, in the order of ``configs``.

    Raises:
        OSError: the file could not be read or written; what it held before is intact.
        RunFailed: a run failed; the text names it. Runs that had finished are in the file, those
            that had not are ended, or cancelled on an executor of the caller.
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
    # By the number of all runs: one that is resumed with fewer rounds alike.
    workers = min(workers or _cores(), max(1, len(configs)))
    with step_bars(console) as progress:
        bars = SweepBars(progress, todo, len(found))

        def finish(name: str, rows: list[Row]) -> None:
            found[todo[name]] = rows
            results.add(name, todo[name], rows)
            bars.finish(name)

        if executor is not None:
            _submit(executor, todo, train, finish)
        elif workers == 1:
            for name, config in todo.items():
                finish(name, _run(train, name, config, partial(bars.update, name)))
        elif todo:
            _submit_to_processes(workers, todo, train, finish, bars)
    return {name: found[config] or [] for name, config in configs.items()}


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class RunFailed(RuntimeError):
    """A run failed; the text names it. It can be sent from one process to another."""


def _run(train: Train, name: str, config: Config, report: Report | None = None) -> list[Row]:
    """One run, in any process."""
    report = report or partial(_report, name)
    report(0, 0)  # it has begun
    try:
        return train(config, report)
    except Exception as error:
        raise RunFailed(f"{name!r} failed: {type(error).__name__}: {error}") from error


def _submit(
    executor: Executor,
    todo: Mapping[str, Config],
    train: Train,
    finish: Finish,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Train on an executor. Leaving it by an exception cancels what has not begun."""
    futures = {name: executor.submit(_run, train, name, todo[name]) for name in todo}
    try:
        while futures:
            time.sleep(POLL)  # not concurrent.futures.wait, which does not know submitit's jobs
            between()
            for name in [name for name, future in futures.items() if future.done()]:
                try:
                    rows = futures[name].result()
                except (RunFailed, BrokenExecutor):
                    raise
                except Exception as error:  # the executor's own
                    raise RunFailed(f"{name!r} failed: {type(error).__name__}: {error}") from error
                finish(name, rows)
                del futures[name]
    finally:
        for future in futures.values():
            future.cancel()


# --- Processes of this machine ----------------------------------------------------------------

_reports: Any = None
"""In a worker process: the queue of (name, steps done, steps to do)."""
_reported = 0.0


def _submit_to_processes(
    workers: int, todo: Mapping[str, Config], train: Train, finish: Finish, bars: SweepBars
) -> None:
    """Train on processes of this machine, which end with an exception here."""
    context = multiprocessing.get_context("spawn")  # neither CUDA nor threads survive a fork
    reports = context.SimpleQueue()
    others = multiprocessing.active_children()
    threads = max(1, _cores() // workers)
    pool = ProcessPoolExecutor(workers, context, _begin, (threads, reports))

    def show() -> None:
        while not reports.empty():
            bars.update(*reports.get())

    try:
        _submit(pool, todo, train, finish, show)
    except BaseException as error:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        if isinstance(error, BrokenExecutor):
            raise RunFailed(
                f"the process of one of these runs ended: {', '.join(map(repr, bars.running))}. If "
                "the memory does not suffice, try fewer workers"
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(threads: int, reports: Any) -> None:
    """Set up a worker process."""
    global _reports
    _reports = reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the workers
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _report(name: str, done: int, steps: int) -> None:
    """Report to the parent, if this is a worker of its; others have nobody who listens."""
    global _reported
    if _reports is None or (done < steps and time.monotonic() < _reported + POLL):
        return
    _reported = time.monotonic()
    with suppress(OSError):
        _reports.put((name, done, steps))


# --- The file ---------------------------------------------------------------------------------


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
                    f"{self.file} is damaged, or not the file of a sweep "
                    f"({type(error).__name__}: {error}): put a copy of it back, or remove it to "
                    "begin again"
                ) from error

    def find(self, config: Config) -> list[Row] | None:
        """The rows of the run with these settings, if there is one."""
        wanted = self._settings(config)
        for run in self.runs:
            # A file may be older than a setting: it had what is now the default.
            if {**asdict(Config()), **run["config"]} == wanted:
                return [dict(row) for row in run["rows"]]
        return None

    def add(self, name: str, config: Config, rows: list[Row]) -> None:
        """Write the file with one run more, completely or not at all."""
        if self.file is None:
            return
        self.runs.append({"name": name, "config": self._settings(config), "rows": rows})
        # A line for each run, which a diff can tell apart.
        text = '{"runs": [\n' + ",\n".join(map(json.dumps, self.runs)) + "\n]}\n"
        try:
            with atomic_write(self.file) as file:
                file.write(text.encode())
        except OSError as error:
            raise OSError(
                f"{self.file} could not be written ({error.strerror}). It is unchanged, without "
                f"{name!r}: make room, and start the sweep again"
            ) from error

    def _settings(self, config: Config) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(json.dumps({**asdict(config), **self.about}))
        return settings
