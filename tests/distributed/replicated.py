"""What test_replicated.py has each process do (see forked.py): a copy of the weights in each.

The figures are relative differences in float64; or 1 for what must not be.
"""

from __future__ import annotations

import copy
import functools

import torch
import torch.distributed as dist
from common import (
    ADAM,
    GAMMA,
    SGD,
    WAYS,
    Scenarios,
    batches,
    expected,
    mine,
    mlp,
    model_off,
    weights,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from awp_optim import AWP, AdversarialStep, frozen_batch_norm
from awp_optim.attacks import PGD
from tests.core.toolbox import backward, train

SCENARIOS = scenario = Scenarios()


def prepare():
    for way in WAYS[:3]:
        expected(way)


def apart(model) -> float:
    """1 unless the weights are the same, bit for bit, in all processes."""
    bits = torch.cat([p.detach().reshape(-1).view(torch.int64) for p in model.parameters()])
    checksums = [None] * dist.get_world_size()
    dist.all_gather_object(checksums, hash(tuple(bits.tolist())))
    return float(len(set(checksums)) > 1)


@scenario(2)
def same_v_for_all(rank, world, directory):
    """The ascent along synchronized gradients: the run of one process."""
    figures = {}
    for way, kwargs in zip(
        WAYS[:3], [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}]
    ):
        base, norm, steps, _ = way
        model = mlp()
        ddp = DistributedDataParallel(model, **kwargs)
        opt = AWP(ddp.parameters(), base, gamma=GAMMA, norm=norm, ascent_steps=steps)
        name = " ".join([norm, str(steps), *kwargs])
        figures[f"{name}: apart"] = 0.0
        for batch in mine(batches(20), rank, world):
            train(ddp, opt, [batch])
            figures[f"{name}: apart"] += apart(model)
        figures[name] = model_off(model, expected(way))
    return figures


@scenario(2)
def a_v_for_each(rank, world, directory):
    """The ascent under no_sync(): the mean of the gradients, each at the process' own w + v."""
    figures = {}
    for name, kwargs in {"": {}, "views": {"gradient_as_bucket_view": True}}.items():
        alone, model = mlp(), mlp()
        base = SGD(alone.parameters())
        ddp = DistributedDataParallel(model, **kwargs)
        opt = AWP(ddp.parameters(), SGD, gamma=GAMMA)
        figures[f"apart {name}"] = 0.0
        for x, y in batches(20):
            base.zero_grad()
            for part in zip(x.chunk(world), y.chunk(world)):
                perturbed = copy.deepcopy(alone)
                perturbed.zero_grad()
                backward(perturbed, *part)
                for p in perturbed.parameters():
                    if p.ndim > 1:
                        p.data += GAMMA * p.data.norm() * p.grad / p.grad.norm()
                perturbed.zero_grad()
                backward(perturbed, *part)
                for p, q in zip(alone.parameters(), perturbed.parameters()):
                    p.grad = q.grad / world + (0 if p.grad is None else p.grad)
            base.step()

            x, y = x.chunk(world)[rank], y.chunk(world)[rank]
            with ddp.no_sync():
                backward(ddp, x, y)
            opt.first_step(zero_grad=True)
            backward(ddp, x, y)
            opt.second_step(zero_grad=True)
            figures[f"apart {name}"] += apart(model)
        figures[f"weights {name}"] = model_off(model, weights(alone))
    return figures


