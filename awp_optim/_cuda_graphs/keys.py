"""What decides which graph a call may replay: the kernels, their memory and their numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["as_key", "memory_key", "module_key", "object_key", "parameters", "surroundings"]

# Attributes of modules that decide how a forward pass goes: the mode, BatchNorm's and dropout's.
_MODULE_SETTINGS = ("training", "momentum", "track_running_stats", "p")

_requires_grad = operator.attrgetter("requires_grad")


def as_key(value: Any) -> Hashable:
    """A setting as part of a key; a tensor counts by its address, a module by its state."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, nn.Module):
        return module_key(value)
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value  # type: ignore[no-any-return]


def object_key(value: object) -> Hashable:
    """An object with its attributes, such as an objective whose weight changes in training."""
    if isinstance(value, nn.Module):
        return module_key(value)
    attributes = getattr(value, "__dict__", {})
    return as_key(value), tuple((name, as_key(v)) for name, v in attributes.items())


def memory_key(tensors: Iterable[Tensor]) -> Hashable:
    """Where tensors are, and which of them require gradients."""
    tensors = list(tensors)
    return tuple(map(Tensor.data_ptr, tensors)), tuple(map(_requires_grad, tensors))


def module_key(module: nn.Module) -> Hashable:
    """A module's submodules and tensors, their modes and numbers, and where the tensors are.

    The key keeps them alive, so that no other module can have the same one.
    """
    walk = _WALKS.get(module)
    if walk is None or not walk.is_current():
        walk = _WALKS[module] = _Walk(module)
    return walk, walk.settings(), memory_key(walk.tensors)


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def surroundings(device: torch.device) -> Hashable:
    """What the code around a call may have changed."""
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


class _Walk:
    """What a walk over a module's submodules found, so that a key need not walk again.

    The walk takes most of a key's time, and modules are hardly ever replaced.
    """

    def __init__(self, module: nn.Module) -> None:
        # The attributes themselves: nn.Module's methods take as long as another walk.
        attributes = [vars(m) for m in module.modules()]
        kinds = ("_modules", "_parameters", "_buffers")
        self._registries: list[dict[str, Any]] = [a[kind] for a in attributes for kind in kinds]
        self._members = self._current_members()
        self._settings = [(_settings_getter(a), a) for a in attributes]
        self.tensors = [*module.parameters(), *module.buffers()]

    def _current_members(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._registries))]

    def is_current(self) -> bool:
        """Whether every submodule, parameter and buffer is still the same object."""
        members, known = self._current_members(), self._members
        return len(members) == len(known) and all(map(operator.is_, members, known))

    def settings(self) -> Hashable:
        return as_key(tuple([get(attributes) for get, attributes in self._settings]))


def _settings_getter(attributes: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    return operator.itemgetter(*[name for name in _MODULE_SETTINGS if name in attributes])


_WALKS: WeakKeyDictionary[nn.Module, _Walk] = WeakKeyDictionary()
