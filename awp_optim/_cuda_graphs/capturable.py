"""What a graph can capture of an optimizer, and how its numbers are turned between replays."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from awp_optim._cuda_graphs.graphs import as_key
from awp_optim.optimizer import AWP

__all__ = ["DeviceScalars", "frozen_settings", "may_capture_update", "structure"]

# AWP's settings that decide how an ascent goes, and SGD's and Adam's that it depends on.
_STRUCTURE = ("norm", "direction", "min_ndim", "maximize")


class DeviceScalars:
    """The groups' numbers that graphs read from the device, so that they can be turned."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._shown: dict[tuple[int, str], float] = {}

    def update(self, optimizer: Optimizer, device: torch.device) -> None:
        """Show the graphs what the groups say now."""
        for i, group in enumerate(optimizer.param_groups):
            for name in ("lr", "gamma"):
                value = group.get(name)
                if value is None or _is_live(value, device):
                    continue
                if (i, name) not in self._tensors:
                    # The fused update reads float32; gamma in float64 is exact for any weights.
                    dtype = torch.float32 if name == "lr" else torch.float64
                    with torch.inference_mode(False):
                        self._tensors[i, name] = torch.zeros((), dtype=dtype, device=device)
                if self._shown.get((i, name)) != float(value):
                    self._shown[i, name] = float(value)
                    self._tensors[i, name].fill_(self._shown[i, name])

    @contextmanager
    def installed(self, optimizer: Optimizer, base: Optimizer | None) -> Iterator[None]:
        """Inside, the groups hold the tensors; learning rates only if ``base`` is to step."""
        before = [dict(group) for group in optimizer.param_groups]
        try:
            for i, group in enumerate(optimizer.param_groups):
                for name in ("gamma", "lr"):
                    dial = self._tensors.get((i, name))
                    if dial is None or _is_live(group[name], dial.device):
                        continue
                    if name == "gamma" and is_zero(group["gamma"]):
                        continue  # a group that stays out
                    if name == "lr" and not (base and _takes_tensor_lr(base)):
                        continue  # nobody reads it
                    group[name] = dial
                if type(base) is torch.optim.SGD:  # its one implementation that leaves lr there
                    group["fused"], group["foreach"] = True, False
            yield
        finally:
            for group, settings in zip(optimizer.param_groups, before, strict=True):
                group.update(settings)


def may_capture_update(optimizer: Optimizer, base: Optimizer, device: torch.device) -> bool:
    """Whether the update can be part of a graph: nothing of it happens on the host alone."""
    own_step = optimizer is not base and type(optimizer) is not AWP
    if own_step or _has_hooks(optimizer, base):
        return False
    if type(base) is torch.optim.SGD:
        params = [p for group in base.param_groups for p in group["params"]]
        fits = all(p.device == device and p.is_floating_point() for p in params)
        for group in base.param_groups:
            lr = group["lr"]
            # Of the learning rate the fused update reads float32, as it lies on the device.
            readable = not _is_live(lr, device) or lr.dtype == torch.float32
            fits = fits and readable and not group["differentiable"]
        # The fused update starts all momenta at once, or none.
        started = {len(base.state.get(p, ())) > 0 for p in params if p.requires_grad}
        return fits and len(started) <= 1
    return all(group.get("capturable", False) for group in base.param_groups)


def _has_hooks(*optimizers: Optimizer) -> bool:
    """Whether something else happens around an update."""
    local = [
        h for o in optimizers for h in (o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks)
    ]
    shared = [
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ]
    return any(local) or any(shared)


def _takes_tensor_lr(base: Optimizer) -> bool:
    return type(base) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def frozen_settings(base: Optimizer) -> Hashable:
    """The base optimizer's settings that a captured update would not see changing."""
    turned = {"gamma", *_STRUCTURE, *(["lr"] if _takes_tensor_lr(base) else [])}
    return tuple(
        (name, as_key(group.get(name)))
        for group in base.param_groups
        for name in base.defaults
        if name not in turned or (name == "lr" and isinstance(group["lr"], Tensor))
    )


def structure(group: dict[str, Any]) -> Hashable:
    """What of a group decides how its ascent goes."""
    gamma = group.get("gamma", 0)
    return (
        len(group["params"]),
        *(group.get(name) for name in _STRUCTURE),
        gamma.data_ptr() if isinstance(gamma, Tensor) else gamma != 0,
    )


def is_zero(gamma: float | Tensor) -> bool:
    """A gamma in a tensor counts as not zero, unread."""
    return not isinstance(gamma, Tensor) and gamma == 0


def _is_live(value: Any, device: torch.device) -> bool:
    """Whether a graph reads this number from the caller's own tensor."""
    return isinstance(value, Tensor) and value.device == device
