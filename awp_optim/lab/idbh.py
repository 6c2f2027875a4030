"""IDBH-weak: the augmentation of Li and Spratling (2023) for CIFAR-10, of a batch at once.

Mirror, CropShift, ColorShape and random erasing, with the distributions of the authors' code. They
apply Pillow's functions to one uint8 image at a time; here the same arithmetic is applied to a
batch, on any device and without waiting for it.

"Data augmentation alone can improve adversarial training" (ICLR 2023),
https://arxiv.org/abs/2301.09879
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from awp_optim.lab.augment import draw, erase, sample

__all__ = ["KINDS", "SMALLEST", "crop_shift", "idbh_weak", "recolor", "warp"]

CUTS = 11
"""CropShift removes fewer rows and columns than this, both together."""
SMALLEST = CUTS
"""Pixels on a side that an image must have."""
KINDS = (
    "saturation",
    "brightness",
    "contrast",
    "sharpness",
    "autocontrast",
    "equalize",
    "shear",
    "rotate",
)
"""The changes of ColorShape, of which each image gets one; all are equally likely."""
ERASED = 0.5, (0.02, 0.33), (0.3, 3.3)
"""Probability, share of the image and ratio of height to width of torchvision's RandomErasing."""
ATTEMPTS = 10
"""Rectangles drawn to erase; the first that fits is taken."""


