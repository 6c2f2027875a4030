"""Work done ahead of its use, in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["prefetched"]

T = TypeVar("T")

AHEAD = 4
"""Jobs that are waiting, being done or done, while the caller uses the result of an earlier one."""


def prefetched(jobs: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """The results of jobs in their order, each computed by a thread before it is asked for.

    Only the jobs run in the thread; the iterable is advanced by the caller's. An exception in a job
    is raised where its result is asked for. Closing the generator waits for the job that is being
    done, and cancels the others.

    Args:
        jobs: functions that draw no random numbers and start no work on a GPU.
    """
    waiting: deque[Future[T]] = deque()
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        for job in jobs:
            waiting.append(thread.submit(job))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
