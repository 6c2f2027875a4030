"""Ctrl-C and SIGTERM as a wish to stop, heard at the end of a training step."""

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
        signal: the signal, or None as long as there was none.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """What a shell shows of a program that this signal ended: 130 or 143. 0 without one."""
        return 0 if self.signal is None else 128 + self.signal


@contextmanager
def graceful_stop(
    say: Callable[[str], object] | None = None, *, echo: float = 0.0
) -> Iterator[StopRequest]:
    """Inside, the first SIGINT or SIGTERM is noted, and the second ends the program as usual.

    Python takes signals in the main thread alone: elsewhere nothing is changed.

    Args:
        say: gets a line of text when the first one comes, in the middle of anything; None writes
            it to the standard error.
        echo: seconds after the first in which others are taken for the same one: torchrun passes a
            Ctrl-C on to processes that the terminal has sent it to already.
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
            restore()  # the next one is not for us
        (say or _write)(f"{request.signal.name}: stopping after this step (again: at once)")

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is signal.SIG_IGN:
                continue  # as a shell sets it for what must not hear a Ctrl-C
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread
        previous.clear()
    try:
        yield request
    finally:
        restore()


def _write(text: str) -> None:
    # Past Python's buffers: the signal may have come while one of them was written.
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
