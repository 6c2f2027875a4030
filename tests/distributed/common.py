"""A small model, its data, and the weights it should have after twenty steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.core.toolbox import textbook

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-3)
ADAM = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=1e-2)
GAMMA = 0.05


def mlp(seed=0, hidden=10):
    """Over 4 processes its 10, 3 and 5 rows are 3 3 3 1, 1 1 1 0 and 2 2 1 0."""
    torch.manual_seed(seed)
    layers = nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 3), nn.Tanh(), nn.Linear(3, 5)
    return nn.Sequential(*layers).double()


def batches(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, 6, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(5, (n, 8), generator=generator)))


def mine(data, part, parts):
    """This process' share of every batch."""
    return [(x.chunk(parts)[part], y.chunk(parts)[part]) for x, y in data]


class Scenarios(dict[str, Any]):
    """Those of a script, by name; see forked.py."""

    def __call__(self, *counts: int) -> Callable[..., Any]:
        """Registers a function as a scenario for these numbers of processes."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self[function.__name__] = counts, function
            return function

        return register


def full(t: Tensor) -> Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def off(actual: Tensor, expected: Tensor) -> float:
    """The relative difference of two tensors."""
    return ((full(actual) - expected).norm() / expected.norm()).item()


def weights(model) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters()}


def model_off(model, expected: dict[str, Tensor]) -> float:
    return max(off(p, expected[n]) for n, p in model.named_parameters())


WAYS = [
    (ADAM, "l2", 3, None),
    (SGD, "l1", 1, None),
    (SGD, "l2", 1, None),
    (ADAM, "l1", 3, None),
    (SGD, "l2", 3, False),
]


@functools.cache
def expected(way, hidden=10):
    """The weights after twenty steps in one process, by the textbook."""
    base, norm, steps, _ = way
    return textbook(mlp(hidden=hidden), batches(20), base, lambda _: (0, GAMMA), steps, norm)
