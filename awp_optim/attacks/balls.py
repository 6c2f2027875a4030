"""Balls of the L_inf, L_2 and L_1 norms: projection, steepest ascent, random points.

Everything that depends on the norm is in this module, so that attacks are written once for all
norms. Balls are stateless; :data:`BALLS` holds one per norm, by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Projection = Callable[[Tensor], Tensor]

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""The integer dtype that holds the bits of each input dtype."""


def limits(dtype: torch.dtype, clip: tuple[float, float] | None) -> tuple[float, float]:
    """The bounds of the box, or of the finite numbers of ``dtype`` if there is no box.

    Tensors compare and clamp with bounds rounded to their dtype: for float32 images, the bounds of
    the box [0.1, 0.9] are the float32 numbers nearest to 0.1 and 0.9.
    """
    finite = torch.finfo(dtype)
    return (finite.min, finite.max) if clip is None else clip


def at_least_float32(t: Tensor) -> Tensor:
    """``t``, converted to float32 if it is in half precision."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def per_example_norm(t: Tensor, p: float) -> Tensor:
    """The p-norm of each example of ``t``, shape (N, ...), as a tensor of shape (N, 1, ..., 1)."""
    dims = tuple(range(1, t.ndim))
    return torch.linalg.vector_norm(t, p, dim=dims, keepdim=True) if dims else t.abs()


def round_toward(t: Tensor, x: Tensor) -> Tensor:
    """Round ``t`` to the dtype of ``x`` without moving any element further away from ``x``.

    Rounding to nearest could move a projected point slightly outside its ball.
    """
    if t.dtype == x.dtype:
        return t
    rounded = t.to(x.dtype)
    wide = x.to(t.dtype)
    overshot = (rounded.to(t.dtype) - wide).abs() > (t - wide).abs()
    return torch.where(overshot, _next_toward(rounded, x), rounded)


def _next_toward(t: Tensor, x: Tensor) -> Tensor:
    """``torch.nextafter`` for every dtype and device (torch's lacks half-precision kernels)."""
    # Floats store sign and magnitude: adding 1 to the bits gives the next number away from zero.
    away_from_zero = (x > t) == (t > 0)
    bits = t.view(_BITS[t.dtype])
    moved = (bits + (away_from_zero.to(bits.dtype) * 2 - 1)).view(t.dtype)
    finite = torch.finfo(t.dtype)
    return torch.where(t == 0, x.sign() * (finite.tiny * finite.eps), moved)


def _wide(x: Tensor) -> Tensor:
    """``x`` in its device's widest dtype, so that bounds are exact before they are rounded."""
    return x.float() if x.device.type == "mps" else x.double()


class Ball(ABC):
    """The balls of one norm, with any center and radius."""

    @abstractmethod
    def random(self, x: Tensor, eps: float) -> Tensor:
        """A random offset of norm at most ``eps`` for each example, laid out like ``x``.

        The result is in float32 if ``x`` is in half precision.
        """

    @abstractmethod
    def ascent(self, g: Tensor) -> Tensor:
        """The unit step along which a function with gradient ``g`` increases fastest.

        Non-finite entries of ``g`` count as zero; a zero gradient gives a zero step. The result is
        in float32 if ``g`` is in half precision.
        """

    @abstractmethod
    def projection(self, x: Tensor, eps: float, clip: tuple[float, float] | None) -> Projection:
        """The projection onto the ball of radius ``eps`` around ``x``, intersected with ``clip``.

        It returns tensors of the dtype of ``x``, exactly in the box, and in the ball up to one unit
        in the last place. If ``x`` lies outside the box, the result is in the box.
        """


@dataclass(frozen=True)
class Linf(Ball):
    """The largest change of any element is at most eps.

    >>> Linf().ascent(torch.tensor([[3.0, -0.5, 0.0]]))
    tensor([[ 1., -1.,  0.]])
    """

    def random(self, x: Tensor, eps: float) -> Tensor:
        """Uniform in the ball (Algorithm 2, line 6)."""
        return torch.empty_like(at_least_float32(x)).uniform_(-1, 1).mul_(eps)

    def ascent(self, g: Tensor) -> Tensor:
        return _finite(at_least_float32(g)).sign_()

    def projection(self, x: Tensor, eps: float, clip: tuple[float, float] | None) -> Projection:
        lo, hi = limits(x.dtype, clip)
        wide = _wide(x)
        lower = round_toward(wide - eps, x).clamp_(lo, hi)
        upper = round_toward(wide + eps, x).clamp_(lo, hi)

        def project(z: Tensor) -> Tensor:
            return z.to(x.dtype).clamp(lower, upper)

        return project


@dataclass(frozen=True)
class L2(Ball):
    """The Euclidean length of an example's change is at most eps.

    >>> L2().ascent(torch.tensor([[3.0, -4.0]]))
    tensor([[ 0.6000, -0.8000]])
    """

    def random(self, x: Tensor, eps: float) -> Tensor:
        """A uniform direction and a uniform length, as in Rice et al. (ICML 2020)."""
        d = torch.empty_like(at_least_float32(x)).normal_()
        n = per_example_norm(d, 2)
        r = torch.empty_like(n).uniform_(0, 1)
        return d.mul_(r / n.clamp_min(torch.finfo(d.dtype).tiny) * eps)

    def ascent(self, g: Tensor) -> Tensor:
        g = _finite(at_least_float32(g))
        tiny = torch.finfo(g.dtype).tiny
        # Divide by the largest entry first: squares of tiny gradients would underflow to zero.
        g = g / per_example_norm(g, torch.inf).clamp_min(tiny)
        return g.div_(per_example_norm(g, 2).clamp_min(tiny))

    def projection(self, x: Tensor, eps: float, clip: tuple[float, float] | None) -> Projection:
        lo, hi = limits(x.dtype, clip)
        wide = _wide(x)
        tiny = torch.finfo(wide.dtype).tiny

        def project(z: Tensor) -> Tensor:
            delta = z.to(wide.dtype) - wide
            n = per_example_norm(delta, 2)
            delta.mul_((eps / n.clamp_min(tiny)).clamp_max(1))
            # Both operations move every element toward x, so the length cannot grow again.
            return round_toward(delta.add_(wide), x).clamp(lo, hi)

        return project


@dataclass(frozen=True)
class L1(Ball):
    """The sum of the absolute changes of an example is at most eps.

    >>> L1().ascent(torch.tensor([[3.0, -4.0]]))
    tensor([[ 0., -1.]])
    """

    def random(self, x: Tensor, eps: float) -> Tensor:
        """A uniform direction on the ball's surface, and a uniform length."""
        d = torch.empty_like(at_least_float32(x)).exponential_()
        d.mul_(torch.empty_like(d).bernoulli_().mul_(2).sub_(1))
        n = per_example_norm(d, 1)
        r = torch.empty_like(n).uniform_(0, 1)
        return d.mul_(r / n.clamp_min(torch.finfo(d.dtype).tiny) * eps)

    def ascent(self, g: Tensor) -> Tensor:
        """The step changes only the element with the largest derivative."""
        g = _finite(at_least_float32(g))
        flat = _rows(g)
        if flat.numel() == 0:
            return g
        at = flat.abs().argmax(1, keepdim=True)
        step = torch.zeros_like(flat).scatter_(1, at, flat.gather(1, at).sign())
        return torch.empty_like(g).copy_(step.view(g.shape))

    def projection(self, x: Tensor, eps: float, clip: tuple[float, float] | None) -> Projection:
        """The nearest point in the intersection of ball and box (Croce & Hein, ICML 2021, 3.1).

        Clipping to the box after projecting onto the ball would leave part of eps unused.
        """
        lo, hi = limits(x.dtype, clip)
        wide = _wide(x)
        tiny = torch.finfo(wide.dtype).tiny
        below, above = _rows(wide - lo), _rows(hi - wide)

        def project(z: Tensor) -> Tensor:
            delta = _rows(z.to(wide.dtype) - wide)
            size, room = delta.abs(), torch.where(delta < 0, below, above).clamp_min(0)
            shrunk = (size - _shrinkage(size, room, eps)).clamp_min(0).minimum(room)
            # The shrinkage is rounded like the sizes, which may be much larger than eps.
            shrunk.mul_((eps / shrunk.sum(1, keepdim=True).clamp_min(tiny)).clamp_max(1))
            moved = (shrunk * delta.sign()).view(x.shape)
            return round_toward(wide + moved, x).clamp(lo, hi)

        return project


def _rows(t: Tensor) -> Tensor:
    """Each example of ``t``, shape (N, ...), as a row."""
    return t.reshape(len(t), math.prod(t.shape[1:]))


def _shrinkage(size: Tensor, room: Tensor, eps: float) -> Tensor:
    """The smallest s >= 0 with sum_i min(max(size_i - s, 0), room_i) <= eps, shape (N, 1).

    As s decreases from the largest size, the sum is piecewise linear: its slope increases by 1 at
    each size_i, where an element starts to contribute, and decreases by 1 at each size_i - room_i,
    where an element reaches its bound.
    """
    s, order = torch.cat([size, (size - room).clamp_min(0)], 1).sort(1, descending=True)
    slope = torch.where(order < size.shape[1], 1, -1).cumsum(1).to(s.dtype)
    total = ((s[:, :-1] - s[:, 1:]) * slope[:, :-1]).cumsum(1)  # at s[1:]
    at = (total < eps).sum(1, keepdim=True).clamp_max(total.shape[1] - 1)
    over = total.gather(1, at) - eps
    return (s.gather(1, at + 1) + over / slope.gather(1, at).clamp_min(1)).clamp_min(0)


def _finite(g: Tensor) -> Tensor:
    """A copy of ``g`` with non-finite entries set to zero."""
    return g.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


BALLS: dict[str, Ball] = {"linf": Linf(), "l2": L2(), "l1": L1()}
