"""Detection of the step by which ``torch.distributed.checkpoint`` creates optimizer state."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from awp_optim._core.dtensors import local_part

__all__ = ["is_state_initialization"]


def is_state_initialization(optimizer: Optimizer) -> bool:
    """Whether a step would only create the optimizer's state.

    ``torch.distributed.checkpoint.state_dict`` takes such a step before it loads a state, with a
    learning rate of 0 in every group and zero gradients.
    """
    if optimizer.state or any(float(group.get("lr", 1)) != 0 for group in optimizer.param_groups):
        return False
    params = (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
    return all(_is_zero(p.grad) for p in params)


def _is_zero(grad: Tensor | None) -> bool:
    if grad is None:
        return False
    return not local_part(grad).any()
