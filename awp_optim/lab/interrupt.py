"""Ctrl-C and SIGTERM as a request to stop, which training answers at the end of a step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["StopRequest", "graceful_stop"]


class StopRequest:
    """Whether a signal has asked the program to stop; call it, as ``fit(stop=...)`` does.

    Attributes:
        signal: the signal; None if there was none.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """A shell's exit status for a program that the signal ended, 130 or 143; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal


@contextmanager
def graceful_stop(
    report: Callable[[str], object] | None = None, *, echo: float = 0.0
) -> Iterator[StopRequest]:
    """Inside, the first SIGINT or SIGTERM is noted, and the second ends the program as usual.

    Python handles signals in the main thread alone: in others nothing changes.

    Args:
        report: called with a line of text when the first signal arrives, at any point of the
            program; None writes it to standard error.
        echo: seconds during which further signals count as the first one: torchrun passes a Ctrl-C
            on to processes that have it from the terminal already.
    """
    request, first = StopRequest(), 0.0
    previous: dict[signal.Signals, object] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        previous.clear()

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if request.signal is not None:
            if time.monotonic() >= first + echo:
                restore()
                signal.raise_signal(number)
            return
        request.signal, first = signal.Signals(number), time.monotonic()
        if not echo:
            restore()  # the next one has its usual effect
        (report or _write)(f"{request.signal.name}: stopping after this step (again: at once)")

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is signal.SIG_IGN:
                continue  # a shell ignores Ctrl-C this way for a background job
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread
        previous.clear()
    try:
        yield request
    finally:
        restore()


def _write(text: str) -> None:
    # Past Python's buffers: the signal may have come in the middle of a write to one of them.
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
