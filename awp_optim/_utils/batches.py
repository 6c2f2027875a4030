"""Checked batches from users' data, with their device and a seed for each batch."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from awp_optim._utils.checks import DTYPES, check_int, describe, is_integer

__all__ = [
    "NO_DATA",
    "Data",
    "batches",
    "check_classes",
    "count_batches",
    "device_of",
    "generators_restored",
    "plain",
    "seeded",
    "set_seed",
    "to_device",
]

Data = Iterable[tuple[Any, Any]] | tuple[Any, Any] | Dataset[Any]
"""Batches (x, y), as from a DataLoader; one pair (x, y); or a torch Dataset of examples. x and y
are tensors or numpy arrays."""
NO_DATA = "there is no data: pass at least one batch with an example"
DEFAULT_BATCH_SIZE = 128


def batches(data: Data, batch_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Checked, nonempty batches of tensors (x, y).

    Args:
        data: see :data:`Data`.
        batch_size: the size of all batches but the last; None keeps given batches, and cuts a pair
            or a Dataset into batches of 128.

    Raises:
        TypeError: x is not floating-point, or y does not hold integers.
        ValueError: y does not hold one label for each example, or a label is negative.
    """
    if batch_size is not None:
        check_int("batch_size", batch_size, least=1)
    if isinstance(data, Dataset):
        size = batch_size or DEFAULT_BATCH_SIZE
        data = DataLoader(data, size, generator=torch.Generator())  # not torch's default one
    elif _is_pair(data):
        data, batch_size = [data], batch_size or DEFAULT_BATCH_SIZE  # type: ignore[list-item]
    checked = (_checked(batch) for batch in data)
    nonempty = ((x, y) for x, y in checked if len(y))
    return nonempty if batch_size is None else _resized(nonempty, batch_size)


def _resized(
    batches: Iterable[tuple[Tensor, Tensor]], size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same examples in batches of ``size``, with at most one more batch in memory."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        waiting.append(batch)
        while (n := sum(len(y) for _, y in waiting)) >= size:
            x, y = _joined(waiting)
            waiting = [(x[size:], y[size:])] if n > size else []
            yield x[:size], y[:size]
    if waiting:
        yield _joined(waiting)


def _joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(batches) == 1:
        return batches[0]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def _is_pair(data: object) -> bool:
    return (
        isinstance(data, (tuple, list))
        and len(data) == 2
        and all(isinstance(_as_tensor(values), Tensor) for values in data)
    )


def _as_tensor(values: Any) -> Any:
    """A numpy array as a tensor that shares its memory; anything else unchanged."""
    return torch.as_tensor(values) if type(values).__module__ == "numpy" else values


def _checked(batch: object) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(f"data must yield batches (x, y), got {describe(batch)}")
    x, y = _as_tensor(batch[0]), _as_tensor(batch[1])
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        raise TypeError(
            f"x must be a floating-point tensor, got {describe(x)}; convert images with "
            "x.float() / 255"
        )
    if not isinstance(y, Tensor) or not is_integer(y):
        raise TypeError(f"y must be a tensor of integer class indices, got {describe(y)}")
    _check_labels(x, y)
    return plain(x), plain(y)


def _check_labels(x: Tensor, y: Tensor) -> None:
    if x.ndim == 0 or y.shape != (len(x),):
        raise ValueError(
            f"y must hold one class index for each example, but x has shape {tuple(x.shape)} and y "
            f"{tuple(y.shape)}"
        )
    lowest = int(y.min()) if len(y) else 0
    if lowest < 0:
        raise ValueError(f"labels must be class indices from 0, got {lowest}: remove such examples")


def check_classes(y: Tensor, classes: int) -> None:
    """Raise ValueError for a label that is not among the model's classes.

    On an accelerator, such a label would abort the process when a loss is computed.
    """
    if (largest := int(y.max())) >= classes:
        raise ValueError(f"label {largest} is not among the model's {classes} classes (from 0)")


def plain(t: Tensor) -> Tensor:
    """``t`` detached; a copy of an inference tensor, which autograd does not accept.

    Call it outside ``torch.inference_mode``, in which the copy would be an inference tensor too.
    """
    return t.clone() if t.is_inference() else t.detach()


def to_device(x: Tensor, y: Tensor, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """A batch moved to a device (None keeps its device), with labels as int64."""
    device = device or x.device
    wait = device.type == "cpu"  # else the copy may be read before it has arrived
    return x.to(device, non_blocking=not wait), y.to(device, torch.int64, non_blocking=not wait)


def count_batches(data: Data, batch_size: int | None) -> int | None:
    """The number of batches, or None if it is unknown."""
    size = batch_size or DEFAULT_BATCH_SIZE
    try:
        if _is_pair(data):
            return math.ceil(len(data[1]) / size)  # type: ignore[index]
        if isinstance(data, Dataset):
            return math.ceil(len(data) / size)  # type: ignore[arg-type]
        if batch_size is not None:
            return math.ceil(len(data.dataset) / size)  # type: ignore[union-attr]
        return len(data)  # type: ignore[arg-type]
    except (AttributeError, TypeError):
        return None


def device_of(
    model: Callable[[Tensor], Tensor], device: torch.device | str | None
) -> torch.device | None:
    """The device to compute on: ``device``, or the model's; None keeps data on their device.

    Raises:
        ValueError: the model is on a device of another type.
    """
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if device is None:
        return None if parameter is None else parameter.device
    device = torch.device(device)
    if parameter is not None and parameter.device.type != device.type:
        raise ValueError(
            f"device is {device}, but the model is on {parameter.device}: move it with "
            f"model.to({device})"
        )
    return device


@contextmanager
def seeded(device: torch.device, seed: int | None, batch: int, name: str) -> Iterator[None]:
    """Seed torch's generators for a batch and a name, then restore them; None does not seed."""
    if seed is None:
        yield
        return
    with generators_restored(device):
        set_seed(device, zlib.crc32(f"{seed} {batch} {name}".encode()))
        yield


def generators_restored(device: torch.device) -> AbstractContextManager[None]:
    """Restore the generators of the CPU and of a CUDA device on exit."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def set_seed(device: torch.device, seed: int) -> None:
    """Seed the generators of the CPU and of a device, and, unlike ``torch.manual_seed``, no others.

    :func:`generators_restored` restores these two if the device is the CPU or a CUDA device.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
