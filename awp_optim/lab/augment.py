"""Augmentation of a batch at once, on any device: crop and flip, cutout, mixup, CutMix.

Each consists of two functions: one draws the random numbers, the other applies them. Neither waits
for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Beta

__all__ = [
    "crop_flip",
    "cut_square",
    "cutmix",
    "cutout",
    "draw",
    "erase",
    "mix",
    "mixup",
    "paste",
    "random_crop_flip",
    "sample",
]


def random_crop_flip(
    x: Tensor, padding: int = 4, generator: torch.Generator | None = None
) -> Tensor:
    """Pad each image with zeros, crop it at a random offset, and mirror half of the images.

    Each of the ``(2 * padding + 1)**2`` offsets is equally likely; an image is mirrored (left to
    right) with probability 1/2.

    Args:
        x: Images, any dtype, shape (N, C, H, W). Zero is black for images in [0, 255] or [0, 1].
        padding: Pixels of padding on each side; 0 means no crop.
        generator: Source of the random numbers; on the device of ``x`` it saves a copy.

    Returns:
        A new contiguous tensor with the shape, dtype and device of ``x``.

    Raises:
        ValueError: ``x`` does not have four dimensions or ``padding`` is negative.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be of shape (N, C, H, W), not {tuple(x.shape)}")
    if padding < 0:
        raise ValueError(f"padding must be 0 or more, not {padding}")
    n = len(x)
    top, left = draw(torch.randint, 2 * padding + 1, (2, n), like=x, generator=generator)
    mirror = draw(torch.randint, 2, (n,), like=x, generator=generator) == 1
    return crop_flip(x, top, left, mirror, padding)


def crop_flip(x: Tensor, top: Tensor, left: Tensor, mirror: Tensor, padding: int) -> Tensor:
    """Crop each padded image from (top, left) on, and mirror those where ``mirror`` is True."""
    h, w = x.shape[2:]
    across = torch.arange(w, device=x.device)
    row = top[:, None] + torch.arange(h, device=x.device)  # (N, H)
    column = left[:, None] + torch.where(mirror[:, None], across.flip(0), across)  # (N, W)
    return sample(x, row[:, :, None] - padding, column[:, None, :] - padding)


def cutout(x: Tensor, length: int = 14, generator: torch.Generator | None = None) -> Tensor:
    """Blacken one square of each image: Cutout (DeVries and Taylor, 2017).

    The center of the square is uniform over the pixels of the image, and the square is clipped at
    the border, so it covers between about a quarter of ``length**2`` pixels and all of them. Crop
    and flip first.

    Args:
        x: Images, any dtype, shape (N, C, H, W). Zero is black for images in [0, 255] or [0, 1].
        length: Side of the square in pixels.
        generator: Source of the random numbers; on the device of ``x`` it saves a copy.

    Returns:
        A new tensor with the shape, dtype and device of ``x``.

    Raises:
        ValueError: ``x`` does not have four dimensions or ``length`` is not positive.

    https://arxiv.org/abs/1708.04552
    """
    if x.ndim != 4:
        raise ValueError(f"x must be of shape (N, C, H, W), not {tuple(x.shape)}")
    if length < 1:
        raise ValueError(f"length must be 1 or more, not {length}")
    row, column = (
        draw(torch.randint, side, (len(x),), like=x, generator=generator) for side in x.shape[2:]
    )
    return cut_square(x, row, column, length)


