"""The moving average of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from awp_optim.lab.ema import MovingAverage


def trained(model):
    """The model after each of some changes of its parameters and statistics."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
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


def test_an_update_copies_nothing_to_the_device():
    """A copy from the host waits for the device; the meta device stands for it."""

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                copies.append(args)
            return func(*args, **(kwargs or {}))

    copies = []
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("meta")
    average = MovingAverage(model, 0.9)
    with Devices():
        for _ in range(3):
            average.update_parameters(model)
    assert copies == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_an_update_does_not_wait_for_the_gpu():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("cuda")
    average = MovingAverage(model, 0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            average.update_parameters(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
