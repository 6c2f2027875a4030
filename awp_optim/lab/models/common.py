"""What the networks share: the normalization of their input, a type and a check."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Activation", "Normalize", "check_sizes"]

Activation = Callable[[Tensor], Tensor]


class Normalize(nn.Module):
    """``(x - mean) / std``, channel by channel.

    As a layer of the model, so that attacks work on images in [0, 1].

    The statistics are saved with the model and come back with its checkpoint.
    :func:`~awp_optim.lab.weights.initialize` also takes a checkpoint without them.

    Args:
        mean: One number for each channel, in the units of the images; or one for all channels.
        std: The same; above zero.
        channels: Number of channels of the images, if it is known.

    Raises:
        ValueError: ``std`` is not positive, the two lengths differ, or there are several numbers
            and the images have another number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        channels: int | None = None,
    ) -> None:
        super().__init__()
        means = [float(mean)] if isinstance(mean, (int, float)) else [float(m) for m in mean]
        stds = [float(std)] if isinstance(std, (int, float)) else [float(s) for s in std]
        if len(means) != len(stds):
            raise ValueError(f"mean and std must have the same length: {mean} and {std}")
        if not all(s > 0 for s in stds):
            raise ValueError(f"std must be above zero: {std}")
        self.register_buffer("mean", torch.tensor(means).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(stds).view(-1, 1, 1))
        if channels is not None:
            self._check_channels(channels)

    def _check_channels(self, channels: int) -> None:
        # Broadcasting would turn gray images into RGB without an error.
        if len(self.mean) not in (1, channels):
            raise ValueError(f"mean and std have {len(self.mean)} channels, the images {channels}")

    def forward(self, x: Tensor) -> Tensor:
        self._check_channels(x.shape[-3])
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Check that sizes, or sequences of them, are at least 1 and none is empty."""
    for name, size in sizes.items():
        numbers = [size] if isinstance(size, int) else list(size)
        if min(numbers, default=0) < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
