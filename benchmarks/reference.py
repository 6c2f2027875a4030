"""AT and AT-AWP as they are usually implemented: eager, with a proxy network.

Written from the description in Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust
Generalization" (NeurIPS 2020): Algorithm 2, Eq. (10) and (11), with K2 = A = 1. This is the
baseline for :class:`~awp_optim.AdversarialStep`, with the habits that cost time:

* the attack calls ``loss.backward()``, which also computes the gradients of all weights;
* v comes from a proxy network, a copy of the model that takes an SGD step in ascent direction;
* the weights are moved to w + v, updated there, and v is subtracted again, tensor by tensor.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

__all__ = ["ReferenceStep", "attack"]

_TINY = 1e-20  # avoids a division by zero where the difference is zero


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    random_start: bool = True,
) -> Tensor:
    """PGD on inputs in [0, 1]. It also computes gradients of the weights, which are not used."""
    delta = torch.zeros_like(x)
    if random_start:
        delta.uniform_(-eps, eps)
    delta = (x + delta).clamp(0, 1) - x
    for _ in range(steps):
        delta.requires_grad_()
        loss = F.cross_entropy(model(x + delta), y)
        loss.backward()  # type: ignore[no-untyped-call]
        assert delta.grad is not None
        delta = delta.detach() + step_size * delta.grad.sign()
        delta = delta.clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    return x + delta


class ReferenceStep:
    """One training step, ``loss = step(x, y)``; L_inf, cross-entropy.

    The attack runs in eval mode, everything else in train mode. The update is made at w + v
    (Eq. 11), so weight decay acts on w + v; without weight decay the weights equal those of
    AdversarialStep up to rounding.

    Args:
        model: maps inputs in [0, 1] to logits.
        optimizer: a plain torch optimizer of the model's parameters.
        gamma: size of the weight perturbation relative to each tensor's norm; 0 is plain AT,
            without a proxy network.
        eps: radius of the attack.
        step_size: length of one of its steps.
        steps: number of its steps.
        random_start: start at a random point of the ball.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        gamma: float,
        eps: float = 8 / 255,
        step_size: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.gamma = gamma
        self.eps = eps
        self.step_size = step_size
        self.steps = steps
        self.random_start = random_start
        if gamma:
            self.proxy = copy.deepcopy(model)
            # The direction of v does not depend on the learning rate.
            self.proxy_optimizer = SGD(self.proxy.parameters(), lr=0.01)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on one batch; returns the loss at w + v, detached."""
        x_adv = self._attack(x, y)
        v = self._ascend(x_adv, y) if self.gamma else {}
        loss = self._descend(x_adv, y)
        self._update(v)
        return loss.detach()

    def _attack(self, x: Tensor, y: Tensor) -> Tensor:
        self.model.eval()
        x_adv = attack(
            self.model, x, y, eps=self.eps, step_size=self.step_size, steps=self.steps,
            random_start=self.random_start,
        )  # fmt: skip
        self.model.train()
        return x_adv

    def _ascend(self, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Eq. (10): v by name, from a step of the proxy; moves the weights to w + v."""
        self.proxy.load_state_dict(self.model.state_dict())
        self.proxy.train()
        loss = -F.cross_entropy(self.proxy(x_adv), y)
        self.proxy_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.proxy_optimizer.step()
        moved = self.proxy.state_dict()
        v = {}
        for name, w in self.model.named_parameters():
            if w.ndim > 1:  # no biases, no norm layers
                difference = moved[name] - w.detach()
                v[name] = w.detach().norm() * difference / (difference.norm() + _TINY)
        self._move(v, self.gamma)
        return v

    def _descend(self, x_adv: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x_adv), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def _update(self, v: dict[str, Tensor]) -> None:
        """Eq. (11): update at w + v, then subtract v."""
        self.optimizer.step()
        self._move(v, -self.gamma)

    @torch.no_grad()
    def _move(self, v: dict[str, Tensor], by: float) -> None:
        for name, w in self.model.named_parameters():
            if name in v:
                w.add_(by * v[name])