def cut_square(x: Tensor, row: Tensor, column: Tensor, length: int) -> Tensor:
    """Blacken a square that begins ``length // 2`` pixels above and left of (row, column)."""
    side = torch.full_like(row, length)
    return erase(x, row - length // 2, column - length // 2, side, side)


def mixup(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    alpha: float = 1.4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix each image, and its label, with another of the batch: mixup (Zhang et al., 2018).

    ``lam * x + (1 - lam) * x[partner]``, with a single lam from Beta(alpha, alpha) for the batch
    and a random permutation ``partner``, in which an image may be its own partner. The labels are
    mixed likewise and returned as probabilities for ``F.cross_entropy(logits, probabilities)``,
    which is linear in them: it is ``lam * CE(y) + (1 - lam) * CE(y[partner])``.

    Args:
        x: Images of a floating-point dtype, shape (N, ...).
        y: Class indices, int64 in [0, num_classes), shape (N,).
        num_classes: Number of classes.
        alpha: Parameter of the Beta distribution, above 0: lam is uniform at 1, near 0 or 1 below,
            near 1/2 above.
        generator: Source of the partners; on the device of ``x`` it saves a copy. lam comes from
            torch's global generator on that device, because torch.distributions accepts no other:
            :func:`torch.manual_seed` makes a call repeatable.

    Returns:
        The mixed images, like ``x``; the probabilities, float32, shape (N, num_classes).

    Raises:
        ValueError: ``x`` or ``y`` is not as above, or ``alpha`` is not positive.

    https://arxiv.org/abs/1710.09412
    """
    _check_pairs(x, y, alpha)
    return mix(x, y, num_classes, _share(alpha, x.device), _partners(x, generator))


def mix(
    x: Tensor, y: Tensor, num_classes: int, lam: Tensor, partner: Tensor
) -> tuple[Tensor, Tensor]:
    """``lam * x + (1 - lam) * x[partner]``, and the probabilities of the labels likewise."""
    return _lerp(x, partner, lam), _lerp(_one_hot(y, num_classes), partner, lam)


def cutmix(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of another image of the batch into each: CutMix (Yun et al., 2019).

    As in the authors' code, a batch has a single rectangle, of ``sqrt(1 - lam)`` of the height and
    of the width with lam from Beta(alpha, alpha). Its center is uniform over the image, and it is
    clipped at the border. A label's probability is its share of the pixels. In adversarial
    training: Rebuffi et al. (2021, https://arxiv.org/abs/2103.01946).

    Args:
        x: Images of a floating-point dtype, shape (N, C, H, W).
        y: Class indices, int64 in [0, num_classes), shape (N,).
        num_classes: Number of classes.
        alpha: Parameter of the Beta distribution, above 0; the paper's is 1.
        generator: Source of the partners and of the center; lam is drawn as by :func:`mixup`.

    Returns:
        The images, like ``x``; the probabilities, float32, shape (N, num_classes).

    Raises:
        ValueError: ``x`` or ``y`` is not as above, or ``alpha`` is not positive.

    https://arxiv.org/abs/1905.04899
    """
    if x.ndim != 4:
        raise ValueError(f"x must be of shape (N, C, H, W), not {tuple(x.shape)}")
    _check_pairs(x, y, alpha)
    lam, partner = _share(alpha, x.device), _partners(x, generator)
    row, column = (
        draw(torch.randint, side, (), like=x, generator=generator) for side in x.shape[2:]
    )
    return paste(x, y, num_classes, lam, partner, row, column)


def paste(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    lam: Tensor,
    partner: Tensor,
    row: Tensor,
    column: Tensor,
) -> tuple[Tensor, Tensor]:
    """Paste each partner's rectangle around (row, column), a share ``1 - lam`` of an image."""

    def inside(center: Tensor, side: int) -> Tensor:  # bool (side,)
        half = (side * (1 - lam).sqrt()).long() // 2
        index = torch.arange(side, device=x.device)
        return (index >= center - half) & (index < center + half)

    is_pasted = inside(row, x.shape[2])[:, None] & inside(column, x.shape[3])
    own = 1 - is_pasted.float().mean()
    return torch.where(is_pasted, x[partner], x), _lerp(_one_hot(y, num_classes), partner, own)


# --- What every augmentation of images needs --------------------------------------------------


def draw(
    function: Callable[..., Tensor], *args: Any, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Random numbers by a function such as ``torch.rand``, on the device of ``like``."""
    device = like.device if generator is None else generator.device
    numbers = function(*args, generator=generator, device=device)
    # A copy to the CPU must have arrived before the host reads it.
    return numbers.to(like.device, non_blocking=like.device.type != "cpu")


def sample(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The pixels at (row, column), which broadcast to (N, H, W); 0 outside of the image."""
    n, c, h, w = x.shape
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    # The same pixels of every channel: one gather over the flattened image.
    pixel = torch.where(inside, row * w + column, 0).view(n, 1, h * w)
    taken = x.flatten(2).gather(2, pixel.expand(n, c, h * w)).view(n, c, h, w)
    return taken.masked_fill(~inside[:, None], 0)


def erase(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Blacken a rectangle of each image, given by integers of shape (N,)."""

    def inside(start: Tensor, length: Tensor, side: int) -> Tensor:  # bool (N, side)
        offset = torch.arange(side, device=x.device) - start[:, None]
        return (offset >= 0) & (offset < length[:, None])

    rows, columns = inside(top, height, x.shape[2]), inside(left, width, x.shape[3])
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


# --- Mixing -----------------------------------------------------------------------------------


def _check_pairs(x: Tensor, y: Tensor, alpha: float) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating-point, not {x.dtype}: use x.float() / 255 first")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise ValueError(f"y must be int64 of shape ({len(x)},), not {y.dtype} of {tuple(y.shape)}")
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, not {alpha}")


def _share(alpha: float, device: torch.device) -> Tensor:
    concentration = torch.full((), float(alpha), device=device)
    # Validation of the arguments would wait for the device.
    return Beta(concentration, concentration, validate_args=False).sample()


def _partners(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return draw(torch.randperm, len(x), like=x, generator=generator)


def _one_hot(y: Tensor, num_classes: int) -> Tensor:
    return torch.zeros(len(y), num_classes, device=y.device).scatter(1, y[:, None], 1.0)


def _lerp(t: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    # Unlike a weighted sum, it never leaves the range of its ends: images stay in [0, 1].
    return torch.lerp(t[partner], t, lam.to(t.dtype))
