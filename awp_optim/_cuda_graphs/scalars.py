"""Learning rate and gamma as scalars on the device, so that they can change between replays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from awp_optim._core.settings import is_active

__all__ = ["DeviceScalars", "is_on", "reads_lr_from_device"]

# SGD's fused update reads float32; gamma in float64 is exact for weights of any dtype.
_DTYPES = {"lr": torch.float32, "gamma": torch.float64}


class DeviceScalars:
    """Tensors with each group's learning rate and gamma, which graphs read at every replay."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._values: dict[tuple[int, str], float] = {}

    def update(self, optimizer: Optimizer, device: torch.device) -> None:
        """Write the groups' current numbers to the device if they have changed."""
        for i, group in enumerate(optimizer.param_groups):
            for name, dtype in _DTYPES.items():
                value = group.get(name)
                if value is None or is_on(device, value):
                    continue
                if (i, name) not in self._tensors:
                    with torch.inference_mode(mode=False):
                        self._tensors[i, name] = torch.zeros((), dtype=dtype, device=device)
                if self._values.get((i, name)) != float(value):
                    self._values[i, name] = float(value)
                    self._tensors[i, name].fill_(float(value))

    @contextmanager
    def installed(self, optimizer: Optimizer, base: Optimizer | None) -> Iterator[None]:
        """Context manager: inside, the groups hold the tensors.

        Args:
            optimizer: has the groups.
            base: the base optimizer if it steps inside; None leaves learning rates as numbers.
        """
        before = [dict(group) for group in optimizer.param_groups]
        try:
            for i, group in enumerate(optimizer.param_groups):
                self._install(i, group, base)
            yield
        finally:
            for group, settings in zip(optimizer.param_groups, before, strict=True):
                group.update(settings)

    def _install(self, i: int, group: dict[str, Any], base: Optimizer | None) -> None:
        gamma, lr = self._tensors.get((i, "gamma")), self._tensors.get((i, "lr"))
        if gamma is not None and not is_on(gamma.device, group["gamma"]):
            group["gamma"] = gamma if is_active(group) else 0  # 0 leaves the group out
        if base is None or not reads_lr_from_device(base):
            return
        if lr is not None and not is_on(lr.device, group["lr"]):
            group["lr"] = lr
        if type(base) is torch.optim.SGD:  # its other implementations read lr on the host
            group["fused"], group["foreach"] = True, False


def reads_lr_from_device(base: Optimizer) -> bool:
    """Whether an optimizer's step accepts a learning rate in a tensor on the device."""
    return type(base) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def is_on(device: torch.device, value: Any) -> bool:
    """Whether the caller's value is a tensor that graphs on this device can read."""
    return isinstance(value, Tensor) and value.device == device
