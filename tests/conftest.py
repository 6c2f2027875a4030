"""What stands in for a GPU where there is none; how several workers share the cores."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from awp_optim._core import perturbation
from awp_optim._cuda_graphs import graphs

if "PYTEST_XDIST_WORKER" in os.environ:
    # A core for each worker, and for what it starts: threads of many wait for one another.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


class Recording(TorchDispatchMode):
    """Repeats the operations it saw, on the memory it saw, as a CUDA graph does.

    Whatever the host decided or knew while recording stays as it was: numbers that are no tensors,
    branches, state kept in Python. As after a capture, nothing has been computed once it is over:
    what the operations wrote is put back.
    """

    def __init__(self):
        super().__init__()
        self.operations = []
        self._created = set()
        self._before = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        for t in leaves:
            storage = t.untyped_storage()
            if storage.data_ptr() not in self._created | self._before.keys():
                self._before[storage.data_ptr()] = storage, storage.clone()
        out = func(*args, **kwargs)
        # .data, because a replay that writes to it is unknown to autograd's version counters.
        own, (args, kwargs) = (
            tree_map_only(torch.Tensor, lambda t: t.data, t) for t in (out, (args, kwargs))
        )
        old = {t.untyped_storage().data_ptr() for t in leaves}
        new = [t for t in tree_flatten(own)[0] if isinstance(t, torch.Tensor)]
        self._created |= {t.untyped_storage().data_ptr() for t in new} - old
        self.operations.append((func, args, kwargs, own, old))
        return out

    def undo(self):
        for storage, content in self._before.values():
            storage.copy_(content)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, own, old in self.operations:
            again = func(*args, **kwargs)
            for a, t in zip(tree_flatten(again)[0], tree_flatten(own)[0]):
                # Views of the inputs, and the inputs written to, are there already.
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in old:
                    t.copy_(a)


class CpuRecorder:
    captures = 0
    replays = 0

    def __init__(self, device):
        pass

    def warm_up(self, function):
        return function()

    def record(self, function):
        type(self).captures += 1
        state = torch.get_rng_state()
        recording = Recording()
        try:
            with recording:
                outputs = function()
        finally:
            recording.undo()
            torch.set_rng_state(state)

        def replay():
            type(self).replays += 1
            recording.replay()

        return outputs, replay


@pytest.fixture
def cpu_graphs(monkeypatch):
    """Lets a CPU capture; what is returned counts ``captures`` and ``replays``."""

    class Counting(CpuRecorder):
        pass

    monkeypatch.setitem(graphs.RECORDERS, "cpu", Counting)
    monkeypatch.setattr(perturbation, "_host_may_read", lambda t: False)
    return Counting


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ]
)
def graph_device(request, monkeypatch):
    """A device that captures, and what counts ``captures`` and ``replays`` there."""
    if request.param == "cpu":
        return "cpu", request.getfixturevalue("cpu_graphs")

    class Counting(graphs.CudaRecorder):
        captures = 0
        replays = 0

        def record(self, function):
            Counting.captures += 1
            outputs, replay = super().record(function)

            def counted():
                Counting.replays += 1
                replay()

            return outputs, counted

    monkeypatch.setitem(graphs.RECORDERS, "cuda", Counting)
    return "cuda", Counting


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors as small as most tests' lose more to starting threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
