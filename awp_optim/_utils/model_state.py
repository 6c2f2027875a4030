"""The modes and the buffers of a model, restored after code that may change them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["buffers_restored", "changeable_buffers", "in_mode", "modes_restored"]

Model = Callable[[Tensor], Tensor]


@contextmanager
def in_mode(model: Model, mode: str) -> Iterator[None]:
    """Put a module in "eval" or "train" mode; restore each submodule's own mode afterwards."""
    with modes_restored(model):
        if isinstance(model, nn.Module):
            model.train(mode == "train")
        yield


@contextmanager
def modes_restored(model: Model) -> Iterator[None]:
    """Restore the mode of each submodule of a module on exit."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            if module.training != training:  # a module may do more in train(), such as LoRA's merge
                module.train(training)
        for module, training in zip(modules, modes, strict=True):
            module.training = training


@contextmanager
def buffers_restored(model: Model) -> Iterator[None]:
    """Restore the values of a module's buffers on exit."""
    buffers = changeable_buffers(model) if isinstance(model, nn.Module) else []
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, saved in zip(buffers, before, strict=True):
                b.copy_(saved)


def changeable_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers that can be written to in place; torch refuses it for an expanded tensor."""
    return [b for b in model.buffers() if not _is_expanded(b)]


def _is_expanded(t: Tensor) -> bool:
    """Whether elements share memory, as in ``torch.zeros(1).expand(5)``."""
    return t.layout == torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True)
    )
