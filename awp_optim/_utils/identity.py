"""Identities of models and attacks for state files, stable across processes."""

from __future__ import annotations

import zlib
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from awp_optim._utils.journal import checksum

__all__ = ["identify"]


def identify(what: str, value: object, key: str | None) -> str | None:
    """A text that identifies a model or an attack, and is the same in every process.

    A module is identified by its weights, and by the classes of its submodules with the settings in
    their reprs and plain attributes, unless a class was made in a function: another may have its
    name; a dataclass of plain settings, such as an attack of this package, by its class and
    settings. Only the caller's ``key`` can identify anything else, such as a function.

    Returns:
        The text, or None if only ``key`` identifies the value.

    Raises:
        ValueError: a key is needed but missing.
    """
    if isinstance(value, nn.Module) and (key is not None or not _has_local_class(value)):
        return _module_id(value)
    if is_dataclass(value) and not isinstance(value, type):
        settings = {f.name: getattr(value, f.name) for f in fields(value)}
        if all(map(_is_plain, settings.values())):
            return f"{_class_name(value)} {settings}"
    if key is None:
        raise ValueError(
            f"a state file cannot identify {what}, {_class_name(value)}. Name it with key='...', "
            "and choose another key whenever it changes"
        )
    return None


def _has_local_class(model: nn.Module) -> bool:
    return any("<locals>" in _class_name(module) for module in model.modules())


def _module_id(model: nn.Module) -> str:
    structure = "\n".join(
        f"{name} {_class_name(module)} {module.extra_repr()} {_plain_attributes(module)}"
        for name, module in model.named_modules()
    )
    start = zlib.crc32(structure.encode())
    return f"{checksum([*model.parameters(), *model.buffers()], start):08x}"


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if _is_plain(value) and name != "training" and not name.startswith("_")
    }


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
