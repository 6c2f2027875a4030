"""Functions of tensors replayed as CUDA graphs: one launch instead of thousands.

A graph repeats the kernels it saw with the addresses and the numbers it saw. What may change from
call to call must therefore come in as a tensor, and whatever else decides which kernels run, and
where, must be in the key of the call: each key has a graph of its own.
"""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["CaptureError", "Graphs", "as_key", "module_key"]

Tensors = tuple[Tensor, ...]

WARMUP = 2
"""Calls run as they are before a key's graph is captured: libraries choose kernels meanwhile."""
MAX_GRAPHS = 8
"""Graphs kept; the one unused for longest is dropped."""


class CaptureError(RuntimeError):
    """What was to become a graph cannot be one."""


class Recorder(Protocol):
    """How one type of device captures."""

    def warm_up(self, function: Callable[[], Tensors]) -> Tensors:
        """Run the function as it is."""

    def record(self, function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """Record the function's kernels without running them.

        Returns:
            The tensors that a replay writes, and what replays.
        """


class CudaRecorder:
    """CUDA graphs, all in one memory pool, warmed up and captured on one side stream.

    The graphs of a pool overwrite each other's memory. So nothing may be kept there from one call
    to the next: :class:`Graphs` copies what goes in and what comes out.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Tensors]) -> Tensors:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return function()
        finally:  # after an error, too: the caller will bring its weights home
            current.wait_stream(self._stream)

    def record(self, function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Not "global": the threads of a data loader may go on with pinning memory.
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        sync_debug_mode = torch.cuda.get_sync_debug_mode()
        try:
            # The stream once more: older versions do not leave theirs if ending the capture fails.
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream), capture:
                # Code that reads from the device then fails before it spoils the capture.
                torch.cuda.set_sync_debug_mode("error")
                try:
                    outputs = function()
                finally:
                    torch.cuda.set_sync_debug_mode(sync_debug_mode)
        except BaseException:
            self._recover()
            raise
        return outputs, graph.replay

    def _recover(self) -> None:
        """After a spoiled capture the generator and the allocator may think it still goes on."""
        pool, self._pool = self._pool, torch.cuda.graph_pool_handle()
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self._device.index, pool)
        # Ending a capture in order is what resets the generator.
        orderly = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream)
        with contextlib.suppress(Exception), torch.cuda.device(self._device), orderly:
            torch.zeros(1, device=self._device)


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""How to capture, by type of device; on others there are no graphs."""


class Graphs:
    """Calls a function, and from the third call of a kind on replays what it did.

    Args:
        mode: True, False, or "auto": graphs where the device has them, and the function as it is,
            after one warning, where capturing fails.
        name: of the function, for messages.

    Attributes:
        is_recording: whether the function is running for its kernels to be recorded, not executed.
    """

    def __init__(self, mode: bool | str, name: str) -> None:
        if mode not in (True, False, "auto"):
            raise ValueError(f"cuda_graph must be True, False or 'auto', got {mode!r}")
        self._mode = mode
        self._name = name
        self.is_recording = False
        self._recorders: dict[torch.device, Recorder] = {}
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: Counter[Hashable] = Counter()

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
        # Inside a graph of the caller's own, or of a surrounding call, there can be no other.
        return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())

    def __call__(
        self,
        function: Callable[..., Tensors],
        inputs: Sequence[Tensor],
        key: Hashable,
        *,
        keep: Callable[[], Any] = lambda: None,
        before_replay: Callable[[Any], None] = lambda kept: None,
        discard: Callable[[], None] = lambda: None,
    ) -> Tensors:
        """``function(*inputs)``, by replay where that is possible.

        Args:
            function: takes tensors, returns a tuple of tensors. It must do the same for the same
                ``key``, and keep nothing in memory that it allocates.
            inputs: on a device that :meth:`applies_to` is true of.
            key: what decides which kernels run on which memory, but for the inputs' layout and
                autocast, which are added.
            keep: called once after a capture; what it returns lives as long as the graph.
            before_replay: called with that before every replay.
            discard: called after a capture that failed, to undo what the function did on the host.

        Returns:
            What the function returns, as tensors of the caller's own.

        Raises:
            CaptureError: the mode is True and the function cannot be captured. Nothing has run.
        """
        device = inputs[0].device
        recorder = self._recorders.get(device)
        if recorder is None:
            recorder = self._recorders[device] = RECORDERS[device.type](device)
        key = (
            key,
            device,
            _surroundings(device),
            *((t.shape, t.stride(), t.dtype) for t in inputs),
        )
        graph = self._graphs.get(key)
        if graph is None and self._seen[key] < WARMUP:
            if len(self._seen) > 16 * MAX_GRAPHS:
                self._seen.clear()
            self._seen[key] += 1
            return recorder.warm_up(lambda: function(*inputs))
        if graph is None:
            try:
                self.is_recording = True
                graph = _Graph(recorder, function, inputs, keep)
            except BaseException as error:
                self.is_recording = False
                discard()
                if not isinstance(error, Exception):
                    raise
                reason = f"{self._name} cannot be captured as a CUDA graph: {error}"
                if self._mode is True:
                    raise CaptureError(f"{reason}\nSet cuda_graph=False to do without") from error
                self._mode = False
                warnings.warn(f"{reason}\nIt runs without one from now on", stacklevel=3)
                return function(*inputs)
            finally:
                self.is_recording = False
            self._graphs[key] = graph
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return graph.replay(inputs, before_replay)


