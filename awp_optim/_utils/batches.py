"""Data as it comes: batches, or one pair of tensors; where the model is; a seed for each batch."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from awp_optim._utils.checks import DTYPES, describe, is_integer

__all__ = ["NO_DATA", "Data", "batches", "count", "device_of", "seeded"]

Data = Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor]
"""Batches (x, y), as a DataLoader gives them; or one pair of tensors."""
NO_DATA = "there is no data: not one batch with an example in it"


def device_of(
    model: Callable[[Tensor], Tensor], device: torch.device | str | None
) -> torch.device | None:
    """Where to run: ``device``, or where the model is; None for where the data are.

    Raises:
        ValueError: the model is somewhere else.
    """
    at_home = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if device is None:
        return None if at_home is None else at_home.device
    device = torch.device(device)
    if at_home is not None and at_home.device.type != device.type:
        raise ValueError(
            f"device is {device}, but the model is on {at_home.device}: move it, model.to({device})"
        )
    return device


def batches(data: Data, batch_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the size asked for, checked, none of them empty."""
    if is_pair(data):
        data, batch_size = [data], batch_size or 128  # type: ignore[list-item]
    kept: list[tuple[Tensor, Tensor]] = []
    for batch in data:
        x, y = _checked(batch)
        if batch_size is None:
            if len(x):
                yield x, y
            continue
        kept.append((x, y))
        while (n := sum(len(y) for _, y in kept)) >= batch_size:
            x, y = _joined(kept)
            kept = [(x[batch_size:], y[batch_size:])] if n > batch_size else []
            yield x[:batch_size], y[:batch_size]
    if any(len(y) for _, y in kept):
        yield _joined(kept)


def _joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(batches) == 1:
        return batches[0]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def is_pair(data: object) -> bool:
    return (
        isinstance(data, (tuple, list))
        and len(data) == 2
        and all(isinstance(t, Tensor) for t in data)
    )


def _checked(batch: object) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(f"data must give batches (x, y), got {describe(batch)}")
    x, y = batch[0], batch[1]
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        raise TypeError(
            f"x must be a tensor of floating point, got {describe(x)}; convert images with "
            "x.float() / 255"
        )
    if not isinstance(y, Tensor) or not is_integer(y):
        raise TypeError(f"y must be a tensor of integer class indices, got {describe(y)}")
    if x.ndim == 0 or y.shape != (len(x),):
        raise ValueError(
            f"y must hold one class index for each example: x is of shape {tuple(x.shape)}, y of "
            f"{tuple(y.shape)}"
        )
    return x.detach(), y.detach()


def count(data: object, batch_size: int | None) -> int | None:
    """How many batches there will be, as far as that is known."""
    if is_pair(data):
        return math.ceil(len(data[1]) / (batch_size or 128))  # type: ignore[index]
    if batch_size is not None:
        try:
            return math.ceil(len(data.dataset) / batch_size)  # type: ignore[attr-defined]
        except (AttributeError, TypeError):
            return None
    return len(data) if hasattr(data, "__len__") else None


@contextmanager
def seeded(device: torch.device, seed: int | None, batch: int, name: str) -> Iterator[None]:
    """Inside, torch's generators start from a seed of this batch and name; None: as they are."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(zlib.crc32(f"{seed} {batch} {name}".encode()))
        yield
