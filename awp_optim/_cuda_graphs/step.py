"""A training step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from awp_optim._core.backup import Snapshot
from awp_optim._core.settings import check_group, is_active
from awp_optim._cuda_graphs.capture import Tensors, renew_accumulators
from awp_optim._cuda_graphs.graphs import Graphs, HostState
from awp_optim._cuda_graphs.keys import memory_key, module_key, parameters
from awp_optim._cuda_graphs.scalars import DeviceScalars
from awp_optim._cuda_graphs.update import UpdateKey
from awp_optim.optimizer import AWP

__all__ = ["CapturedStep"]

# The settings of AWP and of the base optimizer that change an ascent.
_ASCENT_SETTINGS = ("norm", "direction", "min_ndim", "maximize")


class CapturedStep:
    """Forward and backward passes and the update that follows them, replayed as one graph.

    Learning rate and gamma may change between calls. If the update cannot be captured (see
    :class:`UpdateKey`), it runs after the replay.

    It does not keep what it calls, so that the caller, which owns it, is freed with its last
    reference, and the graphs with it.

    Args:
        model: used in the passes.
        optimizer: holds the parameters; its ``step()`` is the update.
        mode: see :class:`Graphs`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        mode: bool | str,  # noqa: FBT001 -- as the caller's
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._base = base = optimizer.base_optimizer if isinstance(optimizer, AWP) else optimizer
        # Prevents a warning that a capturable optimizer steps without a graph in the first calls.
        base._warned_capturable_if_run_uncaptured = True  # noqa: SLF001
        self._graphs = Graphs(_possible_mode(mode, model, optimizer), "the training step")
        self._host = _StepState(optimizer)
        self._scalars = DeviceScalars()
        self._update_key = UpdateKey(optimizer, base)
        self.applies_to = self._graphs.applies_to

    def __call__(
        self,
        passes: Callable[[Tensor, Tensor], Tensors],
        x: Tensor,
        y: Tensor,
        settings: Hashable,
    ) -> Tensors:
        """Run the passes and the update; return the outputs of the passes.

        Args:
            passes: takes inputs and labels, leaves the weights perturbed and the gradients in
                ``p.grad``, returns what the step returns.
            x: inputs, detached.
            y: labels, detached.
            settings: what the passes depend on.
        """
        optimizer = self._optimizer
        if isinstance(optimizer, AWP):
            for group in optimizer.param_groups:
                check_group(group)
        self._scalars.update(optimizer, x.device)
        weights_key = memory_key(parameters(optimizer))
        update_key = self._update_key(x.device, weights_key)
        groups_key = tuple(map(_ascent_key, optimizer.param_groups))
        key = (settings, module_key(self._model), weights_key, groups_key, update_key)
        base = None if update_key is None else self._base

        def function(x: Tensor, y: Tensor) -> Tensors:
            with self._scalars.installed(optimizer, base):
                outputs = passes(x, y)
                if base is not None:
                    optimizer.step()
            return outputs

        outputs = self._graphs(function, (x, y), key, self._host)
        torch.clear_autocast_cache()  # the weights have changed
        if update_key is None:
            optimizer.step()
        return outputs


class _Saved(NamedTuple):
    """The host's state after a captured step, and buffers that its graph writes to."""

    gradients: list[tuple[Tensor, Tensor | None]]
    snapshot: Snapshot | None
    buffers: list[Tensor]


class _StepState(HostState):
    """Which tensors are the gradients, and which weights are perturbed."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._awp = optimizer if isinstance(optimizer, AWP) else None

    def prepare(self) -> None:
        renew_accumulators(parameters(self._optimizer))

    def save(self) -> _Saved:
        gradients = [(p, p.grad) for p in parameters(self._optimizer)]
        if self._awp is None:
            return _Saved(gradients, None, [])
        backup = self._awp.backup
        return _Saved(gradients, backup.snapshot(), list(backup.buffers.values()))

    def load(self, saved: _Saved) -> None:
        for p, grad in saved.gradients:
            if p.grad is not grad:
                p.grad = grad
            # Autograd does not notice that a replay writes to weights that it may have saved.
            torch.autograd.graph.increment_version(p)
        if self._awp is not None and saved.snapshot is not None:
            self._awp.backup.reinstate(saved.snapshot)

    def reset(self) -> None:
        self._optimizer.zero_grad()
        if self._awp is not None:
            self._awp.backup.forget()


def _possible_mode(
    mode: bool | str,  # noqa: FBT001 -- as the caller's
    model: nn.Module,
    optimizer: Optimizer,
) -> bool | str:
    """The mode; False instead of "auto" if a step of this model cannot be captured.

    Raises:
        ValueError: the mode is True, and the model is distributed or on several devices.
    """
    unsupported = [type(m).__name__ for m in model.modules() if _is_distributed(m)]
    if len({p.device for p in parameters(optimizer)}) > 1:
        unsupported.append("parameters on several devices")
    if mode is True and unsupported:
        raise ValueError(f"cuda_graph=True does not support {unsupported[0]}: leave it at 'auto'")
    has_sparse_gradients = any(getattr(m, "sparse", False) for m in model.modules())
    return False if mode == "auto" and (unsupported or has_sparse_gradients) else mode


def _is_distributed(module: nn.Module) -> bool:
    is_replicated = isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    is_fully_sharded = hasattr(module, "reshard")
    has_dtensors = any(hasattr(p, "full_tensor") for p in module.parameters(recurse=False))
    return is_replicated or is_fully_sharded or has_dtensors


def _ascent_key(group: dict[str, Any]) -> Hashable:
    """The settings of a group that change its ascent; a nonzero gamma may vary."""
    gamma = group.get("gamma", 0)
    address = gamma.data_ptr() if isinstance(gamma, Tensor) else None
    settings = map(group.get, _ASCENT_SETTINGS)
    return len(group["params"]), *settings, address, "gamma" in group and is_active(group)
