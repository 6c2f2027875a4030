"""BatchNorm without updates of its running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

__all__ = ["frozen_batch_norm"]


@contextmanager
def frozen_batch_norm(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm normalizes as before but leaves its running statistics alone.

    In training mode it still normalizes by the batch, so that gradients are those of training;
    ``running_mean``, ``running_var`` and ``num_batches_tracked`` do not change. An ascent of the
    weights needs this: only the pass at the perturbed weights should count. No other module is
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
    tracking = [m for m in model.modules() if _updates_statistics(m)]
    momenta = [m.momentum for m in tracking]
    try:
        for m in tracking:
            if isinstance(m, _BatchNorm):  # without tracking it normalizes by the batch in training
                m.track_running_stats = False
            else:  # InstanceNorm updates its statistics in any case, by this fraction
                m.momentum = 0.0
        yield
    finally:
        for m, momentum in zip(tracking, momenta, strict=True):
            m.track_running_stats, m.momentum = True, momentum


def _updates_statistics(module: nn.Module) -> TypeGuard[_NormBase]:
    """Whether a forward pass in the module's present mode changes its running statistics."""
    return (
        isinstance(module, (_BatchNorm, _InstanceNorm))
        and module.training
        and module.track_running_stats
        and module.running_mean is not None
        and not is_lazy(module.running_mean)
    )
