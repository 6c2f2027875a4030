"""A cache of CUDA graphs: functions of tensors replayed with one launch instead of thousands.

A graph repeats the kernels it saw with the addresses and the numbers it saw. What may change from
call to call must therefore come in as a tensor, and whatever else decides which kernels run, and
where, must be in the key of the call: each key has a graph of its own.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from awp_optim._cuda_graphs.capture import (
    CaptureError,
    CudaRecorder,
    Recorder,
    Tensors,
    host_random_state,
    is_only_thread,
)
from awp_optim._cuda_graphs.keys import surroundings

__all__ = ["MAX_GRAPHS", "RECORDERS", "WARMUP", "CaptureError", "Graphs", "HostState"]

WARMUP = 2
"""Calls run eagerly before a key's graph is captured: libraries choose kernels meanwhile."""
MAX_GRAPHS = 8
"""Graphs kept; the least recently used is dropped."""

RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""How to capture, by type of device; on others there are no graphs."""


class HostState:
    """What a function changes on the host, beside its kernels; here nothing.

    A replay runs the kernels alone. A subclass does the rest.
    """

    def prepare(self) -> None:
        """Make ready for a capture."""

    def save(self) -> Any:
        """Return what the function has left on the host when it was captured."""

    def load(self, saved: Any) -> None:
        """Leave the same, before a replay."""

    def reset(self) -> None:
        """Undo what a capture that failed has left."""


class Graphs:
    """Calls a function, and from the third call with a key on replays what it did.

    Args:
        mode: True, False, or "auto": graphs where the device has them; where capturing fails, one
            warning and eager calls from then on.
        name: of the function, for messages.
    """

    def __init__(self, mode: bool | str, name: str) -> None:  # noqa: FBT001 -- as the caller's
        if mode not in (True, False, "auto"):
            raise ValueError(f"cuda_graph must be True, False or 'auto', got {mode!r}")
        self._mode = mode
        self._name = name
        self._recorders: dict[torch.device, Recorder] = {}
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._calls: Counter[int] = Counter()  # by the key's hash: a key keeps objects alive

    def applies_to(self, device: torch.device) -> bool:
        """Whether calls on this device are replayed.

        Raises:
            ValueError: the mode is True and the device has no graphs.
        """
        if self._mode is True and device.type not in RECORDERS:
            raise ValueError(
                f"cuda_graph=True, but the inputs are on {device}, where there are no CUDA graphs: "
                "move model and inputs to a CUDA device, or leave cuda_graph at 'auto'"
            )
        if self._mode is False or device.type not in RECORDERS:
            return False
        # A capture under way, of the caller's or of a surrounding call, allows no other.
        return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())

    def __call__(
        self,
        function: Callable[..., Tensors],
        inputs: Sequence[Tensor],
        key: Hashable,
        host: HostState | None = None,
    ) -> Tensors:
        """``function(*inputs)``, by replay where that is possible.

        Args:
            function: takes tensors, returns a tuple of tensors. It must do the same for the same
                ``key``, and keep nothing in memory that it allocates.
            inputs: on a device that :meth:`applies_to` is true of.
            key: what decides which kernels run on which memory, except for the inputs' layout and
                autocast, which are added. It lives as long as the graph.
            host: what the function changes on the host.

        Returns:
            What the function returns, as tensors that later calls do not overwrite.

        Raises:
            CaptureError: the mode is True and the function cannot be captured. Nothing has run.
        """
        device = inputs[0].device
        recorder = self._recorders.get(device)
        if recorder is None:
            recorder = self._recorders[device] = RECORDERS[device.type](device)
        layouts = tuple((t.shape, t.stride(), t.dtype) for t in inputs)
        key = (key, device, surroundings(device), layouts)
        host = host or HostState()
        graph = self._graphs.get(key)
        if graph is None:
            if self._is_warming_up(key):
                return recorder.warm_up(lambda: function(*inputs))
            graph = self._capture(recorder, function, inputs, host)
            if graph is None:
                return function(*inputs)
            self._graphs[key] = graph
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return graph.replay(inputs, host)

    def _is_warming_up(self, key: Hashable) -> bool:
        if len(self._calls) > 16 * MAX_GRAPHS:
            self._calls.clear()
        self._calls[hash(key)] += 1
        return self._calls[hash(key)] <= WARMUP

    def _capture(
        self,
        recorder: Recorder,
        function: Callable[..., Tensors],
        inputs: Sequence[Tensor],
        host: HostState,
    ) -> _Graph | None:
        """A graph; or None, after a warning, where capturing fails in the mode "auto"."""
        try:
            return _Graph(recorder, function, inputs, host)
        except BaseException as error:
            host.reset()
            if not isinstance(error, Exception):
                raise
            reason = f"{self._name} cannot be captured as a CUDA graph: {error}"
            if self._mode is True:
                raise CaptureError(f"{reason}\nSet cuda_graph=False to do without") from error
            self._mode = False
            warnings.warn(f"{reason}\nIt runs without one from now on", stacklevel=4)
            return None


class _Graph:
    """One captured call: buffers for what goes in, and what comes out."""

    def __init__(
        self,
        recorder: Recorder,
        function: Callable[..., Tensors],
        inputs: Sequence[Tensor],
        host: HostState,
    ) -> None:
        with torch.inference_mode(mode=False):
            self._inputs = [torch.empty_like(t).copy_(t.detach()) for t in inputs]
        host.prepare()
        torch.clear_autocast_cache()  # what is cached lives outside of the graph
        random_state = host_random_state()
        try:
            self._outputs, self._replay = recorder.record(lambda: function(*self._inputs))
        finally:
            torch.clear_autocast_cache()  # and now inside
        if random_state != host_random_state():
            _object_to_host_randomness()
        self._saved = host.save()

    def replay(self, inputs: Sequence[Tensor], host: HostState) -> Tensors:
        for buffer, t in zip(self._inputs, inputs, strict=True):
            buffer.copy_(t, non_blocking=True)
        host.load(self._saved)  # last, because only the replay makes it true
        self._replay()
        return tuple(t.clone() for t in self._outputs)


def _object_to_host_randomness() -> None:
    drawn = "random numbers were drawn on the host (by random, numpy or torch's CPU generator)"
    if is_only_thread():
        raise CaptureError(f"{drawn}, which a replay would repeat; draw them on the device")
    warnings.warn(
        f"{drawn} while a CUDA graph was captured. If another thread did, such as a data loader's, "
        "all is well; if the model or the attack did, replays repeat these numbers: draw them on "
        "the device or set cuda_graph=False",
        stacklevel=6,
    )
