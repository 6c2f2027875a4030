"""An exponential moving average of a model that does not wait for the device."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["MovingAverage"]


class MovingAverage(AveragedModel):
    """The exponential moving average of a model's parameters and buffers, one step at a time.

    It is torch's ``AveragedModel``, whose own update copies a counter to the device in every step
    and waits for it; the average itself has no use for the counter.

    Args:
        model: the model to follow; the first update copies it.
        decay: of the average, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        super().__init__(model, multi_avg_fn=self._move, use_buffers=True)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average toward the model."""
        ours: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        theirs: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for average, current in zip(_tensors(self.module), _tensors(model), strict=True):
            ours[average.dtype].append(average)
            theirs[average.dtype].append(current.detach())
        for dtype in ours:
            if self.n_averaged == 0:
                torch._foreach_copy_(ours[dtype], theirs[dtype])
            else:
                self._move(ours[dtype], theirs[dtype], self.n_averaged)
        self.n_averaged += 1  # on the CPU


def _tensors(model: nn.Module) -> chain[Tensor]:
    return chain(model.parameters(), model.buffers())
