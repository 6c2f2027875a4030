"""Augmentation of a batch at once, on any device: crop and flip, cutout, mixup, CutMix.

Each consists of two functions: one draws the random numbers, the other applies them. Neither waits
for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional as F


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
    device = x.device if generator is None else generator.device
    offset = torch.randint(2 * padding + 1, (2, n), generator=generator, device=device)
    mirror = torch.randint(2, (n,), generator=generator, device=device) == 1
    top, left = offset.to(x.device, non_blocking=True)
    return crop_flip(x, top, left, mirror.to(x.device, non_blocking=True), padding)


def crop_flip(x: Tensor, top: Tensor, left: Tensor, mirror: Tensor, padding: int) -> Tensor:
    """What :func:`random_crop_flip` does, with given random numbers.

    Args:
        x: Images, shape (N, C, H, W).
        top: First row of each crop in the padded image, integers in [0, 2 * padding], shape (N,).
            ``top == left == padding`` is the image itself.
        left: First column of each crop, likewise.
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
    # The same pixels of every channel: one gather over the flattened image.
    pixel = row[:, :, None] * (w + 2 * padding) + column[:, None, :]
    return padded.gather(2, pixel.view(n, 1, h * w).expand(n, c, h * w)).view(n, c, h, w)


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
    device = x.device if generator is None else generator.device
    row, column = (
        torch.randint(side, (len(x),), generator=generator, device=device)
        for side in (x.shape[2], x.shape[3])
    )
    row, column = (t.to(x.device, non_blocking=True) for t in (row, column))
    return cut_square(x, row, column, length)


def cut_square(x: Tensor, row: Tensor, column: Tensor, length: int) -> Tensor:
    """What :func:`cutout` does, with given random numbers.

    Args:
        x: Images, shape (N, C, H, W).
        row: Row of the center of each square, integers, shape (N,). The square covers the rows
            from ``row - length // 2`` to ``row - length // 2 + length - 1``.
        column: Column of the center of each square, likewise.
        length: Side of the square in pixels.

    Returns:
        The images with zeros in the squares.
    """

    def inside(center: Tensor, side: int) -> Tensor:  # bool (N, side)
        offset = torch.arange(side, device=x.device) - (center[:, None] - length // 2)
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
    """What :func:`mixup` does, with given random numbers.

    Args:
        x: Images of a floating-point dtype, shape (N, ...).
        y: Class indices, int64, shape (N,).
        num_classes: Number of classes.
        lam: The share of each image itself, in [0, 1], a floating-point scalar.
        partner: The image that each one is mixed with, int64, shape (N,).

    Returns:
        As :func:`mixup`.
    """
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
    device = x.device if generator is None else generator.device
    row, column = (
        torch.randint(side, (), generator=generator, device=device).to(x.device, non_blocking=True)
        for side in x.shape[2:]
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
    """What :func:`cutmix` does, with given random numbers.

    Args:
        x: Images of a floating-point dtype, shape (N, C, H, W).
        y: Class indices, int64, shape (N,).
        num_classes: Number of classes.
        lam: The share of each image itself before the rectangle is clipped and rounded, in [0, 1],
            a floating-point scalar.
        partner: The image that each one gets a part of, int64, shape (N,).
        row: Row of the rectangle's center, an integer scalar.
        column: Column of the rectangle's center, likewise.

    Returns:
        As :func:`cutmix`.
    """

    def inside(center: Tensor, side: int) -> Tensor:  # bool (side,)
        half = (side * (1 - lam).sqrt()).long() // 2
        index = torch.arange(side, device=x.device)
        return (index >= center - half) & (index < center + half)

    is_pasted = inside(row, x.shape[2])[:, None] & inside(column, x.shape[3])
    own = 1 - is_pasted.float().mean()
    return torch.where(is_pasted, x[partner], x), _lerp(_one_hot(y, num_classes), partner, own)


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
    device = x.device if generator is None else generator.device
    partner = torch.randperm(len(x), generator=generator, device=device)
    return partner.to(x.device, non_blocking=True)


def _one_hot(y: Tensor, num_classes: int) -> Tensor:
    return torch.zeros(len(y), num_classes, device=y.device).scatter(1, y[:, None], 1.0)


def _lerp(t: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    # Unlike a weighted sum, it never leaves the range of its ends: images stay in [0, 1].
    return torch.lerp(t[partner], t, lam.to(t.dtype))
