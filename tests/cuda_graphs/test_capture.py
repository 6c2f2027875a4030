"""What the recorder does around a capture, on fakes of torch.cuda where there is no GPU."""

from __future__ import annotations

import contextlib
import threading
import warnings

import pytest
import torch
from torch import nn

from awp_optim._cuda_graphs import capture
from awp_optim._cuda_graphs.capture import CudaRecorder, renew_accumulators


class FakeStream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


class FakeCapture:
    """torch.cuda.graph, which raises at its end if the capture was spoiled."""

    spoiled = False

    def __init__(self, graph, **kwargs):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *args):
        if FakeCapture.spoiled:
            FakeCapture.spoiled = False
            raise RuntimeError("operation failed due to a previous error during capture")


class FakeGraph:
    def replay(self):
        pass


class SyncDebugMode:
    """torch.cuda's, which warns at its first use."""

    def __init__(self):
        self.mode, self.history = 0, []

    def set(self, mode):
        if not self.history:
            warnings.warn("a prototype feature", stacklevel=2)
        self.mode = mode
        self.history.append(mode)

    def get(self):
        return self.mode


class Allocator:
    """The allocator of one torch version, by the names that it has for ending an allocation."""

    def __init__(self, monkeypatch, name, ended_already=False):
        self.calls, self._ended_already = [], ended_already
        for known in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):
            monkeypatch.delattr(torch._C, known, raising=False)
        monkeypatch.setattr(torch._C, name, self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    def end(self, device, pool):
        if self._ended_already:
            raise RuntimeError("not currently recording to mempool_id")
        self.calls.append(("end", device, pool))

    def release(self, device, pool):
        self.calls.append(("release", device, pool))


@pytest.fixture
def debug_mode(monkeypatch):
    """A torch.cuda that captures nothing; returns its synchronization debug mode."""
    mode, pools = SyncDebugMode(), iter(range(100))
    for name, fake in {
        "Stream": FakeStream,
        "graph": FakeCapture,
        "CUDAGraph": FakeGraph,
        "device": lambda device: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "graph_pool_handle": lambda: next(pools),
        "set_sync_debug_mode": mode.set,
        "get_sync_debug_mode": mode.get,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    return mode


def recorder():
    return CudaRecorder(torch.device("cuda", 0))


def spoil(error):
    FakeCapture.spoiled = True
    raise error


@pytest.mark.parametrize(
    "name", ["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"]
)
def test_a_spoiled_capture_ends_and_releases_its_memory(debug_mode, monkeypatch, name):
    allocator = Allocator(monkeypatch, name)
    cuda = recorder()
    with pytest.raises(RuntimeError, match="not permitted"):
        cuda.record(lambda: spoil(RuntimeError("not permitted")))
    assert allocator.calls == [("end", 0, 0), ("release", 0, 0)]
    cuda.record(lambda: ())  # the next one is in order


def test_a_pool_that_was_ended_is_not_released_twice(debug_mode, monkeypatch):
    allocator = Allocator(monkeypatch, "_cuda_endAllocateToPool", ended_already=True)
    with pytest.raises(ValueError, match="a reason"):
        recorder().record(lambda: spoil(ValueError("a reason")))
    assert allocator.calls == []


def test_ctrl_c_in_a_spoiled_capture_stays_one(debug_mode):
    with pytest.raises(KeyboardInterrupt):
        recorder().record(lambda: spoil(KeyboardInterrupt()))


def test_synchronizing_is_an_error_in_a_capture(debug_mode):
    cuda = recorder()
    cuda.record(lambda: (assert_mode(debug_mode, "error"),)[:0])
    assert debug_mode.mode == 0


def test_other_threads_may_synchronize_in_a_capture(debug_mode, monkeypatch):
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    cuda = recorder()
    cuda.record(lambda: (assert_mode(debug_mode, 0),)[:0])


def assert_mode(debug_mode, mode):
    assert debug_mode.get() == mode


def test_the_first_capture_does_not_warn(debug_mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder().record(lambda: ())


@pytest.mark.parametrize("fails", [False, True])
def test_stale_streams_are_overridden_in_a_capture_alone(debug_mode, monkeypatch, fails):
    calls = []
    name = "set_override_stale_capture_stream"
    monkeypatch.setattr(torch.autograd.graph, name, calls.append, raising=False)
    getter = "_override_stale_capture_stream"
    monkeypatch.setattr(torch._C, getter, lambda: False, raising=False)

    def function():
        assert calls == [True]
        if fails:
            raise ValueError
        return ()

    with contextlib.suppress(ValueError):
        recorder().record(function)
    assert calls == [True, False]


def accumulator(p):
    return p.view_as(p).grad_fn.next_functions[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_accumulators_are_renewed_where_streams_cannot_be_overridden(monkeypatch, dtype):
    monkeypatch.delattr(torch.autograd.graph, "set_override_stale_capture_stream", raising=False)
    model = nn.Linear(3, 2, dtype=dtype)
    model.bias.requires_grad_(False)
    p, seen = model.weight, []
    p.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    logits = model(torch.ones(1, 3, dtype=dtype))
    old, address, values = accumulator(p), p.data_ptr(), p.detach().clone()
    renew_accumulators(model.parameters())
    assert accumulator(p) is not old
    assert p.data_ptr() == address
    assert torch.equal(p, values)
    logits.sum().backward()  # by the old one
    assert torch.equal(p.grad, torch.ones_like(p))
    model(torch.ones(1, 3, dtype=dtype)).sum().backward()
    assert torch.equal(p.grad, 2 * torch.ones_like(p))
    assert len(seen) == 2


def test_nothing_is_renewed_where_streams_can_be_overridden(monkeypatch):
    name = "set_override_stale_capture_stream"
    monkeypatch.setattr(torch.autograd.graph, name, lambda enabled: None, raising=False)
    p = nn.Parameter(torch.ones(1))
    held = accumulator(p)
    renew_accumulators([p])
    assert accumulator(p) is held


def test_a_warm_up_waits_for_the_caller_and_the_caller_for_it(debug_mode, monkeypatch):
    order = []
    monkeypatch.setattr(FakeStream, "wait_stream", lambda self, other: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    with pytest.raises(ValueError, match="a reason"):
        recorder().warm_up(lambda: (order.append("run"), failing())[1])
    assert order == ["wait", "run", "wait"]


def failing():
    raise ValueError("a reason")


def test_only_the_main_thread_is_seen_alone():
    before = threading.active_count()
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert not capture.is_only_thread()
    done.set()
    thread.join()
    assert threading.active_count() == before
