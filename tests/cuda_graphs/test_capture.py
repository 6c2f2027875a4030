"""What the recorder does around a capture, with a mock of torch.cuda."""

from __future__ import annotations

import itertools
import threading
import warnings
from unittest.mock import MagicMock, Mock, call

import pytest
import torch
from torch import nn

from awp_optim._cuda_graphs.capture import CudaRecorder, is_only_thread, renew_accumulators

OVERRIDE = "set_override_stale_capture_stream"
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    """A torch.cuda that captures nothing, in a process of one thread."""
    fake = MagicMock()
    fake.get_sync_debug_mode.return_value = 0
    fake.graph_pool_handle.side_effect = itertools.count()
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    return fake


def spoil(cuda, error):
    """Raise an error that invalidates the capture, so that ending it raises another one."""
    cuda.graph.return_value.__exit__.side_effect = RuntimeError("failed due to a previous error")
    raise error


@pytest.mark.parametrize(
    "name", ["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"]
)
@pytest.mark.parametrize("ended_already", [False, True])
def test_a_spoiled_capture_ends_and_releases_its_memory(cuda, monkeypatch, name, ended_already):
    for known in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):
        monkeypatch.delattr(torch._C, known, raising=False)
    end, release = Mock(), Mock()
    if ended_already:
        end.side_effect = RuntimeError("not currently recording to mempool_id")
    monkeypatch.setattr(torch._C, name, end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    recorder = CudaRecorder(DEVICE)
    with pytest.raises(ValueError, match="the cause"):
        recorder.record(lambda: spoil(cuda, ValueError("the cause")))
    end.assert_called_once_with(0, 0)
    assert release.mock_calls == ([] if ended_already else [call(0, 0)])
    cuda.graph.return_value.__exit__.side_effect = None
    recorder.record(lambda: ())
    assert cuda.graph.call_args.kwargs["pool"] != 0


def test_ctrl_c_in_a_spoiled_capture_stays_one(cuda):
    with pytest.raises(KeyboardInterrupt):
        CudaRecorder(DEVICE).record(lambda: spoil(cuda, KeyboardInterrupt()))


@pytest.mark.parametrize("threads", [1, 2])
def test_synchronizing_is_an_error_in_a_capture_unless_other_threads_may(
    cuda, monkeypatch, threads
):
    monkeypatch.setattr(threading, "active_count", lambda: threads)
    recorder, modes = CudaRecorder(DEVICE), cuda.set_sync_debug_mode
    modes.reset_mock()
    recorder.record(lambda: modes.mock_calls[:])
    assert modes.mock_calls == ([call("error"), call(0)] if threads == 1 else [])


def test_the_first_capture_does_not_warn(cuda):
    used = []

    def warn_once(mode):
        if not used:
            warnings.warn("a prototype feature", stacklevel=1)
        used.append(mode)

    cuda.set_sync_debug_mode = warn_once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CudaRecorder(DEVICE).record(lambda: ())
    assert used


@pytest.mark.parametrize("fails", [False, True])
def test_stale_streams_are_overridden_during_a_capture(cuda, monkeypatch, fails):
    override, seen = Mock(), []
    monkeypatch.setattr(torch.autograd.graph, OVERRIDE, override, raising=False)
    monkeypatch.setattr(torch._C, "_override_stale_capture_stream", lambda: False, raising=False)

    def function():
        seen.extend(override.mock_calls)
        return spoil(cuda, ValueError()) if fails else ()

    try:
        CudaRecorder(DEVICE).record(function)
    except ValueError:
        assert fails
    assert seen == [call(True)]
    assert override.mock_calls == [call(True), call(False)]


def accumulator(p):
    return p.view_as(p).grad_fn.next_functions[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_accumulators_are_renewed_where_streams_cannot_be_overridden(monkeypatch, dtype):
    monkeypatch.delattr(torch.autograd.graph, OVERRIDE, raising=False)
    model, hook = nn.Linear(3, 2, bias=False, dtype=dtype), Mock(return_value=None)
    p, x = model.weight, torch.ones(1, 3, dtype=dtype)
    p.register_post_accumulate_grad_hook(hook)
    logits = model(x)
    old, address, values = accumulator(p), p.data_ptr(), p.detach().clone()
    renew_accumulators(model.parameters())
    assert accumulator(p) is not old
    assert p.data_ptr() == address
    assert torch.equal(p, values)
    logits.sum().backward()  # through the old one
    model(x).sum().backward()
    assert torch.equal(p.grad, torch.full_like(p, 2))
    assert hook.call_count == 2


def test_nothing_is_renewed_where_streams_can_be_overridden(monkeypatch):
    monkeypatch.setattr(torch.autograd.graph, OVERRIDE, Mock(), raising=False)
    p = nn.Parameter(torch.ones(1))
    held = accumulator(p)
    renew_accumulators([p])
    assert accumulator(p) is held


def test_another_thread_is_seen():
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert not is_only_thread()
    done.set()
    thread.join()
