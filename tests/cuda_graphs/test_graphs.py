"""The cache of graphs, by itself and around an attack."""

from __future__ import annotations

import copy
import random
import threading

import pytest
import torch
from torch import nn

from awp_optim._cuda_graphs import graphs
from awp_optim._cuda_graphs.graphs import CaptureError, Graphs
from awp_optim.attacks import PGD, Captured
from tests.toolbox import batches, mixed, network


def twice(x):
    return (x * 2,)


def test_the_least_recently_used_graph_is_dropped(graph_device, monkeypatch):
    device, counts = graph_device
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    call = Graphs(True, "it")
    # Each is captured at its third call; 3 takes the place of 2, which was used before 1.
    for n in (1, 1, 1, 2, 2, 2, 1, 3, 3, 3, 1):
        x = torch.arange(n, device=device, dtype=torch.float64)
        (y,) = call(twice, (x,), "key")
        assert torch.equal(y, x * 2)
    assert counts.captures == 3
    call(twice, (torch.ones(2, device=device, dtype=torch.float64),), "key")
    assert counts.captures == 4


def test_what_is_too_large_to_capture_runs_eagerly_and_smaller_calls_are_captured(cpu_graphs):
    record, tries = cpu_graphs.record, []

    def scarce(self, function):
        if len(function()[0]) > 2:
            tries.append(1)
            raise torch.OutOfMemoryError("no memory")
        return record(self, function)

    cpu_graphs.record = scarce
    call = Graphs("auto", "it")
    inputs = [torch.ones(n) for n in (3, 3, 3, 3, 3, 2, 2, 2, 2)]
    with pytest.warns(UserWarning, match="no memory") as warned:
        outputs = [call(twice, (x,), "key")[0] for x in inputs]
    assert all(torch.equal(y, 2 * x) for x, y in zip(inputs, outputs))
    assert (len(warned), len(tries)) == (1, 1)
    assert (cpu_graphs.captures, cpu_graphs.replays) == (1, 2)


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(()).item()])
@pytest.mark.parametrize("threads", [1, 2])
def test_host_randomness_is_not_replayed_unnoticed(graph_device, draw, threads, monkeypatch):
    device, _ = graph_device
    if device == "cpu" and draw is not random.random:
        pytest.skip("on a CPU the device's generator is the host's")
    monkeypatch.setattr(threading, "active_count", lambda: threads)
    call, x = Graphs(True, "it"), torch.ones(1, device=device)

    def run():
        for _ in range(4):
            call(lambda x: (x * draw(),), (x,), "key")

    if threads == 1:
        with pytest.raises(CaptureError, match="on the host"):
            run()
    else:
        with pytest.warns(UserWarning, match="on the host") as warned:
            run()
        assert len(warned) == 1


def test_another_threads_random_numbers_do_not_turn_graphs_off(graph_device):
    device, counts = graph_device
    call, x = Graphs("auto", "it"), torch.ones(1, device=device)
    stop = threading.Event()
    drawn = threading.Event()

    def loader():
        while not stop.is_set():
            random.random()
            drawn.set()

    def function(x):
        drawn.clear()
        assert drawn.wait(10)
        return twice(x)

    thread = threading.Thread(target=loader)
    thread.start()
    try:
        for _ in range(2):
            call(function, (x,), "key")
        with pytest.warns(UserWarning, match="another thread"):
            call(function, (x,), "key")
        for _ in range(2):
            call(function, (x,), "key")
    finally:
        stop.set()
        thread.join()
    assert counts.replays == 3


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("labels", ["indices", "probabilities"])
@pytest.mark.parametrize("model_mode", ["eval", "train"])
def test_a_captured_attack_equals_the_attack(graph_device, loss, labels, model_mode):
    device, counts = graph_device
    if device == "cuda" and loss == "kl":
        pytest.skip("a graph may draw other random numbers")
    model, twin = network(device), network(device)
    plain = PGD(0.1, 0.04, steps=3, loss=loss, model_mode=model_mode, random_start=loss == "kl")
    captured = Captured(plain, cuda_graph=True)
    data = batches(6, device)
    for i, (x, y) in enumerate(mixed(data) if labels == "probabilities" else data):
        y = None if loss == "kl" and labels == "indices" else y
        if y is not None and y.is_floating_point():
            y.requires_grad_()
        results = []
        for m, a in ((model, captured), (twin, plain)):
            torch.manual_seed(i)
            results.append(a(m, x, y))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert (counts.captures, counts.replays) == (1, 4)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.allclose(p, q, rtol=1e-6) for p, q in zip(model.buffers(), twin.buffers()))


def test_a_captured_attack_follows_its_model(graph_device):
    device, counts = graph_device
    model, other = network(device), network(device)
    plain = PGD(0.1, 0.04, steps=3, random_start=False)
    captured = Captured(plain, cuda_graph=True)
    (x, y), *_ = batches(1, device)

    def check(m):
        torch.testing.assert_close(captured(m, x, y), plain(m, x, y), rtol=1e-12, atol=1e-12)

    for _ in range(4):
        check(model)
    with torch.no_grad():
        model[0].weight.mul_(-1)  # the same memory
    check(model)
    check(other)
    assert counts.captures == 1
    state = copy.deepcopy(model.state_dict())
    state["1.running_mean"] += 1.0
    model.load_state_dict(state, assign=True)
    check(model)
    model[4].weight.data = torch.randn_like(model[4].weight)
    check(model)
    model[2] = nn.Tanh()
    check(model)


def test_functions_are_attacked_eagerly(graph_device):
    device, counts = graph_device
    model, plain = network(device), PGD(0.1, 0.04, steps=3, random_start=False)
    (x, y), *_ = batches(1, device)
    with pytest.raises(ValueError, match=r"nn\.Module"):
        Captured(plain, cuda_graph=True)(lambda x: model(x), x, y)
    captured = Captured(plain)
    for training in [False] * 5 + [True]:
        model.train(training)
        ours = captured(lambda x: model(x), x, y)
        torch.testing.assert_close(ours, plain(lambda x: model(x), x, y), rtol=1e-6, atol=1e-6)
    assert counts.captures == 0


def test_captured_checks_what_it_is_given():
    with pytest.raises(TypeError, match="attack must be"):
        Captured(lambda m, x, y: x)
    with pytest.raises(ValueError, match="cuda_graph must be"):
        Captured(PGD(), cuda_graph="maybe")
    with pytest.raises(ValueError, match="no CUDA graphs"):
        Captured(PGD(), cuda_graph=True)(network(), *batches(1)[0])
    with pytest.raises(TypeError, match="class indices"):
        Captured(PGD(loss="cw"))(network(), *mixed(batches(1))[0])
