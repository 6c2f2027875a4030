"""A small convolutional network and its data, for tests of the step, of devices and of graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def network(device: str = "cpu", dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    )
    return model.to(device, dtype)


Batches = list[tuple[Tensor, Tensor]]


def batches(n: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Batches:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 8, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n, 8), generator=generator)
    return list(zip(x.to(device, dtype), y.to(device)))


def mixed(data: Batches, share: float = 0.7, dtype: torch.dtype = torch.float32) -> Batches:
    """The labels as probabilities, each with some of its neighbor's."""
    one_hot = [(x, torch.eye(3, device=y.device)[y]) for x, y in data]
    return [(x, (share * p + (1 - share) * p.roll(1, 0)).to(dtype)) for x, p in one_hot]
