"""Checks of an attack's inputs and labels, and of the model's outputs.

Values are read only on the CPU, because reading from another device would wait for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awp_optim._utils.checks import DTYPES, check_real, describe, is_integer
from awp_optim.attacks.balls import limits
from awp_optim.attacks.losses import Labels

Box = tuple[float, float]


def check_box(clip: object) -> Box:
    """Check the setting ``clip``, (lo, hi)."""
    try:
        lo, hi = (check_real("clip", bound) for bound in clip)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        lo, hi = 1.0, 0.0
    if not lo < hi:
        raise ValueError(
            f"clip must be (lo, hi) with lo < hi, the range of valid inputs, or None for no box,"
            f" got {clip!r}"
        )
    return lo, hi


def check_inputs(x: Tensor, clip: Box | None) -> None:
    """Check a batch of clean inputs."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        raise TypeError(
            f"x must be a tensor of dtype float64, float32, bfloat16 or float16, got {describe(x)};"
            f" convert images with x.float() / 255"
        )
    if x.ndim == 0:
        raise ValueError("x must be a batch of shape (N, ...), got a 0-d tensor")
    if not _is_readable(x) or x.numel() == 0:
        return
    smallest, largest = x.detach().aminmax()
    lo, hi = limits(x.dtype, clip)
    if not (smallest >= lo and largest <= hi):
        if not bool(x.isfinite().all()):
            raise ValueError("x holds values that are not finite")
        raise ValueError(
            f"x spans [{smallest.item():.6g}, {largest.item():.6g}], outside clip={clip}. If x is"
            f" normalized, make the normalization a layer of the model and pass the image itself;"
            f" otherwise set clip=(lo, hi) to the range of your inputs, or clip=None"
        )


def check_labels(y: Tensor | None, x: Tensor, accepted: Labels) -> None:
    """Check the labels of a batch ``x``."""
    if y is None:
        if accepted is not Labels.OPTIONAL:
            raise ValueError(
                "y is None, but this attack needs labels; only loss='kl' and 'score' do not"
            )
        return
    if accepted is Labels.ANY:
        _check_targets(y, len(x))
    elif isinstance(y, Tensor) and is_integer(y):
        _check_indices(y, len(x))
    else:
        _check_probabilities(y, len(x), accepted)
    if y.device != x.device:
        raise ValueError(f"x is on {x.device} and y on {y.device}; move them to the same device")


def check_outputs(outputs: Tensor, n: int, y: Tensor | None, accepted: Labels) -> None:
    """Check the model's outputs for ``n`` inputs, whose labels are among those in ``y``."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise TypeError(
            f"the model must return a floating-point tensor of logits, got {describe(outputs)};"
            f" wrap it in a module that does (the mode of a model in a plain function is not set)"
        )
    if accepted is Labels.ANY:
        if outputs.ndim == 0 or len(outputs) != n:
            raise ValueError(
                f"the model must return one output for each of the {n} examples, got shape"
                f" {tuple(outputs.shape)}"
            )
        return
    if outputs.ndim != 2 or len(outputs) != n:
        raise ValueError(
            f"the model must return logits of shape (N, C), here ({n}, C), got shape"
            f" {tuple(outputs.shape)}"
        )
    if y is not None:
        _check_number_of_classes(outputs.shape[1], y)


def _check_number_of_classes(classes: int, y: Tensor) -> None:
    if not is_integer(y):
        if y.shape[1] != classes:
            raise ValueError(
                f"y holds probabilities of {y.shape[1]} classes, but the model has {classes}"
            )
    elif _is_readable(y) and (largest := int(y.max())) >= classes:
        raise ValueError(
            f"label {largest} is not among the model's {classes} classes, numbered from 0"
        )


def _is_readable(t: Tensor) -> bool:
    return t.device.type == "cpu" and len(t) > 0


def _check_targets(y: Tensor, n: int) -> None:
    if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != n:
        raise ValueError(
            f"y must be a tensor with one row for each of the {n} examples, got {describe(y)}"
        )


def _check_indices(y: Tensor, n: int) -> None:
    if y.shape != (n,):
        raise ValueError(
            f"y must hold one class index for each of the {n} examples, shape ({n},), got shape"
            f" {tuple(y.shape)}; turn one-hot labels into indices with y.argmax(1) or into"
            f" probabilities with y.float()"
        )
    if _is_readable(y) and bool((y < 0).any()):
        raise ValueError(f"labels must not be negative, got {int(y.min())}")


def _check_probabilities(y: Tensor, n: int, accepted: Labels) -> None:
    if not isinstance(y, Tensor) or y.dtype not in DTYPES:
        raise TypeError(
            f"y must be a tensor of integer class indices, shape ({n},), or of floating-point"
            f" probabilities, shape ({n}, C), got {describe(y)}"
        )
    if y.ndim != 2 or len(y) != n:
        raise ValueError(
            f"y is floating-point, so it must hold class probabilities for each of the {n}"
            f" examples, shape ({n}, C), got shape {tuple(y.shape)}; class indices must be"
            f" integers, y.long()"
        )
    if accepted is Labels.INDICES:
        raise TypeError(
            f"this attack needs class indices, but y holds probabilities, {describe(y)}; set"
            f" loss='ce', which takes both, or pass y.argmax(1), the most probable classes"
        )
    if _is_readable(y):
        _check_distributions(y.detach())


def _check_distributions(y: Tensor) -> None:
    if not bool(y.isfinite().all()):
        raise ValueError("y holds probabilities that are not finite")
    if bool((y < 0).any()):
        raise ValueError(f"probabilities must not be negative, got {y.min().item():.6g}")
    total = y.double().sum(1)
    furthest = total[(total - 1).abs().argmax()].item()
    # Mixing and smoothing round each probability a few times, each time by at most eps / 2.
    if not abs(furthest - 1) <= max(1e-3, 2 * torch.finfo(y.dtype).eps):
        raise ValueError(
            f"each example's probabilities must sum to 1, got a sum of {furthest:.6g}; divide them"
            f" by y.sum(1, keepdim=True), or take the softmax if they are logits"
        )
