"""The protocol between ``torch.amp.GradScaler`` and an optimizer that unscales by itself.

After an overflow, GradScaler does not call ``step()``, which would leave the weights perturbed. It
always calls an optimizer with ``_step_supports_amp_scaling``, and sets two attributes during the
call: ``found_inf`` (nonzero after an overflow) and ``grad_scale`` (the loss scale, or None if the
gradients are already unscaled).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from awp_optim._core.dtensors import local_part

__all__ = ["clear", "is_calling", "step_base"]


def is_calling(optimizer: Optimizer) -> bool:
    """Whether GradScaler is calling this optimizer's step."""
    return hasattr(optimizer, "found_inf")


def clear(optimizer: Optimizer) -> None:
    """Remove the attributes that GradScaler leaves behind when a step raises."""
    optimizer.__dict__.pop("found_inf", None)
    optimizer.__dict__.pop("grad_scale", None)


def step_base(optimizer: Optimizer, base: Optimizer) -> None:
    """Take the base optimizer's step, unless GradScaler found an overflow in the gradients."""
    if not is_calling(optimizer):
        base.step()
        return
    grad_scale: Tensor | None = optimizer.grad_scale  # type: ignore[attr-defined]
    found_inf = torch.as_tensor(optimizer.found_inf)  # type: ignore[attr-defined] # 0 without gradients
    # A fused optimizer without state must not see an overflow, which leaves new buffers unset.
    if getattr(base, "_step_supports_amp_scaling", False) and base.state:
        base.grad_scale, base.found_inf = grad_scale, found_inf  # type: ignore[attr-defined]
        try:
            base.step()
        finally:
            clear(base)
    elif not found_inf.item():  # GradScaler reads it for most optimizers, too
        if grad_scale is not None:
            _unscale(base.param_groups, grad_scale)
        base.step()


def _unscale(groups: list[dict[str, Any]], scale: Tensor) -> None:
    """Divide all gradients by the loss scale, in place, as GradScaler.unscale_ does."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for p in (p for group in groups for p in group["params"] if p.grad is not None):
        grad = local_part(p.grad)
        if grad.dtype == torch.float16:
            raise ValueError("Attempting to unscale FP16 gradients.")
        if grad.layout == torch.strided:
            by_device.setdefault(grad.device, []).append(grad)
        else:
            grad.mul_(scale.reciprocal().to(grad.device))
    for device, grads in by_device.items():
        torch._foreach_mul_(grads, scale.reciprocal().to(device))
