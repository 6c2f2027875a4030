"""Checks and calls of attacks: any function ``(model, x, y) -> x_adv``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from awp_optim._utils.checks import describe
from awp_optim._utils.model_state import buffers_restored, modes_restored

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

    The model's modes and buffers are restored, also after an exception: attacks of others may
    leave the model in another mode, and an attack in train mode changes BatchNorm's statistics.

    Raises:
        TypeError: it does not return a tensor with the shape of x.
    """
    in_eval_mode = getattr(attack, "model_mode", None) == "eval"
    with modes_restored(model), nullcontext() if in_eval_mode else buffers_restored(model):
        x_adv: Any = attack(model, x.clone(), y.clone())
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
        raise TypeError(
            f"{name} must return a tensor of shape {tuple(x.shape)}, got {describe(x_adv)}"
        )
    return x_adv.detach()
