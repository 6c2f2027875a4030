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
    and waits for it. Here the counter, ``n_averaged``, stays on the host.

    Args:
        model: the model to follow; the first update copies it.
        decay: of the average, in [0, 1).
        start: updates that copy the model, before the averaging begins.
        warmup: whether the decay grows, as in Wang et al. (2023): in the k-th update after
            ``start``, counted from 0, it is ``min(decay, (1 + k) / (10 + k))``.

    https://arxiv.org/abs/2302.04638
    """

    def __init__(
        self, model: nn.Module, decay: float, *, start: int = 0, warmup: bool = False
    ) -> None:
        super().__init__(model)
        self._decay, self._start, self._warmup = decay, start, warmup

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average toward the model."""
        ours: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        theirs: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for average, current in zip(_tensors(self.module), _tensors(model), strict=True):
            ours[average.dtype].append(average)
            theirs[average.dtype].append(current.detach())
        done = int(self.n_averaged)
        for dtype in ours:
            if done == 0 or done < self._start:
                torch._foreach_copy_(ours[dtype], theirs[dtype])
            else:
                decay = self._decay_of(done - self._start)
                move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
                move(ours[dtype], theirs[dtype], self.n_averaged)
        self.n_averaged += 1

    def _decay_of(self, k: int) -> float:
        return min(self._decay, (1 + k) / (10 + k)) if self._warmup else self._decay


def _tensors(model: nn.Module) -> chain[Tensor]:
    return chain(model.parameters(), model.buffers())
