"""Training on several processes, as torchrun starts them; on one, nothing of this has an effect.

A run is the same on any number of ranks, within rounding: what is random is drawn for whole batches
on every rank, and BatchNorm, the loss and the evaluation are of whole batches. Each rank works on
its share of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from awp_optim._utils.distributed import Ranks
from awp_optim.attacks import PGD
from awp_optim.attacks.balls import Projection
from awp_optim.attacks.base import Gradients, Model
from awp_optim.objectives import Objective

__all__ = ["TrainingRanks"]

T = TypeVar("T")


class TrainingRanks(Ranks):
    """The processes that share out every batch.

    The group must serve the CPU beside the device, as :func:`~awp_optim.lab.job.job`'s does: what
    the hosts agree on must not wait for a GPU.

    Attributes:
        rank, world: which of them this is, and how many there are.
        batch: how many images the batch had that was shared out last, in all.
        own: how many of them are this rank's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batch = self.own = 0
        self._rows = slice(0)

    # ------------------------------------------------------------------ batches

    def check_batch(self, size: int, what: str) -> None:
        """Raise ValueError if a batch has no image for one of the ranks."""
        if size < self.world:
            raise ValueError(
                f"{what} has {size} images for {self.world} processes, and each needs one: start "
                "fewer (--nproc-per-node), or change --batch-size or --epoch-images"
            )

    def shard(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """This rank's rows of a batch: neighbours, as many as on the other ranks or one less.

        A rank with none gets the first row, so that its attack draws what the others' draw, but
        ``own`` is 0 then.
        """
        self.batch = n = len(batch[0])
        start, stop = (n * r // self.world for r in (self.rank, self.rank + 1))
        self.own = stop - start
        self._rows = slice(start, stop) if self.own else slice(0, 1)
        return tuple(t[self._rows] for t in batch)

    def rows(self, t: Tensor) -> Tensor:
        """This rank's of a tensor with a row for each image of the batch."""
        return t[self._rows]

    def sum(self, t: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.world > 1:
            t = t.clone()
            dist.all_reduce(t)
        return t

    # ------------------------------------------------------------------ what trains

    def shared_model(self, model: nn.Module) -> nn.Module:
        """A model whose gradients are the means over the ranks, with BatchNorm of whole batches.

        The layers of ``model`` itself are changed, to others with the same state.
        """
        if self.world == 1:
            return model
        device = next(model.parameters()).device
        # SyncBatchNorm is for GPUs alone.
        if device.type == "cpu":
            _synchronize(model)
        else:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        # Either way all have the same statistics, which need not be sent around at every pass.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {sync: False}
        if device.type != "cpu":
            options["device_ids"] = [device]
        return DistributedDataParallel(model, **options)

    def shared_attack(self, attack: PGD) -> PGD:
        """The attack on this rank's share, as the one on the whole batch would treat it."""
        if self.world == 1:
            return attack
        return _SharedPGD(**{f.name: getattr(attack, f.name) for f in fields(PGD)}, ranks=self)

    def shared_objective(self, objective: Objective) -> Objective:
        """A loss whose mean over the ranks is the objective's mean over the batch."""
        if self.world == 1:
            return objective
        return _SharedObjective(objective, self)  # type: ignore[return-value]

    # ------------------------------------------------------------------ agreement

    def sync_stop(
        self, stop: Callable[[], bool] | None, device: torch.device
    ) -> Callable[[], bool] | None:
        """A ``stop`` that is True on all ranks if it is on one.

        Every rank must ask as often. At each time the first one's random state becomes
        everybody's: dropout, say, may have drawn more for a larger share, and the starts of
        attacks, directions and mixing of images must be the same.
        """
        if self.world == 1:
            return stop

        def agreed() -> bool:
            states = [torch.get_rng_state()]
            if device.type == "cuda":
                states.append(torch.cuda.get_rng_state(device))
            before = torch.cat(states)
            said = torch.tensor([stop is not None and stop()], dtype=torch.uint8)
            message = torch.cat([said, before if self.rank == 0 else torch.zeros_like(before)])
            dist.all_reduce(message, dist.ReduceOp.MAX)
            if not torch.equal(message[1:], before):
                # Generators read from the beginning of the memory, whatever part of it they get.
                end = 1 + len(states[0])
                torch.set_rng_state(message[1:end].clone())
                if device.type == "cuda":
                    torch.cuda.set_rng_state(message[end:].clone(), device)
            return bool(message[0])

        return agreed

    def first(self, function: Callable[[], T]) -> T:
        """What a function gives on the first rank, called there alone; its error is everybody's."""
        if self.world == 1:
            return function()
        answer: Any = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                answer = function()
            except Exception as raised:
                error = raised
        answer, error = self.broadcast((answer, error))
        if error is not None:
            raise error
        return answer  # type: ignore[no-any-return]


# The sum over the ranks, which the loss of each of them depends on: so its gradients are summed,
# too. (torch.distributed.nn has the same, but is deprecated.)
class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        t = t.clone()
        dist.all_reduce(t)
        return t

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


class _Synced(_BatchNorm):
    """BatchNorm that trains on the batch of all ranks, on any device; else as it was."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        per_channel = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1]
        var, mean = torch.var_mean(z, [d for d in range(x.ndim) if d != 1], correction=0)
        var, mean = var.double(), mean.double()  # where squares do not cancel
        share = torch.cat([mean, var + mean**2, mean.new_ones(1)]) * count
        sums = _AllReduce.apply(share)
        n = sums[-1]
        mean, square = (sums[:-1] / n).chunk(2)
        var = square - mean**2
        self._track(mean, var * n / (n - 1))
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        y = (z - mean.to(z.dtype).view(per_channel)) * scale.to(z.dtype).view(per_channel)
        if self.bias is not None:
            y = y + self.bias.view(per_channel)
        normalized: Tensor = y.to(x.dtype)
        return normalized

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None:
            return
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(var.to(self.running_var.dtype), share)


class _Synced1d(_Synced, nn.BatchNorm1d): ...


class _Synced2d(_Synced, nn.BatchNorm2d): ...


class _Synced3d(_Synced, nn.BatchNorm3d): ...


def _synchronize(model: nn.Module) -> None:
    synced: dict[type, type] = {
        nn.BatchNorm1d: _Synced1d,
        nn.BatchNorm2d: _Synced2d,
        nn.BatchNorm3d: _Synced3d,
    }
    for module in model.modules():
        # The state stays: it is the forward pass that is another.
        module.__class__ = synced.get(type(module), type(module))


@dataclass(frozen=True)
class _SharedPGD(PGD):
    """PGD on a share of a batch, from the random starts that the whole batch would have."""

    ranks: TrainingRanks = field(kw_only=True, compare=False, repr=False)

    def _start(self, x: Tensor, project: Projection) -> Tensor:
        n = self.ranks.batch
        # Numbers are drawn in the order of the memory.
        layout = (
            torch.contiguous_format if x.is_contiguous() or x.ndim != 4 else torch.channels_last
        )
        whole = torch.empty(
            (n, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout
        ).zero_()
        offset = super()._start(whole, lambda z: z)
        return project(self.ranks.rows(offset) + x)

    def with_weight_gradients(
        self, model: Model, x: Tensor, y: Tensor | None, weights: Any
    ) -> tuple[Tensor, Gradients]:
        """The gradients are of the whole batch's loss."""
        x_adv, gradients = super().with_weight_gradients(model, x, y, weights)
        there = [g for g in gradients if g is not None]
        if not there:
            return x_adv, gradients
        flat = torch.cat([g.flatten() for g in there])
        dist.all_reduce(flat)
        totals = iter(torch.split(flat, [g.numel() for g in there]))
        return x_adv, tuple(None if g is None else next(totals).view(g.shape) for g in gradients)


class _SharedObjective:
    """An objective's mean over this rank's share, times what the share is to an even one."""

    def __init__(self, objective: Objective, ranks: TrainingRanks) -> None:
        self.objective = objective
        self.needs_natural = objective.needs_natural
        self.ranks = ranks

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor:
        ranks = self.ranks
        weight = ranks.own * ranks.world / ranks.batch
        return self.objective(logits_adv, logits_nat, y) * weight
