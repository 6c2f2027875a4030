"""BatchNorm without updates of the running statistics."""

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
    """Context manager: BatchNorm normalizes as before, but does not update running statistics.

    In training mode it still normalizes by the batch, so gradients are those of training;
    ``running_mean``, ``running_var`` and ``num_batches_tracked`` do not change. Use it in the
    ascent pass, because only the pass at the perturbed weights should update the statistics. No
    other module is affected, and no buffer is copied.

    Args:
        model: any module; its BatchNorm layers are frozen (with subclasses and SyncBatchNorm), and
            so are InstanceNorm layers that track statistics. Lazy layers must be initialized.

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
            if isinstance(m, _BatchNorm):  # in training, it then normalizes by the batch
                m.track_running_stats = False
            else:  # InstanceNorm always updates its statistics, by this fraction
                m.momentum = 0.0
        yield
    finally:
        for m, momentum in zip(tracking, momenta, strict=True):
            m.track_running_stats, m.momentum = True, momentum


def _updates_statistics(module: nn.Module) -> TypeGuard[_NormBase]:
    """Whether a forward pass in the module's current mode changes its running statistics."""
    return (
        isinstance(module, (_BatchNorm, _InstanceNorm))
        and module.training
        and module.track_running_stats
        and module.running_mean is not None
        and not is_lazy(module.running_mean)
    )
