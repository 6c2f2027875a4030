"""The moving average of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from awp_optim.lab.ema import MovingAverage


def trained(model, steps=4):
    """The model after each of some changes of its parameters and statistics."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        model(torch.randn(5, 3, generator=generator))
        yield model


def test_it_is_torchs_average_to_the_last_bit():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(torch.bfloat16).float()
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ours = MovingAverage(model, 0.9)
    for step in trained(model):
        torchs.update_parameters(step)
        ours.update_parameters(step)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for name, value in torchs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("start", [0, 1, 3, 20])
def test_it_copies_until_the_start_and_then_averages(start, warmup):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ours = MovingAverage(model, 0.5, start=start, warmup=warmup)
    expected = {}
    for step, _ in enumerate(trained(model, 30)):
        ours.update_parameters(model)
        k = step - start
        decay = min(0.5, (1 + k) / (10 + k)) if warmup and k >= 0 else 0.5
        for name, value in model.state_dict().items():
            if k < 0 or step == 0:
                expected[name] = value.double().clone()
            elif value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
        for name, value in ours.module.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("saved_after", [1, 3, 5, 9])
def test_it_resumes_to_the_last_bit(saved_after):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average, resumed = (MovingAverage(model, 0.9, start=4, warmup=True) for _ in range(2))
    for step, _ in enumerate(trained(model, 15)):
        average.update_parameters(model)
        if step + 1 == saved_after:
            resumed.load_state_dict(copy.deepcopy(average.state_dict()))
        elif step + 1 > saved_after:
            resumed.update_parameters(model)
    for name, value in average.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_an_update_copies_nothing_to_the_device():
    """A copy from the host waits for the device; the meta device stands for it."""

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                copies.append(args)
            return func(*args, **(kwargs or {}))

    copies = []
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("meta")
    average = MovingAverage(model, 0.9, start=2, warmup=True)
    with Devices():
        for _ in range(4):
            average.update_parameters(model)
    assert copies == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_an_update_does_not_wait_for_the_gpu():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("cuda")
    average = MovingAverage(model, 0.9, start=2, warmup=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            average.update_parameters(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
