"""A small network with BatchNorm and dropout, images for it, and what tests of landscapes share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from awp_optim.attacks import PGD
from awp_optim.landscape import filter_normalized_direction

ALPHAS = [-1.0, -0.5, 0.0, 0.25, 1.0]
ATTACK = PGD(eps=0.1, step_size=0.04, steps=4)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(64, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3),
        )  # fmt: skip
        with torch.no_grad():
            model(torch.rand(64, 2, 4, 4))  # BatchNorm's statistics
        return model.eval()


def images(n: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 2, 4, 4, generator=g), torch.randint(3, (n,), generator=g)


def gaussian(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    return filter_normalized_direction(model, torch.Generator().manual_seed(seed))


def gaussians(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    return [gaussian(model, seed) for seed in range(count)]


def moved(model: nn.Module, d: dict[str, Tensor], alpha: float) -> nn.Module:
    """A copy of a model at w + alpha d."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p += alpha * d[name]
    return other


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_restored(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Counting:
    """An attack that counts its calls, and stops at one of them."""

    def __init__(self, stop_at: int = 10**9) -> None:
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return ATTACK(model, x, y)
