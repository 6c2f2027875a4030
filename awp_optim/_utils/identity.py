"""What a state file belongs to: models and attacks, told apart from one process to the next."""

from __future__ import annotations

import zlib
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from awp_optim._utils.checks import describe
from awp_optim._utils.journal import checksum

__all__ = ["identify"]


def identify(what: str, value: object, key: str | None) -> str | None:
    """A text that is the same in every process for the same model or attack, and for no other.

    A module is identified by the classes and settings of its submodules, as its repr shows them,
    and by its weights; a dataclass of plain settings, such as an attack of this package, by its
    repr. Everything else, functions above all, can only be identified by the caller's ``key``.

    Returns:
        The text; None for what ``key`` has to identify.

    Raises:
        ValueError: there is no key, and it takes one.
    """
    kind = type(value)
    if isinstance(value, nn.Module):
        return _module_id(value)
    if is_dataclass(value) and all(
        f.repr and _is_plain(getattr(value, f.name)) for f in fields(value)
    ):
        return f"{kind.__module__}.{value!r}"
    if key is None:
        raise ValueError(
            f"a state file cannot tell {what} from another one, {describe(value)}: name it with "
            "key='...', and choose another key whenever it changes"
        )
    return None


def _module_id(model: nn.Module) -> str:
    parts = [
        f"{name} {type(module).__module__}.{type(module).__qualname__} {module.extra_repr()}"
        for name, module in model.named_modules()
    ]
    structure = zlib.crc32("\n".join(parts).encode())
    return f"{checksum([*model.parameters(), *model.buffers()], structure):08x}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
