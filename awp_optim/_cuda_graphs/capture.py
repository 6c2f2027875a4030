"""Capture of a function as a CUDA graph, and recovery if that fails."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CaptureError", "CudaRecorder", "Recorder", "host_random_state", "is_only_thread"]

Tensors = tuple[Tensor, ...]


class CaptureError(RuntimeError):
    """A function cannot be captured as a graph."""


class Recorder(Protocol):
    """Captures functions on one type of device."""

    def warm_up(self, function: Callable[[], Tensors]) -> Tensors:
        """Run the function without capturing it."""

    def record(self, function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """Record the function's kernels without running them.

        Returns:
            The tensors that a replay writes, and a function that replays.
        """


class CudaRecorder:
    """Captures CUDA graphs in one memory pool, on one side stream.

    The graphs of a pool overwrite each other's memory, so nothing may stay there between calls:
    :class:`~awp_optim._cuda_graphs.graphs.Graphs` copies inputs and outputs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        with warnings.catch_warnings():  # the first use warns that this is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode(torch.cuda.get_sync_debug_mode())

    def warm_up(self, function: Callable[[], Tensors]) -> Tensors:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return function()
        finally:  # after an error, too: the caller restores weights on its own stream
            current.wait_stream(self._stream)

    def record(self, function: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Not "global": a data loader's threads may pin memory during the capture.
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        failure: BaseException | None = None
        try:
            # torch.cuda.graph does not leave the stream if ending the capture fails.
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(self._stream),
                _stale_streams_overridden(),
                capture,
                _synchronization_refused(),
            ):
                try:
                    outputs = function()
                except BaseException as error:
                    failure = error  # ending an invalid capture raises another error
                    raise
        except BaseException as error:
            failure = failure or error
        if failure is not None:
            self._recover()
            try:
                raise failure
            finally:
                del failure  # breaks a cycle that would keep tensors in its frames alive
        return outputs, graph.replay

    def _recover(self) -> None:
        """Reset the allocator and the random generator after an invalidated capture."""
        pool, self._pool = self._pool, torch.cuda.graph_pool_handle()
        with contextlib.suppress(Exception):
            _end_allocation(self._device, pool)
        # The generator leaves its capturing mode when a later capture ends without an error.
        empty = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream)
        with contextlib.suppress(Exception), torch.cuda.device(self._device), empty:
            torch.zeros(1, device=self._device)


def is_only_thread() -> bool:
    """Whether no other Python thread can draw random numbers or wait for the device."""
    return threading.active_count() == 1


@contextlib.contextmanager
def _synchronization_refused() -> Iterator[None]:
    """Context manager: code that waits for the device fails before it invalidates the capture.

    The mode applies to all threads. If other threads run, which may wait for the device, only the
    capture itself detects such code.
    """
    if not is_only_thread():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def host_random_state() -> Any:
    """The states of the host's random generators, for comparison."""
    states: list[Any] = [random.getstate(), torch.get_rng_state().tolist()]
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        states += [name, keys.tobytes(), rest]
    return states


# ------------------------------------------------------------ what depends on torch's version
#
# A parameter's AccumulateGrad node keeps the stream on which it was created, and an autograd graph,
# such as that of the caller's logits from an earlier forward pass, keeps the node. Accumulating on
# that stream invalidates a capture. Newer versions can override the stream; torch 2.6 to 2.11 need
# a new node.


@contextlib.contextmanager
def _stale_streams_overridden() -> Iterator[None]:
    override = getattr(torch.autograd.graph, "set_override_stale_capture_stream", None)
    if override is None:
        yield
        return
    before = torch._C._override_stale_capture_stream()  # noqa: SLF001 -- has no public getter
    override(True)  # noqa: FBT003
    try:
        yield
    finally:
        override(before)


def renew_accumulators(parameters: Iterable[Tensor]) -> None:
    """Give the parameters new AccumulateGrad nodes, where torch cannot override their streams.

    Autograd graphs that hold the old nodes still backpropagate to the same parameters.
    """
    if hasattr(torch.autograd.graph, "set_override_stale_capture_stream"):
        return
    for p in parameters:
        if p.requires_grad:
            data = p.data
            other = torch.float32 if p.dtype == torch.float64 else torch.float64
            p.data = torch.empty(0, dtype=other, device=p.device)  # another dtype drops the node
            p.data = data


def _end_allocation(device: torch.device, pool: Any) -> None:
    """End and release the allocations of a capture whose ``capture_end()`` raised before doing so.

    Raises:
        RuntimeError: ``capture_end()`` has already done so: always in newer versions, and in older
            ones after an error that left the capture valid.
    """
    # No public name exists; torch 2.6 has the second one.
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)  # noqa: SLF001
    if end is None:
        end = torch._C._cuda_endAllocateCurrentStreamToPool  # type: ignore[attr-defined] # noqa: SLF001
    end(device.index, pool)
    torch._C._cuda_releasePool(device.index, pool)  # noqa: SLF001
