"""The weight perturbation of AWP, as functions over lists of tensors.

With w_l an unperturbed weight tensor, w + v the current weights and g_l a direction (the gradient
at w + v), one ascent is Eq. (10) and (15) of Wu, Xia & Wang, "Adversarial Weight Perturbation Helps
Robust Generalization" (NeurIPS 2020)::

    v_l <- P( v_l + eta_2 * |w_l| * g_l / |g_l| ),   eta_2 = gamma / steps
    P(v_l) = v_l * min(1, gamma * |w_l| / |v_l|)

The tensors of a list share one device and one dtype. Norms are computed in float32 at least, and
half-precision weights are perturbed in float32. Nothing here waits for an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["NORMS", "arithmetic_dtype", "ascend_", "layer_norms"]

Tensors = list[Tensor] | tuple[Tensor, ...]
Shrink = Callable[[Tensors, Tensor], Tensor]

NORMS = {"l1": 1, "l2": 2}

# A float32 sum on the CPU keeps few partial sums: over 1e8 elements, the L2 norm is 1% too small,
# the L1 norm 15 to 46%. Combining the norms of pieces of this size is accurate to about 1e-6.
_PIECE = 2**18


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of ``dtype`` is perturbed: float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)


def layer_norms(tensors: Tensors, norm: str = "l2", *, foreach: bool = True) -> Tensor:
    """The norm of each tensor.

    Args:
        tensors: L tensors of any shapes, real or complex.
        norm: "l1" (sum of moduli) or "l2" (Frobenius).
        foreach: compute all norms in one call.

    Returns:
        A real tensor of shape (L,) in float32, or float64 if the tensors are float64.

    Example:
        >>> layer_norms([torch.tensor([3.0, 4.0]), torch.ones(2, 2)])
        tensor([5., 2.])
    """
    if foreach and not any(map(_needs_pieces, tensors)):
        dtype = arithmetic_dtype(tensors[0].dtype)
        return torch.stack(torch._foreach_norm(tensors, NORMS[norm], dtype=dtype))
    return torch.stack([_norm(t, NORMS[norm]) for t in tensors])


def _norm(tensor: Tensor, order: int) -> Tensor:
    dtype = arithmetic_dtype(tensor.dtype)
    if not _needs_pieces(tensor):
        return _vector_norm(tensor, order, dtype)
    rows = tensor.view(-1) if tensor.is_contiguous() else tensor
    pieces = torch.split(rows, max(1, _PIECE * len(rows) // rows.numel()))
    norms = torch.stack([_vector_norm(piece, order, dtype) for piece in pieces])
    return _vector_norm(norms, order, norms.dtype)


def _vector_norm(tensor: Tensor, order: int, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, order, dtype=dtype)
    return norm


def _needs_pieces(tensor: Tensor) -> bool:
    return tensor.numel() > _PIECE and tensor.device.type == "cpu"


def ascend_(
    params: Tensors,
    directions: Tensors,
    weights: Tensors,
    weight_norms: Tensor,
    direction_norms: Tensor,
    *,
    gamma: float | Tensor,
    steps: int,
    norm: str = "l2",
    is_first: bool = False,
    foreach: bool = True,
    reduce_norms: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Change ``params`` in place from ``w + v`` to ``w + P(v + gamma/steps |w| g/|g|)``.

    A tensor keeps its v if ``|g|`` or ``|w|/|g|`` is not finite, because its gradient is zero or
    holds an infinity or a NaN.

    Args:
        params: L tensors that hold ``w + v``; written.
        directions: g, shaped like ``params``; only read.
        weights: the unperturbed weights w, shaped like ``params``; only read.
        weight_norms: ``|w_l|``, shape (L,).
        direction_norms: ``|g_l|``, shape (L,).
        gamma: radius of the ball relative to ``|w_l|``; a float or a 0-d tensor on the same device.
        steps: number of ascents over which ``gamma`` is spread.
        norm: the norm of the ball, "l1" or "l2".
        is_first: whether v is zero. The first ascent cannot leave the ball, so it skips P.
        foreach: use ``torch._foreach_*`` instead of a readable loop; equal up to rounding.
        reduce_norms: for distributed tensors: turns norms of local parts, of any shape (N,), into
            norms of full tensors, which ``weight_norms`` and ``direction_norms`` already are. Not
            called if ``is_first``.
    """
    scale = gamma / steps * weight_norms / direction_norms
    usable = scale.isfinite() & direction_norms.isfinite()
    radius = gamma * weight_norms
    if _host_may_read(usable):
        kept = usable.nonzero().flatten().tolist()
        if len(kept) < len(params):
            params, directions, weights = (
                [tensors[i] for i in kept] for tensors in (params, directions, weights)
            )
            scale, usable, radius = scale[kept], usable[kept], radius[kept]
        if not kept:
            return
        mask = None
    else:
        mask, scale = usable, scale.where(usable, 0)

    def shrink(v: Tensors, radius: Tensor) -> Tensor:
        """The factors of P, shape (L,): 1 inside the ball, radius/norm outside."""
        norms = layer_norms(v, norm, foreach=foreach)
        if reduce_norms is not None:
            norms = reduce_norms(norms)
        return torch.where(norms > radius, radius / norms, 1.0)

    if not foreach:
        ascend = _single_tensor_ascend_
    elif arithmetic_dtype(params[0].dtype) == params[0].dtype:
        ascend = _foreach_ascend_
    else:
        ascend = _foreach_ascend_half_
    ascend(params, directions, weights, scale, mask, radius, None if is_first else shrink)