def idbh_weak(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Augment each image by IDBH-weak.

    1. Mirror it with probability 1/2.
    2. CropShift: remove s rows and columns in all, s uniform in 0 to 10, at random sides, and put
       the rest at a random place of a black image.
    3. ColorShape: one of eight changes, see :data:`KINDS`: saturation or sharpness by a factor in
       [0.1, 1.9], brightness or contrast by one in [0.5, 1.9], autocontrast, equalization, a shear
       by 0.05 to 0.15 along an axis, or a rotation by 1 to 10 degrees.
    4. With probability 1/2, blacken a rectangle of 2% to 33% of the area.

    Args:
        x: uint8 images, gray or RGB, shape (N, C, H, W), of 11 pixels at least on each side.
        generator: Source of the random numbers; on the device of ``x`` it saves a copy.

    Returns:
        A new contiguous tensor with the shape, dtype and device of ``x``.

    Raises:
        ValueError: ``x`` is not as above.
    """
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(
            f"x must be uint8 of shape (N, 1 or 3, H, W), not {x.dtype} of {tuple(x.shape)}"
        )
    if min(x.shape[2:]) < SMALLEST:
        raise ValueError(f"images must be at least {SMALLEST} pixels wide and high")
    u = draw(torch.rand, 14 + 2 * ATTEMPTS, len(x), like=x, generator=generator)
    x = crop_shift(x, u[0] < 0.5, *_draw_cuts(u[1:7]))
    kind = _below(len(KINDS), u[7])
    x = recolor(x, kind, _draw_factor(kind, u[8]))
    x = warp(x, _draw_matrix(kind, u[8], u[9] < 0.5, u[10] < 0.5))
    return erase(x, *_draw_rectangle(u[11:], *x.shape[2:]))


def crop_shift(x: Tensor, mirror: Tensor, cut: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Mirror and CropShift.

    Args:
        x: Images, shape (N, C, H, W).
        mirror: Which images to mirror first, bool, shape (N,).
        cut: How many rows and columns to remove, integers, shape (2, N).
        source: The first row and column that is kept, in [0, cut].
        target: The row and column where that goes, in [0, cut].

    Returns:
        The images, black where nothing went.
    """

    def along(axis: int, side: int) -> Tensor:  # the row or column to take, or -1; (N, side)
        index = torch.arange(side, device=x.device) - target[axis][:, None]
        is_kept = (index >= 0) & (index < side - cut[axis][:, None])
        return torch.where(is_kept, index + source[axis][:, None], -1)

    h, w = x.shape[2:]
    row, column = along(0, h), along(1, w)
    column = torch.where(mirror[:, None] & (column >= 0), w - 1 - column, column)
    return sample(x, row[:, :, None], column[:, None, :])


def recolor(x: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """The changes of color of ColorShape, by Pillow's arithmetic.

    Args:
        x: uint8 images, gray or RGB, shape (N, C, H, W).
        kind: Indices in :data:`KINDS`, shape (N,); the last two leave an image as it is.
        factor: Of saturation, brightness, contrast and sharpness; 1 changes nothing. Shape (N,).

    Returns:
        uint8 images like ``x``.
    """

    def of(name: str) -> Tensor:  # which images get this change, (N, 1, 1, 1)
        return (kind == KINDS.index(name))[:, None, None, None]

    values, gray, pixels = x.int(), _gray(x), x.shape[2] * x.shape[3]
    mean = (2 * gray.sum((2, 3), keepdim=True) + pixels) // (2 * pixels)
    flat = torch.where(of("contrast"), mean, torch.where(of("saturation"), gray, 0))
    flat = torch.where(of("sharpness"), _smooth(values), flat)
    blended = (flat + factor[:, None, None, None] * (values - flat)).clamp(0, 255).int()
    out = torch.where((kind < KINDS.index("autocontrast"))[:, None, None, None], blended, values)
    out = torch.where(of("autocontrast"), _autocontrast(values), out)
    return torch.where(of("equalize"), _equalize(values), out).byte()


def warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Take each pixel from where a matrix maps it, the nearest one, black outside of the image.

    Args:
        x: Images, shape (N, C, H, W).
        matrix: For (column, row) relative to the image's center, shape (2, 2, N).

    Returns:
        The images.
    """
    h, w = x.shape[2:]
    across = (torch.arange(w, device=x.device) + 0.5 - w / 2)[None, None, :]
    down = (torch.arange(h, device=x.device) + 0.5 - h / 2)[None, :, None]
    (a, b), (c, d) = matrix[..., None, None]
    column, row = a * across + b * down + w / 2, c * across + d * down + h / 2
    return sample(x, row.floor().long(), column.floor().long())


# --- Random numbers: from u, uniform in [0, 1), to what the functions above take ----------------


def _below(n: Tensor | int, u: Tensor) -> Tensor:
    """Integers from 0 to n - 1."""
    return (n * u).long()


def _draw_cuts(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    both = _below(CUTS, u[0])
    columns = _below(both + 1, u[1])
    cut = torch.stack([both - columns, columns])
    return cut, _below(cut + 1, u[2:4]), _below(cut + 1, u[4:6])


def _draw_factor(kind: Tensor, u: Tensor) -> Tensor:
    is_narrow = (kind == KINDS.index("brightness")) | (kind == KINDS.index("contrast"))
    return torch.where(is_narrow, 0.5 + 1.4 * u, 0.1 + 1.8 * u)


def _draw_matrix(kind: Tensor, u: Tensor, is_negative: Tensor, is_vertical: Tensor) -> Tensor:
    sign = torch.where(is_negative, -1.0, 1.0)
    shear = torch.where(kind == KINDS.index("shear"), sign * (0.05 + 0.1 * u).tan(), 0.0)
    angle = torch.where(kind == KINDS.index("rotate"), sign * (1 + _below(10, u)), 0.0)
    cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
    across, down = (torch.where(v, shear, 0.0) for v in (~is_vertical, is_vertical))
    return torch.stack([cos, across - sin, down + sin, cos]).view(2, 2, -1)


def _draw_rectangle(u: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probability, shares, ratios = ERASED
    u_area, u_ratio = u[3:].chunk(2)  # (ATTEMPTS, N) each
    area = h * w * (shares[0] + (shares[1] - shares[0]) * u_area)
    low, high = map(math.log, ratios)
    ratio = (low + (high - low) * u_ratio).exp()
    height, width = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (height < h) & (width < w)
    first = fits.byte().argmax(0, keepdim=True)
    is_erased = (u[0] < probability) & fits.any(0)
    height, width = (t.gather(0, first)[0] * is_erased for t in (height, width))
    return _below(h - height + 1, u[1]), _below(w - width + 1, u[2]), height, width


# --- Pixels -------------------------------------------------------------------------------------


def _gray(x: Tensor) -> Tensor:
    """Luma as Pillow rounds it, int32, shape (N, 1, H, W)."""
    if x.shape[1] == 1:
        return x.int()
    red, green, blue = x.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None]


def _smooth(x: Tensor) -> Tensor:
    """A mean over 3 by 3 pixels in which the center counts five times; the border stays."""
    box = F.avg_pool2d(x.float(), 3, 1, divisor_override=1).int() + 4 * x[..., 1:-1, 1:-1]
    out = x.clone()
    out[..., 1:-1, 1:-1] = (2 * box + 13) // 26
    return out


def _autocontrast(x: Tensor) -> Tensor:
    """Each channel stretched to [0, 255]."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    scale = 255.0 / (high - low).double()  # Pillow's rounding: in float64, then down
    stretched = (x * scale - low * scale).clamp(0, 255).int()
    return torch.where(high > low, stretched, x)


def _equalize(x: Tensor) -> Tensor:
    """Each channel's values mapped to make its histogram flat."""
    n, c, h, w = x.shape
    pixels = x.view(n * c, h * w).long()
    counts = torch.zeros(n * c, 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, pixels, torch.ones_like(pixels))
    of_highest = counts.gather(1, pixels.amax(1, keepdim=True))
    step = (h * w - of_highest) // 255
    below = counts.cumsum(1) - counts
    table = (below + step // 2) // step.clamp(min=1)
    mapped = table.clamp(max=255).gather(1, pixels).view_as(x).int()
    return torch.where((step > 0).view(n, c, 1, 1), mapped, x)
