"""Learning-rate schedules as factors of the base rate, by progress through training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

__all__ = ["SCHEDULES", "Schedule"]

Schedule = Literal["piecewise", "cosine", "cyclic", "one-cycle", "constant"]


def piecewise(t: float) -> float:
    """Divided by 10 at half of training and again at three quarters (Rice et al., 2020)."""
    return 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01


def cosine(t: float) -> float:
    """From 1 to 0 along half a cosine (Appendix C.1 of the paper)."""
    return 0.5 * (1 + math.cos(math.pi * t))


def cyclic(t: float) -> float:
    """Linearly up to 1 at 40% of training, then down to 0 (Appendix C.1, with a rate of 0.2)."""
    return t / 0.4 if t < 0.4 else (1 - t) / 0.6


def one_cycle(t: float) -> float:
    """From 1/25 up to 1 in the first 2.5%, then down to 4e-6, along half cosines.

    That of Wang et al. (2023): torch's ``OneCycleLR`` with ``pct_start=0.025``, here after every
    batch. The authors step it after every epoch: the rate of each of their epochs is one that this
    schedule has within that epoch, in the second part the one at its end. In their script, the
    momentum varies, too, between 0.85 and 0.95, which is torch's default; here it is constant.

    https://arxiv.org/abs/2302.04638
    """
    low, peak, end = 1 / 25, 0.025, 1 / 25e4
    if t < peak:
        return low + (1 - low) * (1 - cosine(t / peak))
    return end + (1 - end) * cosine((t - peak) / (1 - peak))


def constant(t: float) -> float:
    """The base rate throughout."""
    return 1.0


SCHEDULES: dict[Schedule, Callable[[float], float]] = {
    "piecewise": piecewise,
    "cosine": cosine,
    "cyclic": cyclic,
    "one-cycle": one_cycle,
    "constant": constant,
}
"""By name: from progress in [0, 1) to a factor in [0, 1]."""
