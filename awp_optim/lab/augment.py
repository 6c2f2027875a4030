"""The usual CIFAR augmentation, on a whole batch at once and on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def random_crop_flip(
    x: Tensor,
    padding: int = 4,
    flip: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Crop each image at a place of its own out of its zero-padded self, and mirror half of them.

    Offsets are uniform, each of the ``(2 * padding + 1)**2`` equally likely; an image is mirrored
    (left to right) with probability 1/2. Nothing waits for the device.

    Args:
        x: Images, any dtype, shape (N, C, H, W). Padding is 0 in their units, which is black for
            images in [0, 255] or [0, 1].
        padding: Pixels of padding on each side; 0 means no crop.
        flip: Whether to mirror at all.
        generator: Source of the random numbers; best on ``x``'s device, which saves a copy.

    Returns:
        A new contiguous tensor of ``x``'s shape, dtype and device.

    Raises:
        ValueError: ``x`` is not of four dimensions or ``padding`` is negative.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be of shape (N, C, H, W), not {tuple(x.shape)}")
    if padding < 0:
        raise ValueError(f"padding must be 0 or more, not {padding}")
    n = len(x)
    device = x.device if generator is None else generator.device
    offset = torch.randint(2 * padding + 1, (2, n), generator=generator, device=device)
    # Drawn even if unused, so that `flip` leaves the later random numbers as they are.
    mirror = torch.randint(2, (n,), generator=generator, device=device) == 1
    top, left = offset.to(x.device, non_blocking=True)
    return crop_flip(x, top, left, mirror.to(x.device, non_blocking=True) & flip, padding)


def crop_flip(x: Tensor, top: Tensor, left: Tensor, mirror: Tensor, padding: int) -> Tensor:
    """What :func:`random_crop_flip` does, with the randomness given.

    Args:
        x: Images, shape (N, C, H, W).
        top: First row of each crop in the padded image, integers in [0, 2 * padding], shape (N,).
            ``top == left == padding`` is the image itself.
        left: First column, likewise.
        mirror: Which images to mirror, bool, shape (N,).
        padding: Pixels of zeros on each side.

    Returns:
        The crops, shape (N, C, H, W), contiguous.
    """
    n, c, h, w = x.shape
    across = torch.arange(w, device=x.device)
    row = top[:, None] + torch.arange(h, device=x.device)  # (N, H)
    column = left[:, None] + torch.where(mirror[:, None], across.flip(0), across)  # (N, W)
    padded = F.pad(x, (padding,) * 4).flatten(2)
    # The same pixels of every channel: one gather over the flattened plane.
    pixel = row[:, :, None] * (w + 2 * padding) + column[:, None, :]
    return padded.gather(2, pixel.view(n, 1, h * w).expand(n, c, h * w)).view(n, c, h, w)
