"""Checks of settings and arguments, and descriptions of values for error messages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "check_bool",
    "check_choice",
    "check_int",
    "check_positive",
    "check_real",
    "describe",
    "is_integer",
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that inputs may have."""


def check_choice(name: str, value: object, options: Iterable[str]) -> None:
    """Check a setting that is one of several strings."""
    options = tuple(options)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Check a setting that is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_real(name: str, value: object) -> float:
    """Check a setting that is a finite number, and return it as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def check_positive(name: str, value: object) -> float:
    """Check a setting that is a finite number above zero, and return it as a float."""
    number = check_real(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be above 0, got {number!r}")
    return number


def check_int(name: str, value: object, least: int) -> int:
    """Check a setting that is an integer >= ``least``, and return it as an int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def is_integer(t: Tensor) -> bool:
    """Whether a tensor has an integer dtype (bool does not count)."""
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def describe(value: object) -> str:
    """The type of a value and the value itself, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype} and shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r:.80}"
