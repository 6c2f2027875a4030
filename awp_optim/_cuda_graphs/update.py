"""Whether the base optimizer's update can be part of a graph."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from awp_optim._cuda_graphs.keys import as_key, parameters
from awp_optim._cuda_graphs.scalars import is_on, reads_lr_from_device
from awp_optim.optimizer import AWP

__all__ = ["UpdateKey"]

# These may change between replays or are in the key of the ascent.
_IGNORED_SETTINGS = ("gamma", "norm", "direction", "min_ndim", "maximize")


class UpdateKey:
    """Decides at each call whether the update is part of the graph, and of which graph.

    The update of :class:`torch.optim.SGD` and of optimizers built with ``capturable=True`` is, as
    long as it runs no hooks and no setting but learning rate and gamma changes.
    """

    def __init__(self, optimizer: Optimizer, base: Optimizer) -> None:
        self._optimizer, self._base = optimizer, base
        self._settings: Hashable = None
        self._settings_have_changed = False
        self._checked: Hashable = None
        self._fits = False

    def __call__(self, device: torch.device, weights_key: Hashable) -> Hashable | None:
        """What a captured update depends on; None if the update must stay outside the graph.

        Args:
            device: where the graph runs.
            weights_key: changes with the optimizer's parameters.
        """
        base = self._base
        settings = _fixed_settings(base)
        if self._settings not in (None, settings):
            self._settings_have_changed = True  # else every change would need a new graph
        self._settings = settings
        if self._settings_have_changed or not _is_replayable(self._optimizer, base):
            return None
        state = chain.from_iterable(map(dict.values, base.state.values()))
        addresses = tuple([v.data_ptr() for v in state if isinstance(v, Tensor)])
        key = (settings, addresses, device)
        if self._checked != (key, weights_key):  # the check reads every tensor's metadata
            self._checked = key, weights_key
            is_sgd = type(base) is torch.optim.SGD
            self._fits = _fits_fused_sgd(base, device) if is_sgd else _has_state(base)
        return key if self._fits else None


def _fixed_settings(base: Optimizer) -> Hashable:
    """The settings whose values are fixed in a captured update."""
    free = _IGNORED_SETTINGS + (("lr",) if reads_lr_from_device(base) else ())
    return tuple(
        as_key(group.get(name))
        for group in base.param_groups
        for name in base.defaults
        if name not in free or (name == "lr" and isinstance(group["lr"], Tensor))
    )


def _is_replayable(optimizer: Optimizer, base: Optimizer) -> bool:
    """Whether an update is SGD's or declared capturable, and runs no hooks."""
    if optimizer is not base and type(optimizer) is not AWP:  # may override step()
        return False
    if type(base) is not torch.optim.SGD and not _is_declared_capturable(base):
        return False
    # torch has no public names for the hooks.
    hooks = [
        torch_optimizer._global_optimizer_pre_hooks,  # noqa: SLF001
        torch_optimizer._global_optimizer_post_hooks,  # noqa: SLF001
    ]
    for o in (optimizer, base):
        hooks += [o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks]  # noqa: SLF001
    return not any(hooks)


def _is_declared_capturable(base: Optimizer) -> bool:
    return all(group.get("capturable", False) for group in base.param_groups)


def _has_state(base: Optimizer) -> bool:
    """Whether an optimizer has already taken its first step, which must not be captured."""
    return all(base.state.get(p) for p in parameters(base) if p.requires_grad)


def _fits_fused_sgd(base: Optimizer, device: torch.device) -> bool:
    """Whether SGD's fused update, which reads the learning rate from the device, can be used."""
    return all(
        _lr_fits(group["lr"], device)
        and not group["differentiable"]
        and all(_is_dense_on(device, p) for p in group["params"])
        and (group["momentum"] == 0 or all(_has_momentum(p, base) for p in group["params"]))
        for group in base.param_groups
    )


def _lr_fits(lr: float | Tensor, device: torch.device) -> bool:
    return not isinstance(lr, Tensor) or not is_on(device, lr) or lr.dtype == torch.float32


def _is_dense_on(device: torch.device, p: Tensor) -> bool:
    """Whether a floating-point tensor on this device is dense and non-overlapping."""
    is_dense = torch.empty_like(p, device="meta").stride() == p.stride()  # keeps dense strides
    return is_dense and p.device == device and p.is_floating_point()


def _has_momentum(p: Tensor, base: Optimizer) -> bool:
    """Whether there is a momentum buffer with the parameter's memory layout.

    Without a buffer, the update would be captured as a first step. The layout may differ after
    loading a checkpoint or after ``model.to(memory_format=torch.channels_last)``.
    """
    buffer = base.state.get(p, {}).get("momentum_buffer")
    return not p.requires_grad or (buffer is not None and buffer.stride() == p.stride())