@scenario(2)
def all_reduces(rank, world, directory):
    """One more with the same v for all, none with a v for each."""
    ((x, y),) = mine(batches(1), rank, world)
    model = mlp()
    ddp = DistributedDataParallel(model)
    opt = AWP(ddp.parameters(), SGD, gamma=GAMMA)
    sizes, called = [], []

    def counting(state, bucket):
        sizes.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, counting)
    real = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (called.append(args), real(*args, **kwargs))[1]
    try:
        whole_gradient = sum(p.numel() for p in model.parameters())
        wrong, hooked = [], 0
        for no_sync, ascents, expected_number in [(False, 1, 2), (True, 1, 1), (False, 3, 4)]:
            opt.ascent_steps = ascents
            sizes.clear()
            for _ in range(ascents):
                opt.zero_grad()
                if no_sync:
                    with ddp.no_sync():
                        backward(ddp, x, y)
                else:
                    backward(ddp, x, y)
                opt.first_step()
            opt.zero_grad()
            backward(ddp, x, y)
            opt.second_step()
            wrong.append(sum(sizes) != expected_number * whole_gradient)
            hooked += len(sizes)
    finally:
        dist.all_reduce = real
    return {"other than expected": float(any(wrong)), "by AWP itself": float(len(called) - hooked)}


@scenario(2)
def accumulated(rank, world, directory):
    """Two micro-batches in each process, synchronized with the last."""
    model = mlp()
    ddp = DistributedDataParallel(model)
    opt = AWP(ddp.parameters(), SGD, gamma=GAMMA)

    def backward_in_two(x, y):
        opt.zero_grad()
        one, two = zip(x.chunk(2), y.chunk(2))
        with ddp.no_sync():
            (F.cross_entropy(ddp(one[0]), one[1]) / 2).backward()
        (F.cross_entropy(ddp(two[0]), two[1]) / 2).backward()

    for x, y in mine(batches(20), rank, world):
        backward_in_two(x, y)
        opt.first_step()
        backward_in_two(x, y)
        opt.second_step()
    return {"weights": model_off(model, expected(WAYS[2])), "apart": apart(model)}


@scenario(2)
def overflow_in_one(rank, world, directory):
    """Of a v for each process: skipped in one alone, the update would part the copies."""
    figures = {}
    for name, base in {"SGD": SGD, "fused": functools.partial(ADAM, fused=True)}.items():
        model = mlp()
        ddp = DistributedDataParallel(model)
        opt = AWP(ddp.parameters(), base, gamma=GAMMA)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i, (x, y) in enumerate(mine(batches(4), rank, world)):
            with ddp.no_sync():
                loss = scaler.scale(F.cross_entropy(ddp(x), y))
                (loss * float("inf") if rank == i % 2 and i < 3 else loss).backward()
            opt.first_step(zero_grad=True)
            scaler.scale(F.cross_entropy(ddp(x), y)).backward()
            before = weights(copy.deepcopy(model))
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            figures[f"{name}: apart"] = figures.get(f"{name}: apart", 0.0) + apart(model)
            figures[f"{name}: lost"] = float(model_off(model, before) == 0)
    return figures


@scenario(2)
def random_directions(rank, world, directory):
    """Of each process' own generator."""
    model = mlp()
    ddp = DistributedDataParallel(model)
    torch.manual_seed(rank)
    opt = AWP(ddp.parameters(), SGD, gamma=GAMMA, direction="random")
    figures = {"apart": 0.0}
    for x, y in mine(batches(3), rank, world):
        with opt.perturbed(zero_grad=True):
            figures["alike"] = 1.0 - apart(model)
            backward(ddp, x, y)
            opt.second_step()
        figures["apart"] += apart(model)
    return figures


class Normalized(nn.Sequential):
    def __init__(self):
        torch.manual_seed(3)
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))
        self.double()


