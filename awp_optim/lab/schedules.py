"""Learning-rate schedules as factors of the base rate, by progress through training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

__all__ = ["SCHEDULES", "Schedule"]

Schedule = Literal["piecewise", "cosine", "cyclic", "constant"]


def piecewise(t: float) -> float:
    """Divided by 10 at half of training and again at three quarters (Rice et al., 2020)."""
    return 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01


def cosine(t: float) -> float:
    """From 1 to 0 along half a cosine (Appendix C.1 of the paper)."""
    return 0.5 * (1 + math.cos(math.pi * t))


def cyclic(t: float) -> float:
    """Linearly up to 1 at 40% of training, then down to 0 (Appendix C.1, with a rate of 0.2)."""
    return t / 0.4 if t < 0.4 else (1 - t) / 0.6


def constant(t: float) -> float:
    """The base rate throughout."""
    return 1.0


SCHEDULES: dict[Schedule, Callable[[float], float]] = {
    "piecewise": piecewise,
    "cosine": cosine,
    "cyclic": cyclic,
    "constant": constant,
}
"""By name: from progress in [0, 1) to a factor in [0, 1]."""
