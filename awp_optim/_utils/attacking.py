"""Checks and calls of attacks: any function ``(model, x, y) -> x_adv``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from awp_optim._utils.checks import describe

__all__ = ["check_attack", "perturb"]


def check_attack(name: str, attack: object) -> None:
    """Raise TypeError if this cannot be called as an attack."""
    if isinstance(attack, type):
        raise TypeError(
            f"{name} is the class {attack.__name__}: pass an instance, {attack.__name__}(...)"
        )
    if not callable(attack):
        raise TypeError(f"{name} must be callable, got {describe(attack)}")


def perturb(
    name: str,
    attack: Callable[..., Tensor],
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
) -> Tensor:
    """The attack's adversarial examples. It gets copies of x and y, which it may modify.

    The model's buffers are restored, also after an exception: an attack in train mode changes
    BatchNorm's statistics.

    Raises:
        TypeError: it does not return a tensor with the shape of x.
    """
    in_eval_mode = getattr(attack, "model_mode", None) == "eval"
    buffers = [] if in_eval_mode or not isinstance(model, nn.Module) else list(model.buffers())
    before = [b.clone() for b in buffers]
    try:
        x_adv: Any = attack(model, x.clone(), y.clone())
    finally:
        with torch.no_grad():
            for b, saved in zip(buffers, before, strict=True):
                b.copy_(saved)
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
        raise TypeError(
            f"{name} must return a tensor of shape {tuple(x.shape)}, got {describe(x_adv)}"
        )
    return x_adv.detach()
