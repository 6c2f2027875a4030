"""Many runs, on an executor of ``concurrent.futures``, kept in a file as they finish."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from awp_optim._utils.checks import check_int
from awp_optim.lab.config import Config
from awp_optim.lab.progress import SweepBars, step_bars
from awp_optim.lab.results_file import ResultsFile
from awp_optim.lab.run_folder import Row

__all__ = ["RunFailed", "Train", "sweep"]

Report = Callable[[int, int], None]
Train = Callable[[Config, Report], list[Row]]
"""A run: gets its settings and a function to report the steps done and to do, returns its rows."""
Finished = Generator[tuple[str, list[Row]], None, None]
"""Runs as they finish. Closing it ends or cancels the others."""

Futures = dict[str, "Future[list[Row]]"]

POLL = 0.05
"""Seconds between two polls of the runs, and between two reports of a run."""


class RunFailed(RuntimeError):
    """A run failed; the text names it."""


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
    """Train all runs, by default as many at a time as there are cores, and equal ones only once.

    With a file, every finished run is written to it at once, and a run that it holds is not trained
    again: an interrupted sweep continues. Runs with other settings stay in the file.

    Args:
        configs: the runs, by a name such as "AT-AWP, seed 1".
        train: trains one. Unless it runs in this process it is pickled: a function at the top level
            of a module or script, or a ``functools.partial`` of one.
        file: a JSON file, made if needed; None keeps nothing.
        about: what else determines the runs (the data), kept with each and compared.
        workers: processes of this machine, which share its cores as threads; None for one a core.
            1 trains one run after another in this process with all its threads, as suits a GPU.
        executor: trains the runs instead, on whatever machines it has: dask's
            ``Client(...).get_executor()``, ``mpi4py.futures``, submitit, loky. A worker must train
            one run at a time, for torch's random state belongs to the process. The executor is not
            shut down.
        console: where to draw the progress; None for the standard output.

    Returns:
        The rows of each run by its name, in the order of ``configs``.

    Raises:
        OSError: the file could not be read or written; what it held before is intact.
        RunFailed: a run failed. Those that had finished are in the file; others are ended, or, on
            an executor of the caller, cancelled if they have not begun.
        ValueError: the file is damaged or not a sweep's, or ``workers`` is below 1.
    """
    if workers is not None:
        check_int("workers", workers, least=1)
    results = ResultsFile(file, about or {})
    found = {config: results.find(config) for config in configs.values()}
    todo = _todo(configs, found)
    # Counted over all runs, so that a resumed sweep gives each run as many threads as before.
    workers = min(workers or _cores(), max(1, len(configs)))
    with step_bars(console) as progress:
        bars = SweepBars(progress, len(todo), len(found))
        if executor is not None:
            runs = _collect(_submit(executor, todo, train))
        elif workers == 1:
            runs = _in_turn(todo, train, bars)
        else:
            runs = _on_processes(workers, todo, train, bars)
        with closing(runs):
            for name, rows in runs:
                found[todo[name]] = rows
                results.add(name, todo[name], rows)
                bars.finish(name)
    return {name: found[config] or [] for name, config in configs.items()}


def _todo(configs: Mapping[str, Config], found: Mapping[Config, object]) -> dict[str, Config]:
    """The runs to do, each setting under the first of its names."""
    todo: dict[str, Config] = {}
    for name, config in configs.items():
        if found[config] is None and config not in todo.values():
            todo[name] = config
    return todo


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(train: Train, name: str, config: Config, report: Report) -> list[Row]:
    """One run, in this process or a worker."""
    report(0, 0)  # it has begun
    try:
        return train(config, report)
    except Exception as error:  # of whatever type: not all can be sent to another process
        raise RunFailed(f"{name!r} failed: {type(error).__name__}: {error}") from error


def _in_turn(todo: Mapping[str, Config], train: Train, bars: SweepBars) -> Finished:
    for name, config in todo.items():
        yield name, _run(train, name, config, partial(bars.update, name))


def _submit(executor: Executor, todo: Mapping[str, Config], train: Train) -> Futures:
    return {
        name: executor.submit(_run, train, name, config, partial(_report, name))
        for name, config in todo.items()
    }


def _collect(futures: Futures, meanwhile: Callable[[], None] = lambda: None) -> Finished:
    try:
        while futures:
            time.sleep(POLL)  # not concurrent.futures.wait, which does not know submitit's jobs
            meanwhile()
            for name in [name for name, future in futures.items() if future.done()]:
                try:
                    rows = futures.pop(name).result()
                except (RunFailed, BrokenExecutor):
                    raise
                except Exception as error:  # the executor's own
                    raise RunFailed(f"{name!r} failed: {type(error).__name__}: {error}") from error
                yield name, rows
    finally:
        for future in futures.values():
            future.cancel()


# --- Processes of this machine ----------------------------------------------------------------


def _on_processes(
    workers: int, todo: Mapping[str, Config], train: Train, bars: SweepBars
) -> Finished:
    context = multiprocessing.get_context("spawn")  # neither CUDA nor threads survive a fork
    reports = context.SimpleQueue()
    threads = max(1, _cores() // workers)
    others = multiprocessing.active_children()

    def show() -> None:
        while not reports.empty():
            bars.update(*reports.get())

    pool = ProcessPoolExecutor(workers, context, _begin, (reports, threads))
    try:
        with _interrupts_ignored():
            futures = _submit(pool, todo, train)
        yield from _collect(futures, show)
    except BrokenExecutor as error:
        raise RunFailed(
            f"one of {', '.join(map(repr, bars.running))} failed: its process ended. If the memory "
            "does not suffice, try fewer workers"
        ) from error
    finally:
        # After an exception, runs are still running: they are not waited for.
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Let processes started inside ignore Ctrl-C: this process handles it, and ends them."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread, which alone gets a Ctrl-C
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_reports: Any = None
"""In a worker: the queue of (name, steps done, steps to do)."""
_last_report = 0.0


def _begin(reports: Any, threads: int) -> None:
    """Set up a worker."""
    global _reports
    _reports = reports
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _report(name: str, done: int, steps: int) -> None:
    """Report to the parent process; on an executor of the caller, to nobody."""
    global _last_report
    now = time.monotonic()
    if _reports is not None and (done in (0, steps) or now > _last_report + POLL):
        _last_report = now
        with suppress(OSError):  # the parent has ended
            _reports.put((name, done, steps))