def _single_tensor_ascend_(
    params: Tensors,
    directions: Tensors,
    weights: Tensors,
    scale: Tensor,
    mask: Tensor | None,
    radius: Tensor,
    shrink: Shrink | None,
) -> None:
    """The equations as written, one tensor at a time."""
    dtype = arithmetic_dtype(params[0].dtype)
    directions = _zeroed_where_unusable(directions, mask)
    for p, g, w, s, r in zip(params, directions, weights, scale, radius, strict=True):
        v = p.to(dtype) - w.to(dtype) + s * g.to(dtype)
        if shrink is not None:
            v = v * shrink([v], r)[0]
        p.copy_(w.to(dtype) + v)


def _foreach_ascend_(
    params: Tensors,
    directions: Tensors,
    weights: Tensors,
    scale: Tensor,
    mask: Tensor | None,
    radius: Tensor,
    shrink: Shrink | None,
) -> None:
    """The same with fewer passes over memory: v is computed in the parameters' memory."""
    if shrink is None:
        _foreach_add_scaled_(params, directions, scale, mask)
        return
    torch._foreach_sub_(params, weights)
    _foreach_add_scaled_(params, directions, scale, mask)
    torch._foreach_mul_(params, shrink(params, radius).unbind())
    torch._foreach_add_(params, weights)


def _foreach_ascend_half_(
    params: Tensors,
    directions: Tensors,
    weights: Tensors,
    scale: Tensor,
    mask: Tensor | None,
    radius: Tensor,
    shrink: Shrink | None,
) -> None:
    """The same for half-precision parameters: v is computed in float32 temporaries."""
    # A scale with as many dimensions as its tensor takes part in type promotion.
    scales = [s.view((1,) * p.ndim) for s, p in zip(scale, params, strict=True)]
    v = torch._foreach_mul(_zeroed_where_unusable(directions, mask), scales)
    if shrink is not None:
        torch._foreach_add_(v, params)
        torch._foreach_sub_(v, weights)
        torch._foreach_mul_(v, shrink(v, radius).unbind())
    torch._foreach_add_(v, weights)
    torch._foreach_copy_(params, v)


def _foreach_add_scaled_(
    tensors: Tensors, directions: Tensors, scale: Tensor, mask: Tensor | None
) -> None:
    """``tensors += scale * directions`` where ``mask`` is True."""
    if mask is None:
        torch._foreach_addcmul_(tensors, directions, scale.unbind())
        return
    # No foreach operation can skip a NaN under a condition on the device. One fused kernel can.
    veto = mask.logical_not().to(scale.dtype)
    for i, (t, g) in enumerate(zip(tensors, directions, strict=True)):
        if _has_fused_add(t, g, scale):
            _fused_add_(t, g, scale[i], veto[i])
        else:
            t.addcmul_(g.where(mask[i], 0), scale[i])


def _has_fused_add(t: Tensor, g: Tensor, scale: Tensor) -> bool:
    return (
        t.device.type in _FUSED
        and t.dtype == g.dtype
        and t.is_floating_point()
        and scale.dtype == torch.float32  # the kernel reads no other
        and t.numel() > 0
        and t.stride() == g.stride()
        and (t.is_contiguous() or (t.ndim == 4 and t.is_contiguous(memory_format=_CHANNELS_LAST)))
    )


_FUSED = {"cuda"}
_CHANNELS_LAST = torch.channels_last


def _fused_add_(t: Tensor, g: Tensor, scale: Tensor, veto: Tensor) -> None:
    """``t += scale * g`` in one pass over both, or nothing if ``veto`` is 1.

    This is the update of ``torch.optim.SGD(fused=True)``, the one kernel of torch that reads both
    its factor and a condition from the device. Two kernels would read and write g once more.
    """
    torch._fused_sgd_(
        [t],
        [g],
        [],
        lr=scale,
        weight_decay=0.0,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=veto,
    )


def _zeroed_where_unusable(directions: Tensors, mask: Tensor | None) -> Tensors:
    """The directions, with zeros for unusable ones: a scale of 0 times infinity would be NaN."""
    if mask is None:
        return directions
    return [g.where(m, 0) for g, m in zip(directions, mask, strict=True)]


def _host_may_read(t: Tensor) -> bool:
    """Whether the host can read ``t`` without waiting for a device or being traced."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()
