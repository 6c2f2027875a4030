"""Training with and without graphs."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from awp_optim import AWP, AdversarialStep
from awp_optim.attacks import PGD
from tests.toolbox import network

SGD = torch.optim.SGD


def awp(model, base=SGD, **kwargs):
    kwargs = {"gamma": 0.0625, "lr": 0.125, "momentum": 0.875, **kwargs}
    return AWP(model.parameters(), base, **kwargs)


def attack(device, **kwargs):
    # A GPU's graph may draw other random numbers than the launches it stands for.
    return PGD(0.1, 0.04, steps=3, random_start=device == "cpu", **kwargs)


def run(step, data, before=lambda i: None):
    torch.manual_seed(3)
    outputs = []
    for i, (x, y) in enumerate(data):
        before(i)
        outputs.append(step(x, y))
    return outputs


def trained(device, mode, data, make=awp, before=lambda i, opt, model: None, **kwargs):
    model = network(device)
    opt = make(model)
    settings = {"attack": attack(device), **kwargs}
    step = AdversarialStep(model, opt, cuda_graph=mode, **settings)
    outputs = run(step, data, lambda i: before(i, opt, model))
    return model, outputs, step


def is_capturing(t):
    if t.is_cuda:
        return torch.cuda.is_current_stream_capturing()
    return is_in_torch_dispatch_mode()


def graphs_of(step):
    return step._captured._graphs


def assert_same(a, b, outputs_a=(), outputs_b=(), rtol=None):
    """Exactly, except for the order of sums on a GPU."""
    cuda = next(a.parameters()).is_cuda
    rtol = rtol if rtol is not None else 1e-7 if cuda else 1e-12
    for i, (ours, theirs) in enumerate(zip(outputs_a, outputs_b, strict=True)):
        for name, s, t in zip(ours._fields, ours, theirs):
            torch.testing.assert_close(
                s, t, rtol=rtol, atol=rtol, msg=lambda m, n=name, i=i: f"{n} of step {i}: {m}"
            )
    for (name, s), t in zip(a.state_dict().items(), b.state_dict().values()):
        torch.testing.assert_close(s, t, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def assert_captured_equals_eager(graph_device, data, captures=1, replays=4, rtol=None, **kwargs):
    """Train twice, with graphs and without; return the captured step."""
    device, counts = graph_device
    eager, truth, _ = trained(device, False, data, **kwargs)
    model, outputs, step = trained(device, True, data, **kwargs)
    assert_same(model, eager, outputs, truth, rtol)
    assert captures in (None, counts.captures)
    assert counts.replays >= replays
    return step
