"""Keys of graphs: what decides which kernels a call runs, on which memory, with which numbers."""

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

# Module attributes that change a forward pass: the mode, and settings of BatchNorm and dropout.
_MODULE_SETTINGS = ("training", "momentum", "track_running_stats", "p")

_requires_grad = operator.attrgetter("requires_grad")


def as_key(value: Any) -> Hashable:
    """A setting as part of a key; a tensor is identified by its address, a module by its key."""
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
    """The addresses of tensors, and which of them require gradients."""
    tensors = list(tensors)
    return tuple(map(Tensor.data_ptr, tensors)), tuple(map(_requires_grad, tensors))


def module_key(module: nn.Module) -> Hashable:
    """A module's submodules, their modes and settings, and the addresses of its tensors.

    The key keeps them alive, so that no other module can have the same key.
    """
    tree = _TREES.get(module)
    if tree is None or not tree.is_current():
        tree = _TREES[module] = _ModuleTree(module)
    return tree, tree.settings(), memory_key(tree.tensors)


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def surroundings(device: torch.device) -> Hashable:
    """The modes that the code around a call may have set."""
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


class _ModuleTree:
    """A cached traversal of a module's submodules.

    The traversal takes most of the time of computing a key, and modules are rarely replaced.
    """

    def __init__(self, module: nn.Module) -> None:
        # Read attributes directly: nn.Module's methods take as long as another traversal.
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
    names = [name for name in _MODULE_SETTINGS if name in attributes]
    if not names:  # such as the module that torch.compile puts around another
        return lambda attributes: ()
    return operator.itemgetter(*names)


_TREES: WeakKeyDictionary[nn.Module, _ModuleTree] = WeakKeyDictionary()
