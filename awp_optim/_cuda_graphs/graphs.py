"""A cache of CUDA graphs, which replay functions of tensors with one launch instead of thousands.

A graph repeats the captured kernels with the captured addresses and numbers. Values that change
between calls must therefore be tensors, and everything else that decides which kernels run on which
memory must be part of the call's key: each key has its own graph.
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
"""Eager calls before a key's graph is captured, in which libraries choose their kernels."""
MAX_GRAPHS = 8
"""Graphs kept; the least recently used is dropped."""

RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""How to capture, by device type; other devices have no graphs."""


class HostState:
    """What a function changes on the host; here nothing.

    A replay runs only kernels. A subclass repeats the changes on the host.
    """

    def prepare(self) -> None:
        """Prepare for a capture."""

    def save(self) -> Any:
        """Return the state on the host after the captured call."""

    def load(self, saved: Any) -> None:
        """Set this state, before a replay."""

    def reset(self) -> None:
        """Undo the changes of a failed capture."""


class Graphs:
    """Calls a function; from the third call with the same key on, replays it as a graph.

    Args:
        mode: True, False, or "auto": graphs if the device has them; if a capture fails, one
            warning, and eager calls from then on.
        name: the function's name in messages.
    """

    def __init__(self, mode: bool | str, name: str) -> None:  # noqa: FBT001 -- as the caller's
        if mode not in (True, False, "auto"):
            raise ValueError(f"cuda_graph must be True, False or 'auto', got {mode!r}")
        self._mode = mode
        self._name = name
        self._recorders: dict[torch.device, Recorder] = {}
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._calls: Counter[int] = Counter()  # by the key's hash: a key keeps objects alive
        self._too_large: set[int] = set()

    def applies_to(self, device: torch.device) -> bool:
        """Whether calls on this device are replayed.

        Raises:
            ValueError: the mode is True and the device has no graphs.
        """
        if self._mode is True and device.type not in RECORDERS:
            raise ValueError(
                f"cuda_graph=True, but the inputs are on {device}, which has no CUDA graphs: move "
                "model and inputs to a CUDA device, or leave cuda_graph at 'auto'"
            )
        if self._mode is False or device.type not in RECORDERS:
            return False
        # Captures cannot be nested, neither in the caller's nor in a surrounding call's.
        return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())

    def __call__(
        self,
        function: Callable[..., Tensors],
        inputs: Sequence[Tensor],
        key: Hashable,
        host: HostState | None = None,
    ) -> Tensors:
        """Return ``function(*inputs)``, by a replay if possible.

        Args:
            function: takes tensors, returns a tuple of tensors. It must do the same for the same
                ``key``, and keep no tensors that it allocates.
            inputs: on a device for which :meth:`applies_to` is True.
            key: what decides which kernels run on which memory, except for the inputs' layout and
                autocast, which are added. The graph keeps it alive.
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
            too_large = hash(key) in self._too_large
            graph = None if too_large else self._capture(recorder, function, inputs, host, key)
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
        key: Hashable,
    ) -> _Graph | None:
        """A graph; or None, after a warning, if the capture fails in the mode "auto"."""
        try:
            return _Graph(recorder, function, inputs, host)
        except BaseException as error:
            host.reset()
            if not isinstance(error, Exception):
                raise
            reason = f"{self._name} cannot be captured as a CUDA graph: {error}"
            if self._mode is True:
                raise CaptureError(f"{reason}\nSet cuda_graph=False to run eagerly") from error
            if isinstance(error, torch.OutOfMemoryError):  # smaller batches may fit
                self._too_large.add(hash(key))
            else:
                self._mode = False
            warnings.warn(f"{reason}\nIt runs eagerly from now on", stacklevel=4)
            return None


class _Graph:
    """One captured call, with buffers for its inputs and outputs."""

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
        torch.clear_autocast_cache()  # cached tensors live outside the graph
        random_state = host_random_state()
        try:
            self._outputs, self._replay = recorder.record(lambda: function(*self._inputs))
        finally:
            torch.clear_autocast_cache()  # and now inside it
        if random_state != host_random_state():
            _refuse_host_randomness()
        self._saved = host.save()

    def replay(self, inputs: Sequence[Tensor], host: HostState) -> Tensors:
        for buffer, t in zip(self._inputs, inputs, strict=True):
            buffer.copy_(t, non_blocking=True)
        host.load(self._saved)  # last, because only the replay fulfills it
        self._replay()
        return tuple(t.clone() for t in self._outputs)


def _refuse_host_randomness() -> None:
    drawn = "random numbers were drawn on the host (by random, numpy or torch's CPU generator)"
    if is_only_thread():
        raise CaptureError(f"{drawn}, which a replay would repeat; draw them on the device")
    warnings.warn(
        f"{drawn} while a CUDA graph was captured. If another thread drew them, such as a data "
        "loader's, ignore this warning. If the model or the attack did, replays repeat these "
        "numbers: draw them on the device or set cuda_graph=False",
        stacklevel=6,
    )
