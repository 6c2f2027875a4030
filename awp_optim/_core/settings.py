"""Checks of AWP's settings and of the base optimizer, in one place."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from awp_optim._core.dtensors import is_dtensor
from awp_optim._core.perturbation import NORMS

__all__ = [
    "DIRECTIONS",
    "GROUP_SETTINGS",
    "check_along",
    "check_group",
    "copy_groups",
    "is_active",
    "shared_state",
    "takes_argument",
]

DIRECTIONS = ("gradient", "random")
GROUP_SETTINGS = ("gamma", "norm", "direction", "min_ndim")
"""The settings that may differ between parameter groups."""


def is_active(group: Mapping[str, Any]) -> bool:
    """Whether a group is perturbed. A gamma in a tensor counts as nonzero: it is not read."""
    return isinstance(group["gamma"], Tensor) or group["gamma"] != 0


def check_group(group: Mapping[str, Any]) -> None:
    """Check AWP's settings in a parameter group.

    Raises:
        TypeError: ``gamma`` is neither a number nor a tensor.
        ValueError: a setting is out of its range.
    """
    gamma, norm, direction, min_ndim = (group[name] for name in GROUP_SETTINGS)
    if isinstance(gamma, Tensor):
        _check_gamma_tensor(gamma)
    elif isinstance(gamma, bool) or not isinstance(gamma, Real):
        raise TypeError(f"gamma must be a number or a 0-d tensor, got {gamma!r}")
    elif not 0 <= float(gamma) < math.inf:
        raise ValueError(f"gamma must be finite and >= 0, got {gamma}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {tuple(NORMS)}, got {norm!r}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {DIRECTIONS}, got {direction!r}")
    if not isinstance(min_ndim, int) or min_ndim < 0:
        raise ValueError(f"min_ndim must be an integer >= 0, got {min_ndim!r}")


def _check_gamma_tensor(gamma: Tensor) -> None:
    if gamma.ndim != 0 or not gamma.is_floating_point():
        raise ValueError(
            f"gamma as a tensor must be a 0-d float, got shape {tuple(gamma.shape)}, {gamma.dtype}"
        )
    # Reading it from an accelerator would wait for the device.
    if gamma.device.type == "cpu" and not 0 <= gamma.item() < math.inf:
        raise ValueError(f"gamma must be finite and >= 0, got {gamma}")


def check_along(along: Mapping[Tensor, Tensor]) -> None:
    """Check the directions that a caller passes instead of gradients.

    Raises:
        TypeError: only one of a direction and its parameter is a DTensor.
        ValueError: a direction and its parameter differ in shape.
    """
    for p, direction in along.items():
        if direction.shape != p.shape:
            raise ValueError(
                f"along holds a tensor of shape {tuple(direction.shape)} for a parameter of shape "
                f"{tuple(p.shape)}"
            )
        if is_dtensor(direction) != is_dtensor(p):
            raise TypeError(
                "along holds a plain tensor for a DTensor, or vice versa: distribute it like its "
                "parameter, with torch.distributed.tensor.distribute_tensor"
            )


def shared_state(
    base: object, settings: Mapping[str, Any], *, ascent_steps: object, foreach: bool | None
) -> dict[str, Any]:
    """Add AWP's settings to the groups of ``base``; return the attributes of an AWP around it.

    Raises:
        TypeError, ValueError: a setting is not valid, or ``base`` cannot be wrapped. Nothing
            changes.
    """
    if not isinstance(ascent_steps, int) or ascent_steps < 1:
        raise ValueError(f"ascent_steps must be an integer >= 1, got {ascent_steps!r}")
    check_group(settings)
    base = _check_base(base)
    for group in base.param_groups:
        check_group({**settings, **group})
    for group in base.param_groups:
        for name, value in settings.items():
            group.setdefault(name, value)
    base.defaults.update(settings)  # for groups that are added later
    return {"base_optimizer": base, "ascent_steps": ascent_steps, "foreach": foreach}


def _check_base(base: object) -> Optimizer:
    """Return the base optimizer if AWP can wrap it.

    Raises:
        TypeError: it is not an optimizer, is already wrapped, requires a closure (LBFGS), or its
            parameters belong to FullyShardedDataParallel (FSDP1).
        ValueError: it has a setting with the same name as one of AWP's.
    """
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must return a torch.optim.Optimizer, got {base!r:.80}")
    name = type(base).__name__
    own = set(GROUP_SETTINGS) & base.defaults.keys()
    if len(own) == len(GROUP_SETTINGS):
        raise TypeError(
            f"{name} is already wrapped by AWP: change gamma and the other settings in its "
            "param_groups instead"
        )
    if own:
        raise ValueError(
            f"{name} has settings of its own named {sorted(own)}, which AWP would overwrite: "
            "subclass it and rename them"
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{name} calls a closure several times per step, at weights that it chooses: it cannot "
            "step with gradients taken at perturbed weights"
        )
    # FSDP1 sets this attribute on its parameters, which flatten several weight tensors into one.
    if any(getattr(p, "_fsdp_flattened", False) for g in base.param_groups for p in g["params"]):
        raise TypeError(
            "FullyShardedDataParallel (FSDP1) flattens parameters, so AWP cannot compute norms "
            "of weight tensors: shard the model with torch.distributed.fsdp.fully_shard instead"
        )
    return base


def copy_groups(params: Any) -> Any:
    """The caller's parameters or groups, with groups copied.

    Optimizers write their defaults into the groups that they get; the caller's stay unchanged.
    """
    if isinstance(params, (Tensor, set)) or not isinstance(params, Iterable):
        return params  # the base optimizer refuses it
    return [dict(entry) if isinstance(entry, dict) else entry for entry in params]


def takes_argument(function: Callable[..., Any], name: str) -> bool:
    """Whether a class or function has a parameter of this name."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False
