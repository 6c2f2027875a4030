"""Training on several processes, as torchrun starts them; on one, nothing of this has an effect.

A run is the same on any number of ranks, within rounding: what is random is drawn for whole batches
on every rank, and BatchNorm, the loss and the evaluation are of whole batches. Each rank works on
its share of a batch.
"""

from __future__ import annotations

import inspect
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from awp_optim.attacks import PGD
from awp_optim.attacks.base import Gradients, Model
from awp_optim.attacks.geometry import Projection
from awp_optim.objectives import Objective
from awp_optim.ranks import Ranks

__all__ = ["Job", "TrainingRanks", "job"]

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""What the others wait for the first, which may be downloading. torchrun sees a death at once."""


class TrainingRanks(Ranks):
    """The processes that share out every batch.

    The group must serve the CPU beside the device, as that of :func:`job` does: what the hosts
    agree on must not wait for a GPU.

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

    def take(self, *batch: Tensor) -> tuple[Tensor, ...]:
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
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Either way all have the same statistics, which need not be sent around at every pass.
        arguments = inspect.signature(DistributedDataParallel).parameters
        sync = (
            "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"
        )
        return DistributedDataParallel(
            model, device_ids=None if device.type == "cpu" else [device], **{sync: False}
        )

    def shared_attack(self, attack: PGD) -> PGD:
        """The attack on this rank's share, as the one on the whole batch would treat it."""
        if self.world == 1:
            return attack
        return _SharedPGD(**{f.name: getattr(attack, f.name) for f in fields(PGD)}, ranks=self)

    def shared_objective(self, objective: Objective) -> Objective:
        """A loss whose mean over the ranks is the objective's mean over the batch."""
        return objective if self.world == 1 else _SharedObjective(objective, self)

    # ------------------------------------------------------------------ agreement

    def together(
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
                states = [t.clone() for t in message[1:].split([len(state) for state in states])]
                torch.set_rng_state(states[0])
                if device.type == "cuda":
                    torch.cuda.set_rng_state(states[1], device)
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
        answer, error = self.agree((answer, error))
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


class _Synced(nn.Module):
    """BatchNorm that trains on the batch of all ranks, on any device; else as it was."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)  # type: ignore[misc, no-any-return]
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
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(var.to(self.running_var.dtype), share)


class _Synced1d(_Synced, nn.BatchNorm1d): ...


class _Synced2d(_Synced, nn.BatchNorm2d): ...


class _Synced3d(_Synced, nn.BatchNorm3d): ...


def _synchronize(model: nn.Module) -> None:
    synced = {nn.BatchNorm1d: _Synced1d, nn.BatchNorm2d: _Synced2d, nn.BatchNorm3d: _Synced3d}
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
        totals = iter(flat.split([g.numel() for g in there]))
        return x_adv, tuple(None if g is None else next(totals).view(g.shape) for g in gradients)


@dataclass(frozen=True)
class _SharedObjective:
    """An objective's mean over this rank's share, times what the share is to an even one."""

    objective: Objective
    ranks: TrainingRanks

    @property
    def needs_natural(self) -> bool:
        return self.objective.needs_natural

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor:
        ranks = self.ranks
        weight = ranks.own * ranks.world / ranks.batch
        return self.objective(logits_adv, logits_nat, y) * weight


# ---------------------------------------------------------------------- the job


class RankLost(ConnectionError):
    """Another process of the run has gone."""


@contextmanager
def naming_the_lost(ranks: Ranks) -> Iterator[None]:
    """Inside, a collective that fails for want of another rank raises :class:`RankLost`."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or not _is_of_communication(error):
            raise
        raise RankLost(
            f"{_lost(ranks)} of {ranks.world} processes has ended, or cannot be reached any more. "
            f"What is saved is of before: go on with --resume ({str(error).strip():.80}...)"
        ) from error


def _is_of_communication(error: RuntimeError) -> bool:
    kinds = (dist.DistError, dist.DistBackendError, dist.DistNetworkError)
    return isinstance(error, kinds) or "gloo" in str(error)


def _lost(ranks: Ranks) -> str:
    """The rank that does not answer within a second, in words."""
    if _job is None or _job.store is None:
        return "one"
    with suppress(Exception):  # the store may have gone, too
        _job.store.add(f"here/{ranks.rank}", 1)
        time.sleep(1)
        gone = [r for r in range(ranks.world) if not _job.store.check([f"here/{r}"])]
        if gone:
            return f"rank {', '.join(map(str, gone))}"
    return "one"


_job: Job | None = None


class Job(TrainingRanks):
    """The processes of a program, and what they say.

    Attributes:
        store: where torchrun's processes leave word for each other; None for a single process.
    """

    def __init__(self, store: dist.Store | None) -> None:
        super().__init__()
        self.store = store

    def device(self, name: str) -> str:
        """The device of this rank: of GPUs, each process on a machine has its own.

        Raises:
            ValueError: there are fewer GPUs than processes, or ``name`` is one of them.
        """
        kind = torch.device(name)
        if self.world == 1 or kind.type != "cuda":
            return name
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if kind.index is not None:
            raise ValueError(f"each process has a GPU of its own: --device cuda, not {name}")
        if local >= count:
            raise ValueError(
                f"{local + 1} or more processes on a machine with {count} GPUs: start no more than "
                f"one for each, --nproc-per-node {count}"
            )
        torch.cuda.set_device(local)
        return f"cuda:{local}"

    def in_turns(self, function: Callable[[], T]) -> T:
        """What a function gives, called by the first rank, then by one on each other machine, then
        by all others: so that one download is enough. An error of one is everybody's."""
        if self.world == 1:
            return function()
        turn = 0 if self.rank == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
        answer: Any = None
        for now in range(3):
            error: Exception | None = None
            if now == turn:
                try:
                    answer = function()
                except Exception as raised:
                    error = raised
            for each in self.gather(error):
                if each is not None:
                    raise each
        return answer  # type: ignore[no-any-return]

    def tell(self, text: str, consequence: bool) -> None:
        """Write why the program ends to the standard error, once for all ranks.

        The first rank does so; the others where it has something else to say, or nothing.

        Args:
            text: what to write.
            consequence: of an error that another rank has written already, perhaps.
        """
        store = self.store
        assert store is not None
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, for another's end
        with suppress(Exception):  # without the store, better twice than never
            if self.rank == 0:
                store.set("said", text)
            else:
                store.wait(["said"], timedelta(seconds=5))
                if store.get("said").decode() == text:
                    return
        with suppress(Exception):
            if consequence and store.check(["cause"]):
                return
            if not consequence:
                store.add("cause", 1)
            if self.rank and store.add(f"by others: {text}", 1) > 1:
                return
        sys.stderr.write(text if self.rank == 0 else f"rank {self.rank}: {text}")
        sys.stderr.flush()


@contextmanager
def job() -> Iterator[Job]:
    """Join the processes that torchrun started, for a program's whole main; or be alone.

    Inside, all but the first are silent. A ``sys.exit("why")`` inside is told once, whichever ranks
    leave by it, and no rank is gone before the first has spoken: torchrun would end it. Everybody
    waits for the first one to be done.
    """
    global _job
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Job(None)
        return
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's processes may find in the store what those before a restart have left there.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
    )
    _job = ranks = Job(dist.PrefixStore("awp_optim", store))
    nowhere = io.StringIO()
    try:
        if rank == 0:
            yield ranks
        else:
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield ranks
    except SystemExit as error:
        if isinstance(error.code, str):
            ranks.tell(f"{error.code}\n", isinstance(error.__context__, RankLost))
            raise SystemExit(1) from None
        _wait_for_the_first(ranks)
        raise
    _wait_for_the_first(ranks)
    dist.destroy_process_group()


def _wait_for_the_first(ranks: Job) -> None:
    assert ranks.store is not None
    with suppress(Exception):
        if ranks.rank == 0:
            ranks.store.set("said", "")
        ranks.store.wait(["said"], TIMEOUT)
