"""Training on several processes, as torchrun starts them; in a single one it changes nothing.

A run is the same on any number of ranks, within rounding: every rank draws the random numbers of
entire batches, and BatchNorm, the loss and the evaluation are computed over entire batches, of
which each rank works on its share.
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
from awp_optim.attacks import NFGSM, PGD
from awp_optim.attacks.balls import Projection
from awp_optim.attacks.gradient_ascent import GradientAscentAttack
from awp_optim.attacks.oracle import Gradients, Model
from awp_optim.objectives import Objective

__all__ = ["TrainingRanks"]

T = TypeVar("T")


class TrainingRanks(Ranks):
    """The processes that share every batch.

    The group needs a CPU backend beside the device's, as in :func:`~awp_optim.lab.job.job`, so that
    the hosts can communicate without waiting for a GPU.

    Attributes:
        rank, world: which of the processes this is, and how many there are.
        batch: images in the batch that was sharded last, over all ranks.
        own: how many of them are in this rank's share.
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
        """This rank's consecutive rows of a batch; the shares differ by one at most.

        A rank whose share is empty gets the first row, so that its attack draws what the others'
        draw, but ``own`` is 0 then.
        """
        self.batch = len(batch[0])
        share = self.share(self.batch)
        self.own = share.stop - share.start
        self._rows = share if self.own else slice(0, 1)
        return tuple(t[self._rows] for t in batch)

    def share(self, n: int) -> slice:
        """This rank's consecutive rows of n; it may have none."""
        return slice(*(n * r // self.world for r in (self.rank, self.rank + 1)))

    def assemble(self, rows: Tensor, n: int) -> Tensor:
        """All n rows, of which every rank gives its :meth:`share`."""
        if self.world == 1:
            return rows
        t = rows.new_zeros(n, *rows.shape[1:])
        t[self.share(n)] = rows
        dist.all_reduce(t)
        return t

    def rows(self, t: Tensor) -> Tensor:
        """This rank's rows of a tensor that has one for each image of the last batch."""
        return t[self._rows]

    def sum(self, t: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.world > 1:
            t = t.clone()
            dist.all_reduce(t)
        return t

    # ------------------------------------------------------------------ training

    def shared_model(self, model: nn.Module) -> nn.Module:
        """A model whose gradients are averaged over the ranks, with BatchNorm of entire batches.

        The BatchNorm layers of ``model`` itself are replaced, by layers with the same parameters.
        """
        if self.world == 1:
            return model
        device = next(model.parameters()).device
        if device.type == "cpu":
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.__class__ = _CPUSyncBatchNorm  # the same state, another forward pass
        else:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        # All ranks have the same statistics, so DDP need not broadcast them at every pass.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {sync: False}
        if device.type != "cpu":
            options["device_ids"] = [device]
        return DistributedDataParallel(model, **options)

    def shared_attack(self, attack: PGD | NFGSM) -> PGD | NFGSM:
        """PGD or N-FGSM on this rank's share, with the result it would have on the entire batch."""
        if self.world == 1:
            return attack
        shared = _SharedNFGSM if isinstance(attack, NFGSM) else _SharedPGD
        settings = {f.name: getattr(attack, f.name) for f in fields(attack) if f.init}
        return shared(**settings, ranks=self)

    def shared_objective(self, objective: Objective) -> Objective:
        """A loss whose mean over the ranks is the objective's mean over the batch."""
        if self.world == 1:
            return objective
        return _SharedObjective(objective, self)  # type: ignore[return-value]

    # ------------------------------------------------------------------ coordination

    def sync_stop(
        self, stop: Callable[[], bool] | None, device: torch.device
    ) -> Callable[[], bool]:
        """A ``stop`` that is True on all ranks if it is on one; None is never True.

        Every rank must call it equally often. Each call also gives all ranks the first one's random
        state: dropout, say, may have drawn more numbers for a larger share, and the starts of
        attacks, the directions and the mixing of images must be the same.
        """
        stop = stop or (lambda: False)
        if self.world == 1:
            return stop

        def synchronized() -> bool:
            states = [torch.get_rng_state()]
            if device.type == "cuda":
                states.append(torch.cuda.get_rng_state(device))
            before = torch.cat(states)
            wanted = torch.tensor([stop()], dtype=torch.uint8)
            message = torch.cat([wanted, before if self.rank == 0 else torch.zeros_like(before)])
            dist.all_reduce(message, dist.ReduceOp.MAX)
            if not torch.equal(message[1:], before):
                # Cloned, since a generator reads from the start of the memory behind a view.
                end = 1 + len(states[0])
                torch.set_rng_state(message[1:end].clone())
                if device.type == "cuda":
                    torch.cuda.set_rng_state(message[end:].clone(), device)
            return bool(message[0])

        return synchronized

    def first(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank alone; every rank returns its result, or raises."""
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


class _AllReduce(torch.autograd.Function):
    """The sum over the ranks. Each rank's loss depends on it, so gradients are summed, too."""

    # torch.distributed.nn has the same, but is deprecated.

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


class _CPUSyncBatchNorm(_BatchNorm):
    """SyncBatchNorm on a CPU, where torch has none."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # any number of dimensions, as SyncBatchNorm

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        per_channel = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1]
        var, mean = torch.var_mean(z, [d for d in range(x.ndim) if d != 1], correction=0)
        var, mean = var.double(), mean.double()  # in float32 the squares would cancel
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
        weight = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(var.to(self.running_var.dtype), weight)


class _SharedAttack(GradientAscentAttack):
    """An attack on a share of a batch, from the random starts that the entire batch would have."""

    ranks: TrainingRanks

    def _start(self, x: Tensor, project: Projection) -> Tensor:
        # Random numbers are drawn in the order of the memory, so its layout must be the batch's.
        channels_last = x.ndim == 4 and not x.is_contiguous()
        batch = torch.empty(
            (self.ranks.batch, *x.shape[1:]),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        ).zero_()
        offset = super()._start(batch, lambda z: z)
        return project(self.ranks.rows(offset) + x)

    def with_weight_gradients(
        self, model: Model, x: Tensor, y: Tensor | None, weights: Any
    ) -> tuple[Tensor, Gradients]:
        """The gradients belong to the loss of the entire batch."""
        x_adv, gradients = super().with_weight_gradients(model, x, y, weights)
        present = [g for g in gradients if g is not None]
        if not present:
            return x_adv, gradients
        flat = torch.cat([g.flatten() for g in present])
        dist.all_reduce(flat)
        totals = iter(torch.split(flat, [g.numel() for g in present]))
        return x_adv, tuple(None if g is None else next(totals).view(g.shape) for g in gradients)


@dataclass(frozen=True)
class _SharedPGD(_SharedAttack, PGD):
    ranks: TrainingRanks = field(kw_only=True, compare=False, repr=False)


@dataclass(frozen=True)
class _SharedNFGSM(_SharedAttack, NFGSM):
    ranks: TrainingRanks = field(kw_only=True, compare=False, repr=False)


class _SharedObjective:
    """An objective's mean over this rank's share, weighted by the share's size."""

    def __init__(self, objective: Objective, ranks: TrainingRanks) -> None:
        self.objective = objective
        self.needs_natural = objective.needs_natural
        self.ranks = ranks

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor:
        ranks = self.ranks
        assert len(logits_adv) == ranks.own, "the batch is not the one that was sharded last"
        weight = ranks.own * ranks.world / ranks.batch
        return self.objective(logits_adv, logits_nat, y) * weight