@scenario(2)
def in_one_call(rank, world, directory):
    """AdversarialStep; the statistics are of the pass at w + v, and of the first process."""
    attack = PGD(eps=0.3, step_size=0.1, steps=2, random_start=False, clip=(-9, 9))
    figures = {}
    for name, kwargs, same in [
        ("exact", {"clip_grad_norm": 1.0}, True),
        ("static graph", {"ddp": {"static_graph": True}}, True),
        ("unused parameters", {"ddp": {"find_unused_parameters": True}}, True),
        ("views", {"ddp": {"gradient_as_bucket_view": True}}, True),
        ("attack", {"ascent": "attack"}, False),
    ]:
        alone, model = mlp(), mlp()
        ddp = DistributedDataParallel(model, **kwargs.pop("ddp", {}))
        opts = AWP(alone.parameters(), SGD, gamma=GAMMA), AWP(ddp.parameters(), SGD, gamma=GAMMA)
        steps = [AdversarialStep(m, o, attack, **kwargs) for m, o in zip((alone, ddp), opts)]
        figures[f"{name}: apart"] = 0.0
        for x, y in batches(4):
            steps[0](x, y)
            steps[1](x.chunk(world)[rank], y.chunk(world)[rank])
            figures[f"{name}: apart"] += apart(model)
        if same:
            figures[name] = model_off(model, weights(alone))
    model = Normalized()
    ddp = DistributedDataParallel(model)
    step = AdversarialStep(ddp, AWP(ddp.parameters(), SGD, gamma=GAMMA), attack)
    for x, y in mine(batches(3), rank, world):
        step(x, y)
    figures["batches counted"] = abs(float(model[1].num_batches_tracked) - 3)
    figures["statistics: apart"] = apart(model)
    return figures


@scenario(2)
def sync_batch_norm(rank, world, directory):
    """Its forward needs an accelerator: here only that it is converted, frozen and let go."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Normalized())
    norm = model[1]
    with frozen_batch_norm(model):
        frozen = isinstance(norm, nn.SyncBatchNorm) and not norm.track_running_stats
    return {"not frozen": float(not frozen), "frozen": float(not norm.track_running_stats)}


@scenario(2)
def zero_redundancy(rank, world, directory):
    """Each process keeps the optimizer's state of its own part of the parameters."""
    figures = {}
    for name in ("built by AWP", "wrapped"):
        alone, model = mlp(), mlp()
        plain = AWP(alone.parameters(), torch.optim.AdamW, gamma=GAMMA, lr=1e-2)
        ddp = DistributedDataParallel(model)
        zero = functools.partial(
            ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, lr=1e-2
        )
        if name == "wrapped":
            opt = AWP.wrap(zero(ddp.parameters()), gamma=GAMMA)
        else:
            opt = AWP(ddp.parameters(), zero, gamma=GAMMA)
        schedulers = [torch.optim.lr_scheduler.StepLR(o, 5, gamma=0.5) for o in (plain, opt)]
        figures[f"{name}: apart"] = 0.0

        def go(data, opt, alone=alone, plain=plain, ddp=ddp, schedulers=schedulers, name=name):
            for x, y in data:
                train(alone, plain, [(x, y)])
                train(ddp, opt, [(x.chunk(world)[rank], y.chunk(world)[rank])])
                for scheduler in schedulers:
                    scheduler.step()
                figures[f"{name}: apart"] += apart(ddp)

        go(batches(12), opt)
        figures[f"{name}: 12 steps"] = model_off(model, weights(alone))
        inner = opt.base_optimizer.optim.param_groups[0]
        figures[f"{name}: inner lr"] = abs(inner["lr"] / 1e-2 - 0.25)  # of the last step
        mine_alone = sum(len(state) > 0 for state in opt.base_optimizer.optim.state.values())
        figures[f"{name}: not shared out"] = float(mine_alone >= len(list(model.parameters())))

        opt.base_optimizer.consolidate_state_dict(to=0)
        saved = [opt.state_dict() if rank == 0 else None]
        dist.broadcast_object_list(saved)
        others = [len(s) for s in saved[0]["state"].values()]
        figures[f"{name}: state lost"] = float(others != [3] * len(list(model.parameters())))
        opt = AWP(ddp.parameters(), zero, gamma=0.5)
        opt.load_state_dict(saved[0])
        figures[f"{name}: gamma"] = abs(opt.param_groups[0]["gamma"] - GAMMA)
        schedulers[1].optimizer = opt
        go(batches(8, seed=2), opt)
        figures[f"{name}: 20 steps"] = model_off(model, weights(alone))
    return figures
