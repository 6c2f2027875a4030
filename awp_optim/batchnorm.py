"""BatchNorm in passes that must leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

__all__ = ["frozen_batch_norm"]


@contextmanager
def frozen_batch_norm(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm normalises as before but leaves its running statistics alone.

    In training mode it goes on normalising by the batch, so that gradients are those of training;
    ``running_mean``, ``running_var`` and ``num_batches_tracked`` do not change. An ascent of the
    weights wants this: only the pass at the perturbed weights should count. No other module is
    affected, and no buffer is copied.

    Args:
        model: any module; its BatchNorm layers are frozen (subclasses and SyncBatchNorm, too), and
            InstanceNorm layers that track statistics. Lazy ones must have seen a batch before.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(2)
        >>> with frozen_batch_norm(norm):
        ...     _ = norm(torch.randn(4, 2))
        >>> norm.num_batches_tracked.item()
        0
    """
    norms = [m for m in model.modules() if isinstance(m, (_BatchNorm, _InstanceNorm))]
    # Without statistics there is nothing to freeze, and lazy ones are not there yet.
    norms = [m for m in norms if m.running_mean is not None and not is_lazy(m.running_mean)]
    tracking = [m for m in norms if m.training and m.track_running_stats]
    momenta = [m.momentum for m in tracking]
    try:
        for m in tracking:
            if isinstance(m, _BatchNorm):  # one that tracks nothing uses the batch in training
                m.track_running_stats = False
            else:  # hands its statistics over all the same, to be moved by this share
                m.momentum = 0.0
        yield
    finally:
        for m, momentum in zip(tracking, momenta, strict=True):
            m.track_running_stats, m.momentum = True, momentum
