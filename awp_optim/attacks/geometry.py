"""Threat balls: where an adversarial example may lie, and which way is up.

Everything that depends on the norm is here and nowhere else, so an attack is written once for every
norm. A ball is stateless; :data:`BALLS` holds one of each, by name.
"""

from __future__ import annotations

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
DTYPES = tuple(_BITS)
"""The dtypes an input may have."""


def limits(dtype: torch.dtype, clip: tuple[float, float] | None) -> tuple[float, float]:
    """The box as two numbers; no box means the finite range of ``dtype``.

    Comparing or clamping a tensor with them rounds them to its dtype: the box [0.1, 0.9] of a
    float32 image is the one between the float32 numbers nearest to 0.1 and 0.9.
    """
    finite = torch.finfo(dtype)
    return (finite.min, finite.max) if clip is None else clip


def at_least_float32(t: Tensor) -> Tensor:
    """``t`` in a dtype fit for arithmetic: half precision becomes float32."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def per_example_norm(t: Tensor, p: float) -> Tensor:
    """The p-norm of each example of ``t``, shape (N, ...), as a tensor of shape (N, 1, ..., 1)."""
    dims = tuple(range(1, t.ndim))
    return torch.linalg.vector_norm(t, p, dim=dims, keepdim=True) if dims else t.abs()


def round_toward(t: Tensor, x: Tensor) -> Tensor:
    """Round ``t`` to the dtype of ``x`` so that no element ends up further from ``x`` than it was.

    Rounding to nearest can push a point just out of the ball that it was projected on.
    """
    if t.dtype == x.dtype:
        return t
    rounded = t.to(x.dtype)
    wide = x.to(t.dtype)
    overshot = (rounded.to(t.dtype) - wide).abs() > (t - wide).abs()
    return torch.where(overshot, _next_toward(rounded, x), rounded)


def _next_toward(t: Tensor, x: Tensor) -> Tensor:
    """``torch.nextafter`` in every dtype and on every device (it lacks some half kernels)."""
    # Floats are sign and magnitude: one more in the bits is one representable number from zero.
    away_from_zero = (x > t) == (t > 0)
    bits = t.view(_BITS[t.dtype])
    moved = (bits + (away_from_zero.to(bits.dtype) * 2 - 1)).view(t.dtype)
    finite = torch.finfo(t.dtype)
    return torch.where(t == 0, x.sign() * (finite.tiny * finite.eps), moved)


def _wide(x: Tensor) -> Tensor:
    """``x`` in the widest dtype of its device: bounds computed there are exact when rounded."""
    return x.float() if x.device.type == "mps" else x.double()


class Ball(ABC):
    """A ball of one norm, of any centre and radius."""

    @abstractmethod
    def random(self, x: Tensor, eps: float) -> Tensor:
        """A random offset of norm at most ``eps`` for each example, shaped and laid out as ``x``.

        Half precision gets its offset in float32.
        """

    @abstractmethod
    def ascent(self, g: Tensor) -> Tensor:
        """The unit step along which a function with gradient ``g`` grows fastest.

        An entry of ``g`` that is not finite counts as zero; a zero gradient gives a zero step. In
        float32 at least.
        """

    @abstractmethod
    def projection(self, x: Tensor, eps: float, clip: tuple[float, float] | None) -> Projection:
        """The map onto the ball of radius ``eps`` around ``x``, cut by the box ``clip``.

        What depends on ``x`` alone is computed here, once. The map returns tensors of x's dtype,
        exactly in the box, and in the ball to within one unit in the last place. Should ``x`` lie
        outside the box, the box wins.
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
    """The Euclidean length of the change, over all elements of an example, is at most eps.

    >>> L2().ascent(torch.tensor([[3.0, -4.0]]))
    tensor([[ 0.6000, -0.8000]])
    """

    def random(self, x: Tensor, eps: float) -> Tensor:
        """A uniform direction and a uniform length, as Rice et al. (ICML 2020) start theirs."""
        d = torch.empty_like(at_least_float32(x)).normal_()
        n = per_example_norm(d, 2)
        r = torch.empty_like(n).uniform_(0, 1)
        return d.mul_(r / n.clamp_min(torch.finfo(d.dtype).tiny) * eps)

    def ascent(self, g: Tensor) -> Tensor:
        g = _finite(at_least_float32(g))
        tiny = torch.finfo(g.dtype).tiny
        # First by the largest entry: the squares of a tiny gradient would underflow to zero.
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
            # Each of the two moves every element toward x: the length cannot grow again.
            return round_toward(delta.add_(wide), x).clamp(lo, hi)

        return project


def _finite(g: Tensor) -> Tensor:
    """A copy of ``g`` in which entries that are not finite are zero."""
    return g.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


BALLS: dict[str, Ball] = {"linf": Linf(), "l2": L2()}
