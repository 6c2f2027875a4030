"""The data set that every loader returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["ImageData", "check_images", "check_labels"]


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labeled image data set: a training part and a test part.

    Attributes:
        x_train: Training images, uint8 in [0, 255], shape (N, C, H, W).
        y_train: Training labels, int64 in [0, num_classes), shape (N,).
        x_test: Test images, as ``x_train``.
        y_test: Test labels, as ``y_train``.
        classes: The names of the classes; a label is an index into them.
        name: The name of the data set.
        mean: Mean of each channel over the full training part, for images in [0, 1]; a single
            number holds for all channels. Meant for :class:`awp_optim.lab.models.Normalize`.
        std: Standard deviation of each channel, as ``mean``.
        is_balanced_subset: Whether the training part was made by :meth:`balanced`.

    Raises:
        ValueError: The dtype or shape of a tensor, or a label, is not as above.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]
    name: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    is_balanced_subset: bool = False

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            check_images(f"x_{part}", x)
            check_labels(f"y_{part}", y, len(x), self.num_classes)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                "training and test images differ in shape: "
                f"{tuple(self.x_train.shape[1:])} and {tuple(self.x_test.shape[1:])}"
            )

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        """The number of channels of the images."""
        return self.x_train.shape[1]

    def limit(self, n_train: int | None, n_test: int | None = None, seed: int = 0) -> ImageData:
        """A random subset: the first n images of a seeded permutation, in that order.

        With one seed, a smaller subset is the beginning of a larger one, on any device. Classes are
        balanced only on average. ``mean`` and ``std`` are kept.

        Args:
            n_train: Number of training images to keep; None keeps all of them in their order.
            n_test: Number of test images to keep, likewise.
            seed: Seed of both permutations.

        Raises:
            ValueError: A number is below 1 or above the number of images.
        """
        kept: dict[str, Tensor] = {}
        for part, n in (("train", n_train), ("test", n_test)):
            if n is not None:
                x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
                index = _draw(f"n_{part}", n, x, len(x), seed)[0]
                kept |= {f"x_{part}": x[index], f"y_{part}": y[index]}
        balanced = self.is_balanced_subset and n_train is None
        return replace(self, is_balanced_subset=balanced, **kept)  # type: ignore[arg-type]

    def balanced(self, n: int, seed: int = 0) -> ImageData:
        """A subset of n training images with as many of each class, in their original order.

        If n is not a multiple of the number of classes, the first classes have one more. With one
        seed, a smaller subset is part of a larger one, on any device. The test part, ``mean`` and
        ``std`` are kept.

        Args:
            n: Number of training images to keep.
            seed: Seed of the permutation of each class.

        Raises:
            ValueError: n is below the number of classes, or a class has too few images.
        """
        if n < self.num_classes:
            raise ValueError(f"n must be at least {self.num_classes}, one for each class, not {n}")
        generator = torch.Generator().manual_seed(seed)
        y = self.y_train.cpu()
        kept = []
        for label, name in enumerate(self.classes):
            images = (y == label).nonzero().squeeze(1)
            wanted = n // self.num_classes + (label < n % self.num_classes)
            if wanted > len(images):
                raise ValueError(
                    f"{n} balanced images need {wanted} of class {name}, which has {len(images)}"
                )
            kept.append(images[torch.randperm(len(images), generator=generator)[:wanted]])
        index = torch.cat(kept).sort().values.to(self.x_train.device)
        x_train, y_train = self.x_train[index], self.y_train[index]
        return replace(self, x_train=x_train, y_train=y_train, is_balanced_subset=True)

    def split(self, n: int, seed: int = 0) -> tuple[ImageData, tuple[Tensor, Tensor]]:
        """Hold out n random training images, to select a model without using the test part.

            data, (x_val, y_val) = data.split(1000)

        They are the images of ``limit(n, seed=seed)``, but both sides keep the original order.
        ``mean`` and ``std`` are kept.

        Returns:
            The data without these images; these images and their labels.

        Raises:
            ValueError: Nothing would be held out, or nothing would be left to train on.
        """
        x, y = self.x_train, self.y_train
        out, rest = (i.sort().values for i in _draw("n", n, x, len(x) - 1, seed))
        return replace(self, x_train=x[rest], y_train=y[rest]), (x[out], y[out])

    def with_statistics(self) -> ImageData:
        """The same data with the exact ``mean`` and ``std`` of its training part.

        A constant channel gets a standard deviation of 1, so that one can divide by it.

        Raises:
            ValueError: There are no training images.
        """
        if not self.x_train.numel():
            raise ValueError("there are no training images to measure mean and std on")
        mean, std = [], []
        values = torch.arange(256, dtype=torch.float64) / 255
        for channel in self.x_train.unbind(1):
            # Counting the 256 values is exact and needs no float copy of the images.
            share = channel.flatten().bincount(minlength=256).cpu().double() / channel.numel()
            mean.append(float(share @ values))
            std.append(float(share @ (values - mean[-1]) ** 2) ** 0.5)
        return replace(self, mean=tuple(mean), std=tuple(s or 1.0 for s in std))

    def to(self, device: torch.device | str) -> ImageData:
        """The same data with every tensor on ``device``."""
        parts = ("x_train", "y_train", "x_test", "y_test")
        return replace(self, **{name: getattr(self, name).to(device) for name in parts})


def check_images(name: str, x: Any) -> None:
    """Check that a tensor, or what stands for one, holds uint8 images of shape (N, C, H, W)."""
    if x.dtype != torch.uint8 or x.ndim != 4:
        raise ValueError(
            f"{name} must be uint8 of shape (N, C, H, W), not {x.dtype} of {tuple(x.shape)}"
        )


def check_labels(name: str, y: Tensor, n: int, num_classes: int | None = None) -> None:
    """Check that a tensor holds n int64 labels from 0, below ``num_classes`` if that is given."""
    if y.dtype != torch.int64 or y.shape != (n,):
        raise ValueError(f"{name} must be int64 of shape ({n},), not {y.dtype} of {tuple(y.shape)}")
    if not n:
        return
    least, most = int(y.min()), int(y.max())
    if least < 0 or (num_classes is not None and most >= num_classes):
        below = "" if num_classes is None else f" and below {num_classes}"
        raise ValueError(f"{name} must hold labels from 0{below}, not {least} to {most}")


def _draw(name: str, n: int, x: Tensor, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """The first n indices of a seeded permutation of ``x``, and the others, on its device.

    The permutation is drawn on the CPU, so it does not depend on the device.
    """
    if not 1 <= n <= most:
        raise ValueError(f"{name} must be between 1 and {most}, not {n}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    return order[:n], order[n:]
