"""Augmentation of a whole batch at once, on any device: crop and flip, cutout, mixup.

Each comes as two functions: one draws the random numbers, the other does what they say. Nothing
here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta
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


def cutout(x: Tensor, length: int = 14, generator: torch.Generator | None = None) -> Tensor:
    """Blacken one square of each image: Cutout (DeVries and Taylor, 2017).

    The square's centre is uniform over the image's pixels; what of the square lies outside the
    image is lost, so an image loses between about a quarter of ``length**2`` and all of it. Made
    for whole images: crop and flip first.

    Args:
        x: Images, any dtype, shape (N, C, H, W). 0 is black for images in [0, 255] or [0, 1].
        length: The square's side in pixels.
        generator: Source of the random numbers; best on ``x``'s device, which saves a copy.

    Returns:
        A new tensor of ``x``'s shape, dtype and device.

    Raises:
        ValueError: ``x`` is not of four dimensions or ``length`` is not positive.

    https://arxiv.org/abs/1708.04552
    """
    if x.ndim != 4:
        raise ValueError(f"x must be of shape (N, C, H, W), not {tuple(x.shape)}")
    if length < 1:
        raise ValueError(f"length must be 1 or more, not {length}")
    device = x.device if generator is None else generator.device
    row, column = (
        torch.randint(side, (len(x),), generator=generator, device=device)
        for side in (x.shape[2], x.shape[3])
    )
    row, column = (t.to(x.device, non_blocking=True) for t in (row, column))
    return cut_square(x, row, column, length)


def cut_square(x: Tensor, row: Tensor, column: Tensor, length: int) -> Tensor:
    """What :func:`cutout` does, with the randomness given.

    Args:
        x: Images, shape (N, C, H, W).
        row: Row of each square's centre, integers, shape (N,). The square takes the rows from
            ``row - length // 2`` on, ``length`` of them: of an even number, the centre is the
            first one of the lower half.
        column: Column of the centre, likewise.
        length: The square's side in pixels.

    Returns:
        The images with the squares at 0.
    """

    def inside(centre: Tensor, side: int) -> Tensor:  # bool (N, side)
        offset = torch.arange(side, device=x.device) - (centre[:, None] - length // 2)
        return (offset >= 0) & (offset < length)

    rows, columns = inside(row, x.shape[2]), inside(column, x.shape[3])
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def mixup(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    alpha: float = 1.4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix each image, and its label, with another of the batch: mixup (Zhang et al., 2018).

    ``lam * x + (1 - lam) * x[partner]``, one lam of Beta(alpha, alpha) for the whole batch and
    ``partner`` a permutation, in which an image may meet itself. The labels are mixed alike and
    returned as probabilities, which ``F.cross_entropy(logits, probabilities)`` takes as they are:
    the cross-entropy is linear in them, so it is ``lam * CE(y) + (1 - lam) * CE(y[partner])``.

    Args:
        x: Images of a floating dtype, shape (N, ...).
        y: Class indices, int64 in [0, num_classes), shape (N,).
        num_classes: Number of classes.
        alpha: Of the Beta distribution, above 0: 1 makes lam uniform, less brings it near 0 or 1,
            more near 1/2.
        generator: Source of the partners; best on ``x``'s device, which saves a copy. lam comes
            from torch's global generator on ``x``'s device, for torch.distributions takes no other:
            :func:`torch.manual_seed` makes a call repeatable.

    Returns:
        The mixed images, as ``x``; the probabilities, float32, shape (N, num_classes).

    Raises:
        ValueError: ``x`` is not floating, ``y`` does not fit it or ``alpha`` is not positive.

    https://arxiv.org/abs/1710.09412
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be floating, not {x.dtype}: use x.float() / 255 first")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise ValueError(f"y must be int64 of shape ({len(x)},), not {y.dtype} of {tuple(y.shape)}")
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, not {alpha}")
    concentration = torch.full((), float(alpha), device=x.device)
    # Validating the arguments would wait for the device.
    lam = Beta(concentration, concentration, validate_args=False).sample()
    device = x.device if generator is None else generator.device
    partner = torch.randperm(len(x), generator=generator, device=device)
    return mix(x, y, num_classes, lam, partner.to(x.device, non_blocking=True))


def mix(
    x: Tensor, y: Tensor, num_classes: int, lam: Tensor, partner: Tensor
) -> tuple[Tensor, Tensor]:
    """What :func:`mixup` does, with the randomness given.

    Args:
        x: Images of a floating dtype, shape (N, ...).
        y: Class indices, int64, shape (N,).
        num_classes: Number of classes.
        lam: The share of each image itself, in [0, 1], a floating scalar.
        partner: The image that each one is mixed with, int64, shape (N,).

    Returns:
        As :func:`mixup`.
    """
    one_hot = torch.zeros(len(y), num_classes, device=y.device).scatter(1, y[:, None], 1.0)
    # lerp, unlike a weighted sum, never leaves the range of the two: images stay in [0, 1].
    mixed_x, mixed_y = (torch.lerp(t[partner], t, lam.to(t.dtype)) for t in (x, one_hot))
    return mixed_x, mixed_y
