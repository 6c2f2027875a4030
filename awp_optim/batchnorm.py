"""BatchNorm in passes that must leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["frozen_batch_norm"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@contextmanager
def frozen_batch_norm(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm normalises as before but leaves its running statistics alone.

    In training mode it goes on normalising by the batch, so that gradients are those of training;
    ``running_mean``, ``running_var`` and ``num_batches_tracked`` do not change. An ascent of the
    weights wants this: only the pass at the perturbed weights should count. No other module is
    affected, and no buffer is copied.

    Args:
        model: any module; its BatchNorm layers (subclasses and SyncBatchNorm, too) are frozen.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(2)
        >>> with frozen_batch_norm(norm):
        ...     _ = norm(torch.randn(4, 2))
        >>> norm.num_batches_tracked.item()
        0
    """
    tracking = [
        m
        for m in model.modules()
        if isinstance(m, _BATCH_NORMS) and m.training and m.track_running_stats
    ]
    try:
        for m in tracking:  # in training mode, a BatchNorm that tracks nothing uses the batch
            m.track_running_stats = False
        yield
    finally:
        for m in tracking:
            m.track_running_stats = True
