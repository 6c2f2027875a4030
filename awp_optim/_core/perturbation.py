"""Layer-wise adversarial weight perturbation, as pure functions over lists of tensors.

With ``w`` the weights at the centre, ``g`` a direction (the gradient at ``w + v``) and one ``l``
for each parameter tensor, one ascent is Eq. (10) and (15) of Wu, Xia & Wang, "Adversarial Weight
Perturbation Helps Robust Generalization" (NeurIPS 2020)::

    v_l <- P( v_l + gamma / steps * |w_l| * g_l / |g_l| )
    P(v_l) = v_l * min(1, gamma * |w_l| / |v_l|)

Lists hold tensors of one device and one dtype. Norms are taken, and half-precision weights are
perturbed, in float32. Nothing here makes an accelerator wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["NORMS", "ascend_", "layer_norms"]

Tensors = list[Tensor] | tuple[Tensor, ...]
Whole = Callable[[Tensor], Tensor]

NORMS = {"l1": 1, "l2": 2}

# A float32 reduction on the CPU keeps few partial sums: over 1e8 elements the L2 norm comes out 1%
# short, the L1 norm 15%. Norms of pieces of this many elements, combined, are right to about 1e-6.
_PIECE = 2**18

# From so many of so few elements on, tensors of one shape are copied side by side for their norms.
_SMALL, _FEW = 2**12, 8

# Device types on which a layer is moved by one kernel; on a CPU nothing needs a veto.
_FUSED = {"cuda"}
_NHWC = torch.channels_last


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of ``dtype`` is perturbed: its own, but float32 for halves."""
    return torch.promote_types(dtype, torch.float32)


def layer_norms(tensors: Tensors, norm: str = "l2", *, foreach: bool = True) -> Tensor:
    """The norm of each tensor as a whole.

    Args:
        tensors: L tensors of any shapes, real or complex.
        norm: "l1" (sum of moduli) or "l2" (Frobenius).
        foreach: one call for all tensors instead of one for each.

    Returns:
        A real tensor of shape (L,) in float32, or float64 where the tensors are.

    Example:
        >>> layer_norms([torch.tensor([3.0, 4.0]), torch.ones(2, 2)])
        tensor([5., 2.])
    """
    if not foreach:
        return torch.stack([_norm(t, norm) for t in tensors])
    if len(tensors) == 0 or tensors[0].device.type != "cpu":
        return torch.stack(_foreach_norm(tensors, norm))
    return _layer_norms_on_cpu(tensors, norm)


