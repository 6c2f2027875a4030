"""What the tests of the attacks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn


def small_cnn(dtype: torch.dtype = torch.float32, classes: int = 5, seed: int = 0) -> nn.Sequential:
    """A random network with BatchNorm whose statistics are neither fresh nor trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(8 * 9, classes),
        )
        model.train()
        model(torch.rand(32, 3, 8, 8))
    return model.to(dtype).eval()


@pytest.fixture
def cnn() -> nn.Sequential:
    return small_cnn()


@pytest.fixture
def cnn64() -> nn.Sequential:
    return small_cnn(torch.float64)


def images(n: int = 6, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images with black and white pixels among them, and labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 8, 8, generator=g, dtype=torch.float64).mul(1.4).sub(0.2).clamp(0, 1)
    return x.to(dtype), torch.randint(5, (n,), generator=g)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return images()


@pytest.fixture
def batch64() -> tuple[Tensor, Tensor]:
    return images(dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small lose more to starting threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