class _Graph:
    """One captured call: buffers for what goes in, and what comes out."""

    def __init__(
        self,
        recorder: Recorder,
        function: Callable[..., Tensors],
        inputs: Sequence[Tensor],
        keep: Callable[[], Any],
    ) -> None:
        with torch.inference_mode(False):
            self._inputs = [torch.empty_like(t).copy_(t.detach()) for t in inputs]
        torch.clear_autocast_cache()  # what is cached lives outside of the graph
        host = _host_randomness()
        try:
            self._outputs, self._replay = recorder.record(lambda: function(*self._inputs))
        finally:
            torch.clear_autocast_cache()  # and now inside
        self.kept = keep()
        if host != _host_randomness():
            raise CaptureError(
                "it draws random numbers on the host (random, numpy or torch's CPU generator), "
                "which a replay would repeat; draw them on the device"
            )

    def replay(self, inputs: Sequence[Tensor], before_replay: Callable[[Any], None]) -> Tensors:
        for buffer, t in zip(self._inputs, inputs, strict=True):
            buffer.copy_(t, non_blocking=True)
        before_replay(self.kept)  # last, for it may speak of what only the replay makes true
        self._replay()
        return tuple(t.clone() for t in self._outputs)


def as_key(value: Any) -> Hashable:
    """A setting as part of a key: a tensor counts by where it lies."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return value if isinstance(value, Hashable) else repr(value)


def module_key(model: nn.Module) -> Hashable:
    """What of a model decides which kernels run on which memory, with which numbers."""
    tensors = (*model.parameters(), *model.buffers())
    return (
        id(model),
        tuple(_host_settings(module) for module in model.modules()),
        tuple((t.data_ptr(), t.requires_grad) for t in tensors),
    )


def _host_settings(module: nn.Module) -> Hashable:
    """The mode, and the numbers of BatchNorm and dropout that are no tensors."""
    settings = module.__dict__
    return module.training, as_key(settings.get("momentum")), as_key(settings.get("p"))


def _surroundings(device: torch.device) -> Hashable:
    """What the code around a call may have changed."""
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


def _host_randomness() -> Any:
    """The states of the host's generators, to compare."""
    states: list[Any] = [random.getstate(), torch.get_rng_state().tolist()]
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        states += [name, keys.tobytes(), rest]
    return states