def _layer_norms_on_cpu(tensors: Tensors, norm: str) -> Tensor:
    """Where an operation on a list is a loop: wide tensors in pieces, small ones side by side."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, t in enumerate(tensors):
        by_shape.setdefault(t.shape, []).append(i)
    norms: list[Tensor] = []
    order: list[int] = []
    one_by_one: list[int] = []
    for shape, indices in by_shape.items():
        numel = shape.numel()
        if numel > _PIECE:
            norms += [_norm(tensors[i], norm)[None] for i in indices]
        elif numel > _SMALL or len(indices) < _FEW:
            one_by_one += indices
            continue
        else:
            stacked = torch.stack([tensors[i] for i in indices]).reshape(len(indices), numel)
            wider = _wider(stacked.dtype)
            norms.append(torch.linalg.vector_norm(stacked, NORMS[norm], 1, dtype=wider))
        order += indices
    if one_by_one:
        one_by_one.sort()
        norms.append(torch.stack(_foreach_norm([tensors[i] for i in one_by_one], norm)))
        order += one_by_one
    if len(norms) == 1:
        return norms[0]
    in_order = torch.empty(len(tensors), dtype=norms[0].dtype)
    in_order[order] = torch.cat(norms)
    return in_order


def ascend_(
    params: Tensors,
    grads: Tensors,
    centres: Tensors,
    weight_norms: Tensor,
    grad_norms: Tensor,
    *,
    gamma: float | Tensor,
    steps: int,
    norm: str = "l2",
    at_centre: bool = False,
    foreach: bool = True,
    whole: Whole | None = None,
) -> None:
    """One ascent in place: ``params`` go from ``w + v`` to ``w + P(v + gamma/steps |w| g/|g|)``.

    A layer keeps its v where ``|w|/|g|`` is not a finite positive number: a zero weight, a zero
    gradient, a gradient with an infinity or a NaN.

    Args:
        params: L tensors holding ``w + v``; written.
        grads: the directions, shaped like ``params``; read alone.
        centres: L tensors holding ``w``; read alone.
        weight_norms: ``|w_l|``, shape (L,).
        grad_norms: ``|g_l|``, shape (L,).
        gamma: the radius relative to ``|w_l|``; a float or a 0-d tensor on the same device.
        steps: the number of ascents that ``gamma`` is spread over.
        norm: the norm in which v is bounded, "l1" or "l2".
        at_centre: the caller knows that v is zero, so that the first ascent can be added as it is.
        foreach: ``torch._foreach_*`` instead of a readable loop; equal but for rounding.
        whole: for layers of which only a part is here: turns the norms of parts, of any shape (N,),
            into those of the whole layers, as ``weight_norms`` and ``grad_norms`` must be. Called
            once with ``foreach``, else for each layer that moves; never ``at_centre``.
    """
    scale = gamma / steps * weight_norms / grad_norms
    radius = gamma * weight_norms
    finite = scale.isfinite() & grad_norms.isfinite()
    mask: Tensor | None = None
    if _host_may_look(scale):
        # Leave out the layers that do not move.
        moves = finite.tolist()
        if not all(moves):
            params, grads, centres = (
                [t for t, m in zip(tensors, moves, strict=True) if m]
                for tensors in (params, grads, centres)
            )
            scale, radius = scale[finite], radius[finite]
        if not params:
            return
    else:
        scale, mask = scale.where(finite, 0), finite
    ascend = _foreach_ascend_ if foreach else _single_tensor_ascend_
    ascend(params, grads, centres, scale, mask, radius, norm, at_centre, whole or _all_here)


def _single_tensor_ascend_(
    params: Tensors,
    grads: Tensors,
    centres: Tensors,
    scale: Tensor,
    mask: Tensor | None,
    radius: Tensor,
    norm: str,
    at_centre: bool,
    whole: Whole,
) -> None:
    """The equations as they stand, one layer after another."""
    dtype = arithmetic_dtype(params[0].dtype)
    for i, (p, g, w) in enumerate(zip(params, grads, centres, strict=True)):
        w = w.to(dtype)
        v = p.to(dtype) - w + scale[i] * _where(mask, i, g.to(dtype))
        if not at_centre:
            v = v * _shrink(whole(_norm(v, norm).view(1))[0], radius[i])
        p.copy_(w + v)


def _foreach_ascend_(
    params: Tensors,
    grads: Tensors,
    centres: Tensors,
    scale: Tensor,
    mask: Tensor | None,
    radius: Tensor,
    norm: str,
    at_centre: bool,
    whole: Whole,
) -> None:
    """The same in few passes, with temporaries for half-precision weights alone."""
    half = arithmetic_dtype(params[0].dtype) != params[0].dtype
    scales: Tensors = scale.unbind()
    if half:
        # A scale with its layer's number of dimensions takes part in type promotion: v is float32.
        scales = [s.view((1,) * p.ndim) for s, p in zip(scales, params, strict=True)]
        if mask is not None:
            grads = [_where(mask, i, g) for i, g in enumerate(grads)]
        v = torch._foreach_mul(grads, scales)
        if not at_centre:
            torch._foreach_add_(v, params)
            torch._foreach_sub_(v, centres)
    else:
        v = tuple(params)
        if not at_centre:
            torch._foreach_sub_(v, centres)
        if mask is None:
            torch._foreach_addcmul_(v, grads, scales)
        else:
            # No foreach operation clears a NaN, and none fuses scales that lie on the device.
            skips = mask.logical_not().to(scale.dtype).unbind()
            for i, (v_l, g, s) in enumerate(zip(v, grads, scales, strict=True)):
                if _has_fused_add(v_l, g, s):
                    _fused_add_(v_l, g, s, skips[i])
                else:
                    v_l.addcmul_(_where(mask, i, g), s)
    if not at_centre:
        torch._foreach_mul_(v, _shrink(whole(layer_norms(v, norm)), radius).unbind())
    if half or not at_centre:  # else v was added to the weights in place
        torch._foreach_add_(v, centres)
    if half:
        torch._foreach_copy_(params, v)


def _all_here(norms: Tensor) -> Tensor:
    return norms


def _host_may_look(t: Tensor) -> bool:
    """Whether reading ``t`` makes nobody wait, and what is read is true of later runs, too."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _has_fused_add(v: Tensor, g: Tensor, scale: Tensor) -> bool:
    return (
        v.device.type in _FUSED
        and v.is_floating_point()  # not complex
        and v.dtype == g.dtype
        and scale.dtype == torch.float32  # what the kernel reads
        and v.numel() > 0  # the part of a layer may be empty
        and v.stride() == g.stride()
        and (v.is_contiguous() or (v.ndim == 4 and v.is_contiguous(memory_format=_NHWC)))
    )


def _fused_add_(v: Tensor, g: Tensor, scale: Tensor, skip: Tensor) -> None:
    """``v += scale * g`` in one pass over each, or nothing where ``skip`` is 1.

    This is the update of ``torch.optim.SGD(fused=True)``, the one kernel of torch that takes both
    its factor and its veto from the device. Two kernels would read and write g once more.
    """
    torch._fused_sgd_(
        [v],
        [g],
        [],
        lr=scale,
        weight_decay=0.0,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=skip,
    )


def _shrink(norms: Tensor, radius: Tensor) -> Tensor:
    """The factor of Eq. (15): 1 inside the ball, radius/norm outside."""
    return torch.where(norms > radius, radius / norms, 1.0)


def _where(mask: Tensor | None, i: int, g: Tensor) -> Tensor:
    """Layer i's direction, or zeros where it is not to be used: 0 * inf would be NaN."""
    return g if mask is None else g.where(mask[i], 0)


def _norm(tensor: Tensor, norm: str) -> Tensor:
    if not _is_wide(tensor):
        return _foreach_norm([tensor], norm)[0]
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor
    pieces = torch.split(flat, max(1, _PIECE * len(flat) // flat.numel()))
    return _foreach_norm([torch.stack(_foreach_norm(pieces, norm))], norm)[0]


def _foreach_norm(tensors: Tensors, norm: str) -> Tensors:
    if not tensors:
        return ()
    return torch._foreach_norm(tensors, NORMS[norm], dtype=_wider(tensors[0].dtype))


def _wider(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype to take a norm in, where it is another."""
    wider = arithmetic_dtype(dtype)
    return None if wider == dtype else wider


def _is_wide(tensor: Tensor) -> bool:
    return tensor.numel() > _PIECE and tensor.device.type == "cpu"
