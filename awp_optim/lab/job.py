"""A program on several processes of torchrun: how they join, take turns, report, and end."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from awp_optim._utils.distributed import Ranks
from awp_optim.lab.distributed import TrainingRanks

__all__ = ["Job", "RankLost", "job", "naming_lost_ranks"]

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for the first, which may be downloading. torchrun notices a death itself."""


class RankLost(ConnectionError):
    """Another process of the run has ended."""


class Job(TrainingRanks):
    """The processes of a program, and what they write to standard error.

    Attributes:
        store: the key-value store that the processes share; None for a single process.
    """

    def __init__(self, store: Any) -> None:
        super().__init__()
        self.store = store

    def device(self, name: str) -> str:
        """The device of this rank: each process on a machine has a GPU of its own.

        Raises:
            ValueError: there are fewer GPUs than processes, or ``name`` is one of them.
        """
        kind = torch.device(name)
        if self.world == 1 or kind.type != "cuda":
            return name
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if kind.index is not None:
            raise ValueError(f"each process has a GPU of its own: --device cuda, not {name}")
        if local >= count:
            raise ValueError(
                f"{local + 1} or more processes on a machine with {count} GPUs: start no more than "
                f"one for each, --nproc-per-node {count}"
            )
        torch.cuda.set_device(local)
        return f"cuda:{local}"

    def in_turns(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank, then on one of each other machine, then on the rest.

        So one download is enough on each machine. An error on one rank is raised on all of them.
        """
        if self.world == 1:
            return function()
        turn = 0 if self.rank == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
        answer: Any = None
        for now in range(3):
            error: Exception | None = None
            if now == turn:
                try:
                    answer = function()
                except Exception as raised:
                    error = raised
            for each in self.gather(error):
                if each is not None:
                    raise each
        return answer  # type: ignore[no-any-return]

    def report(self, text: str, *, is_consequence: bool) -> None:
        """Write to standard error why the program ends, once for all ranks that report the same.

        Args:
            text: what to write.
            is_consequence: whether it may follow from an error that another rank has reported.
        """
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when another rank has ended
        with suppress(Exception):  # without the store, better twice than never
            if is_consequence and self.store.check(["cause"]):
                return
            if not is_consequence:
                self.store.add("cause", 1)
            if self.store.add(f"reported {text}", 1) > 1:
                return
        sys.stderr.write(text)
        sys.stderr.flush()

    def missing_ranks(self) -> list[int]:
        """The ranks that do not call this within a second."""
        with suppress(Exception):  # the store may be gone, too
            self.store.add(f"here/{self.rank}", 1)
            time.sleep(1)
            return [r for r in range(self.world) if not self.store.check([f"here/{r}"])]
        return []


_joined: Job | None = None


@contextmanager
def job() -> Iterator[Job]:
    """Join the processes that torchrun started, if it started this one.

    Inside, all ranks but the first are silent. A ``sys.exit("why")`` inside is reported once,
    however many ranks end by it. The ranks end together, since torchrun ends all when one is gone.
    """
    global _joined
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Job(None)
        return
    _joined = ranks = _join()
    try:
        with _silence() if ranks.rank else nullcontext():
            yield ranks
    except SystemExit as error:
        if isinstance(error.code, str):
            consequence = isinstance(error.__context__, RankLost)
            ranks.report(f"{error.code}\n", is_consequence=consequence)
            raise SystemExit(2) from None
        _wait_for_all(ranks)
        raise
    _wait_for_all(ranks)
    dist.destroy_process_group()


@contextmanager
def _silence() -> Iterator[None]:
    nowhere = io.StringIO()
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _wait_for_all(ranks: Job) -> None:
    with suppress(Exception):  # another rank may have ended with an error
        ranks.gather(None)


def _join() -> Job:
    """Initialize torch.distributed by torchrun's store."""
    store, rank, world = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # After a restart, torchrun's store still holds what the previous processes left there.
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
    )
    return Job(PrefixStore("awp_optim", store))


@contextmanager
def naming_lost_ranks(ranks: Ranks) -> Iterator[None]:
    """Inside, a collective that fails because another rank is gone raises :class:`RankLost`."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or not _is_communication_error(error):
            raise
        missing = _joined.missing_ranks() if _joined else []
        which = f"rank {', '.join(map(str, missing))}" if missing else "one"
        raise RankLost(
            f"{which} of {ranks.world} processes has ended, or cannot be reached any more. The "
            "last checkpoint is intact: continue with --resume"
        ) from error


def _is_communication_error(error: RuntimeError) -> bool:
    kinds = (dist.DistError, dist.DistBackendError, dist.DistNetworkError)
    return isinstance(error, kinds) or "gloo" in str(error)
