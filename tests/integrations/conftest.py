"""A step of AWP written out by hand, which the integrations must equal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"  # before a test imports what would look for a network

Step = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture
def by_hand() -> Step:
    return step_by_hand


def step_by_hand(
    params: Iterable[Tensor],
    passes: Callable[[], Tensor],
    update: Callable[[], object],
    gamma: float = 0.02,
    ascent_steps: int = 1,
    perturbs: Callable[[Tensor], bool] = lambda p: p.ndim >= 2,
) -> Tensor:
    """Eq. (10) and (15) on dense gradients, then ``update`` at w with the gradients of w + v.

    ``passes`` takes the gradients afresh and returns the loss; that at w is returned.
    """
    params = [p for p in params if p.requires_grad]
    w = [p.detach().clone() for p in params]
    losses = []
    for _ in range(ascent_steps):
        losses.append(passes().detach())
        with torch.no_grad():
            for p, c in zip(params, w, strict=True):
                g = p.grad if p.grad is None or not p.grad.is_sparse else p.grad.to_dense()
                if g is None or not perturbs(p) or not g.any():
                    continue
                v = p - c + gamma / ascent_steps * c.norm() * g / g.norm()
                p.copy_(c + v * min(1.0, (gamma * c.norm() / v.norm()).item() if gamma else 0.0))
    passes()
    with torch.no_grad():
        for p, c in zip(params, w, strict=True):
            p.copy_(c)
    update()
    return losses[0]
