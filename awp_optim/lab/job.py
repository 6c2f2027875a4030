"""A program on several processes of torchrun: how they join, take turns, speak, and end."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
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
"""What the others wait for the first, which may be downloading. torchrun sees a death at once."""


class RankLost(ConnectionError):
    """Another process of the run has gone."""


@contextmanager
def naming_lost_ranks(ranks: Ranks) -> Iterator[None]:
    """Inside, a collective that fails for want of another rank raises :class:`RankLost`."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or not _is_of_communication(error):
            raise
        raise RankLost(
            f"{_lost(ranks)} of {ranks.world} processes has ended, or cannot be reached any more. "
            "What is saved is of before: go on with --resume"
        ) from error


def _is_of_communication(error: RuntimeError) -> bool:
    kinds = (dist.DistError, dist.DistBackendError, dist.DistNetworkError)
    return isinstance(error, kinds) or "gloo" in str(error)


def _lost(ranks: Ranks) -> str:
    """The rank that does not answer within a second, in words."""
    if _job is None or _job.store is None:
        return "one"
    with suppress(Exception):  # the store may have gone, too
        _job.store.add(f"here/{ranks.rank}", 1)
        time.sleep(1)
        gone = [r for r in range(ranks.world) if not _job.store.check([f"here/{r}"])]
        if gone:
            return f"rank {', '.join(map(str, gone))}"
    return "one"


_job: Job | None = None


class Job(TrainingRanks):
    """The processes of a program, and what they say.

    Attributes:
        store: where torchrun's processes leave word for each other; None for a single process.
    """

    def __init__(self, store: Any) -> None:
        super().__init__()
        self.store = store

    def device(self, name: str) -> str:
        """The device of this rank: of GPUs, each process on a machine has its own.

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
        """What a function gives, called by the first rank, then by one on each other machine, then
        by all others: so that one download is enough. An error of one is everybody's."""
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

    def report(self, text: str, consequence: bool) -> None:
        """Write why the program ends to the standard error, once for all ranks.

        The first rank does so; the others where it has something else to say, or nothing.

        Args:
            text: what to write.
            consequence: of an error that another rank has written already, perhaps.
        """
        store = self.store
        assert store is not None
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, for another's end
        with suppress(Exception):  # without the store, better twice than never
            if self.rank == 0:
                store.set("said", text)
            else:
                if _waited_for(store, "said", 5) and store.get("said").decode() == text:
                    return
        with suppress(Exception):
            if consequence and store.check(["cause"]):
                return
            if not consequence:
                store.add("cause", 1)
            if self.rank and store.add(f"by others: {text}", 1) > 1:
                return
        sys.stderr.write(text if self.rank == 0 else f"rank {self.rank}: {text}")
        sys.stderr.flush()


@contextmanager
def job() -> Iterator[Job]:
    """Join the processes that torchrun started, for a program's whole main; or be alone.

    Inside, all but the first are silent. A ``sys.exit("why")`` inside is told once, whichever ranks
    leave by it, and no rank is gone before the first has spoken: torchrun would end it. Everybody
    waits for the first one to be done.
    """
    global _job
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Job(None)
        return
    store, rank, world = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's processes may find in the store what those before a restart have left there.
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
    )
    _job = ranks = Job(PrefixStore("awp_optim", store))
    nowhere = io.StringIO()
    try:
        if rank == 0:
            yield ranks
        else:
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield ranks
    except SystemExit as error:
        if isinstance(error.code, str):
            ranks.report(f"{error.code}\n", isinstance(error.__context__, RankLost))
            raise SystemExit(1) from None
        _wait_for_the_first(ranks)
        raise
    _wait_for_the_first(ranks)
    dist.destroy_process_group()


def _wait_for_the_first(ranks: Job) -> None:
    assert ranks.store is not None
    with suppress(Exception):
        if ranks.rank == 0:
            ranks.store.set("said", "")
        _waited_for(ranks.store, "said", TIMEOUT.total_seconds())


def _waited_for(store: Any, key: str, seconds: float) -> bool:
    """Whether a key is there in time. (The store's own wait complains of it where it is not.)"""
    end = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
