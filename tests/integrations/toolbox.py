"""AWP written out by hand, which every integration must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GAMMA = 0.02
SIZE = 4  # of a batch


def network(*norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *norm, nn.Tanh(), nn.Linear(8, 5)).double()


def data(batches: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SIZE * batches, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (SIZE * batches,), generator=generator)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)


def gradients(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Fresh gradients of the cross-entropy, and the loss."""
    net.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    return loss


def step_by_hand(
    params: Iterable[Tensor],
    passes: Callable[[], Tensor],
    update: Callable[[], object],
    gamma: float = GAMMA,
    ascent_steps: int = 1,
    perturbs: Callable[[Tensor], bool] = lambda p: p.ndim >= 2,
) -> Tensor:
    """Eq. (10) and (15), then ``update`` at w with the gradients taken at w + v.

    ``passes`` computes fresh gradients and returns the loss; the loss at w is returned.
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


def train_by_hand(
    net: nn.Module | None = None,
    *,
    batches: int = 1,
    clip: float | None = None,
    epochs: int = 1,
    autocast: torch.dtype | None = None,
) -> tuple[nn.Module, list[float]]:
    """A network and its losses at w after training with updates of this many batches."""
    net = network() if net is None else net
    base = sgd(net)
    schedule = halving(base)
    x, y = data()
    x = x.to(next(net.parameters()).dtype)
    losses = []
    for _ in range(epochs):
        for a, b in zip(x.split(SIZE * batches), y.split(SIZE * batches)):
            passes = partial(gradients, net, a, b, clip, autocast)
            losses.append(step_by_hand(net.parameters(), passes, base.step).item())
            schedule.step()
    return net, losses


def assert_equal(net: nn.Module, expected: nn.Module, rtol: float = 1e-9, atol: float = 1e-12):
    for (n, a), b in zip(net.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, n=n: f"{n}: {m}")


def assert_same_bits(net: nn.Module, before: dict[str, Tensor]) -> None:
    for name, t in net.state_dict().items():
        assert torch.equal(t, before[name]), name
