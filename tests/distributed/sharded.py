"""What test_sharded.py has each process do: AWP on DTensors, beside the textbook in one process.

Run as ``sharded.py DIRECTORY RANK PROCESSES``. Every scenario returns figures, by name; the largest
over all processes are what rank 0 writes.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-3)
ADAM = partial(torch.optim.AdamW, lr=1e-2, weight_decay=1e-2)
GAMMA = 0.05
SCENARIOS = {}


def scenario(*counts):
    """Registers a scenario for these numbers of processes."""

    def register(function):
        SCENARIOS[function.__name__] = counts, function
        return function

    return register


def mlp(seed=0, hidden=10):
    """Over 4 processes its 10, 3 and 5 rows are 3 3 3 1, 1 1 1 0 and 2 2 1 0."""
    torch.manual_seed(seed)
    layers = nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 3), nn.Tanh(), nn.Linear(3, 5)
    return nn.Sequential(*layers).double()


def batches(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 6, generator=generator, dtype=torch.float64),
            torch.randint(5, (8,), generator=generator),
        )
        for _ in range(n)
    ]


def mine(data, part, parts):
    """This process' share of every batch."""
    return [(x.chunk(parts)[part], y.chunk(parts)[part]) for x, y in data]


def fully_sharded(model, mesh, **kwargs):
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def backward(model, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def train(model, opt, data):
    for x, y in data:
        for _ in range(opt.ascent_steps):
            opt.zero_grad()
            backward(model, x, y)
            opt.first_step()
        opt.zero_grad()
        backward(model, x, y)
        opt.second_step()


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def off(actual: Tensor, expected: Tensor) -> float:
    """The relative difference of two tensors."""
    return ((whole(actual) - expected).norm() / expected.norm()).item()


def model_off(model, expected: dict[str, Tensor]) -> float:
    return max(off(p, expected[n]) for n, p in model.named_parameters())


def textbook(model, data, base=SGD, steps=1, norm="l2", gamma=GAMMA):
    from test_optimizer import textbook

    return textbook(copy.deepcopy(model), data, base, lambda _: (0, gamma), steps, norm)


WAYS = [
    (ADAM, "l2", 3, None),
    (SGD, "l1", 1, None),
    (SGD, "l2", 1, None),
    (ADAM, "l1", 3, None),
    (SGD, "l2", 3, False),
]


def runs(shard, data, here, ways=WAYS, hidden=10):
    """Twenty steps in all the ways that take another path, against the textbook.

    ``shard`` distributes the model it is given; ``here`` is this process' share of the data.
    """
    from awp_optim import AWP

    figures = {}
    for base, norm, steps, foreach in ways:
        model = mlp(hidden=hidden)
        expected = textbook(model, data, base, steps, norm)
        model = shard(model)
        settings = {"norm": norm, "ascent_steps": steps, "foreach": foreach}
        opt = AWP(model.parameters(), base, gamma=GAMMA, **settings)
        train(model, opt, here)
        name = f"{norm}, {steps} ascents{', readable' if foreach is False else ''}"
        figures[name] = model_off(model, expected)
    return figures


# ---------------------------------------------------------------- ways to shard


@scenario(2, 4)
def fsdp2(rank, world, directory):
    mesh = dist.init_device_mesh("cpu", (world,))
    data = batches(20)
    ways = WAYS if world == 2 else WAYS[:2]
    return runs(lambda model: fully_sharded(model, mesh), data, mine(data, rank, world), ways)


@scenario(4)
def hsdp(rank, world, directory):
    """Two copies of the model, each spread over two processes."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "part"))
    data = batches(20)
    return runs(lambda model: fully_sharded(model, mesh), data, mine(data, rank, world), WAYS[:2])


def tensor_parallel(model, mesh):
    from torch.distributed.tensor import parallel

    plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    return parallel.parallelize_module(model, mesh, plan)


@scenario(2)
def tensor_parallelism(rank, world, directory):
    """Split by rows, then by columns; the last layer is a plain tensor, alike in all."""
    mesh = dist.init_device_mesh("cpu", (world,))
    data = batches(20)
    return runs(lambda model: tensor_parallel(model, mesh), data, data, WAYS[:2], hidden=12)


@scenario(4)
def fsdp2_of_tensor_parallel(rank, world, directory):
    """Both dimensions split, the first layer's rows even twice, as _StridedShard and Shard."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    seen = set()

    def shard(model):
        model = fully_sharded(tensor_parallel(model, mesh["tensor"]), mesh["data"])
        seen.update(type(placement).__name__ for placement in model[0].weight.placements)
        return model

    data = batches(20)
    share = mine(data, mesh.get_coordinate()[0], 2)
    figures = runs(shard, data, share, WAYS[:1], hidden=12)
    return {**figures, "not strided": float("_StridedShard" not in seen)}


# ---------------------------------------------------------------- one ascent, looked at closely


def distributed(mesh, *placements, shape=(7, 3), seed=0, scale=1.0):
    """A parameter with a gradient, and the whole of both."""
    from torch.distributed.tensor import distribute_tensor

    torch.manual_seed(seed)
    w, g = torch.randn(2, *shape, dtype=torch.float64) * scale
    p = nn.Parameter(distribute_tensor(w.clone(), mesh, placements))
    p.grad = distribute_tensor(g, mesh, placements)
    return p, w, g


@scenario(4)
def placements(rank, world, directory):
    """Every mix of Shard and Replicate on a mesh of two dimensions; parts that are empty."""
    from torch.distributed.tensor import Replicate, Shard

    from awp_optim import AWP

    mesh = dist.init_device_mesh("cpu", (2, 2))
    figures, params, wholes = {}, [], []
    for i, one in enumerate([Replicate(), Shard(0), Shard(1)]):
        for j, other in enumerate([Replicate(), Shard(0), Shard(1)]):
            for shape in [(7, 3), (1, 2), (3, 1, 2)]:
                p, *whole_ones = distributed(mesh, one, other, shape=shape, seed=i * 3 + j)
                params.append(p)
                wholes.append(whole_ones)
    params.append(nn.Parameter(torch.ones(2, 2, dtype=torch.float64)))
    params[-1].grad = torch.ones(2, 2, dtype=torch.float64)
    wholes.append([torch.ones(2, 2, dtype=torch.float64)] * 2)
    for foreach in (None, False):
        before = [p.detach().clone() for p in params]
        opt = AWP(params, torch.optim.SGD, gamma=GAMMA, lr=1.0, foreach=foreach)
        opt.first_step()
        v = opt.perturbation()
        figures[f"v {foreach}"] = max(
            off(v[p], GAMMA * w.norm() * g / g.norm()) for p, (w, g) in zip(params, wholes)
        )
        figures[f"w {foreach}"] = max(
            off(p, w + GAMMA * w.norm() * g / g.norm()) for p, (w, g) in zip(params, wholes)
        )
        again = opt.perturbation(v)
        figures[f"out {foreach}"] = float(any(again[p] is not v[p] for p in params))
        opt.restore()
        figures[f"restored {foreach}"] = float(
            not all(torch.equal(whole(p), whole(b)) for p, b in zip(params, before))
        )
        # What perturbation() gave is something to ascend along.
        opt.first_step(along=v)
        figures[f"along {foreach}"] = max(
            off(p, w + GAMMA * w.norm() * g / g.norm()) for p, (w, g) in zip(params, wholes)
        )
        opt.restore()
    return figures


@scenario(4)
def collectives(rank, world, directory):
    """One all-reduce for a batch, and one for the projection; none along Replicate."""
    from torch.distributed.tensor import Replicate, Shard

    from awp_optim import AWP

    mesh = dist.init_device_mesh("cpu", (2, 2))
    counted = []
    real = dist.all_reduce

    def counting(tensor, *args, group=None, **kwargs):
        counted.append((tuple(tensor.shape), dist.get_process_group_ranks(group)))
        return real(tensor, *args, group=group, **kwargs)

    dist.all_reduce = counting
    try:
        wrong = []
        for places, expected in [
            ((Replicate(), Shard(0)), 1),
            ((Shard(0), Shard(1)), 2),
            ((Replicate(), Replicate()), 0),
        ]:
            params = [distributed(mesh, *places, seed=i)[0] for i in range(6)]
            opt = AWP(params, torch.optim.SGD, gamma=GAMMA, lr=1.0, ascent_steps=2)
            opt.first_step()
            wrong.append([shape for shape, _ in counted] != [(12,)] * expected)
            if expected == 1:
                wrong.append(counted[0][1] != [rank // 2 * 2, rank // 2 * 2 + 1])
            counted.clear()
            opt.first_step()
            both = [(12,)] * expected + [(6,)] * expected
            wrong.append([shape for shape, _ in counted] != both)
            counted.clear()
            opt.second_step()
            wrong.append(counted != [])
    finally:
        dist.all_reduce = real
    return {"wrong": float(any(wrong))}


@scenario(4)
def other_gradients(rank, world, directory):
    """A gradient still to be summed, one that is not finite in one part, none, and zero."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    from awp_optim import AWP

    mesh = dist.init_device_mesh("cpu", (4,))
    summed, w, _ = distributed(mesh, Shard(0))
    partial_grad = torch.full((7, 3), rank + 1.0, dtype=torch.float64)
    summed.grad = DTensor.from_local(partial_grad, mesh, [Partial()])
    copies, copied, _ = distributed(mesh, Replicate())
    copies.grad = DTensor.from_local(partial_grad, mesh, [Partial()])
    infinite, infinite_w, _ = distributed(mesh, Shard(0))
    if rank == 1:
        infinite.grad.to_local()[0, 0] = float("inf")
    none, none_w, _ = distributed(mesh, Shard(0))
    none.grad = None
    zero, zero_w, _ = distributed(mesh, Shard(0))
    zero.grad.zero_()
    opt = AWP([summed, copies, infinite, none, zero], torch.optim.SGD, gamma=GAMMA, lr=1.0)
    opt.first_step()
    ones = torch.ones(7, 3, dtype=torch.float64)
    return {
        "partial to shard": off(summed, w + GAMMA * w.norm() * ones / ones.norm()),
        "partial to copies": off(copies, copied + GAMMA * w.norm() * ones / ones.norm()),
        "infinite": off(infinite, infinite_w),
        "none": off(none, none_w),
        "zero": off(zero, zero_w),
        "overflow unseen": float(not max(o.item() for o in opt._overflows)),
    }


@scenario(4)
def random_directions(rank, world, directory):
    """Copies agree, parts differ, whatever the seeds of the processes; size as of the whole."""
    from torch.distributed.tensor import Replicate, Shard

    from awp_optim import AWP

    mesh = dist.init_device_mesh("cpu", (2, 2))
    shards = [
        distributed(mesh, *places, shape=(8, 50))[0]
        for places in [(Replicate(), Shard(0)), (Replicate(), Replicate()), (Shard(0), Shard(1))]
    ]
    figures = {}
    for seeds in ("alike", "apart"):
        torch.manual_seed(1 if seeds == "alike" else rank)
        opt = AWP(shards, torch.optim.SGD, gamma=GAMMA, direction="random", lr=1.0)
        opt.first_step()
        opt.first_step()  # leaves the ball, and is brought back onto its surface
        v = opt.perturbation()
        everywhere = [None] * world
        dist.all_gather_object(everywhere, [v[p].to_local() for p in shards])
        (a, b, c, d), (e, *others), quarters = zip(*everywhere)
        figures[f"copies differ, {seeds}"] = float(
            not (torch.equal(a, c) and torch.equal(b, d) and all(torch.equal(e, o) for o in others))
        )
        cosines = [F.cosine_similarity(a.flatten(), b.flatten(), 0)]
        cosines += [
            F.cosine_similarity(x.flatten(), y.flatten(), 0)
            for i, x in enumerate(quarters)
            for y in quarters[:i]
        ]
        figures[f"parts alike, {seeds}"] = float(max(abs(x) for x in cosines) > 0.4)
        figures[f"size, {seeds}"] = max(
            abs(whole(v[p]).norm() / (GAMMA * (whole(p) - whole(v[p])).norm()) - 1).item()
            for p in shards
        )
        opt.restore()
    return figures


@scenario(2)
def refusals(rank, world, directory):
    """Errors come before anything has changed."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    from awp_optim import AWP

    mesh = dist.init_device_mesh("cpu", (2,))
    local = torch.ones(3, 2)
    odd = nn.Parameter(DTensor.from_local(local, mesh, [Partial()]))
    odd.grad = DTensor.from_local(torch.ones(3, 2), mesh, [Partial()])
    plain = nn.Parameter(torch.ones(2, 2))
    plain.grad = torch.ones(2, 2)
    shard, *_ = distributed(mesh, Shard(0))
    figures = {}

    def refused(name, error, match, function):
        try:
            function()
        except error as e:
            figures[name] = float(match not in str(e))
        else:
            figures[name] = 1.0

    opt = AWP([plain, odd], torch.optim.SGD, gamma=GAMMA, lr=1.0)
    refused("partial", TypeError, "Shard and Replicate", opt.first_step)
    opt = AWP([plain, shard], torch.optim.SGD, gamma=GAMMA, lr=1.0)
    for name, along in {
        "plain along": {shard: whole(shard)},
        "distributed along": {plain: DTensor.from_local(torch.ones(1, 2), mesh, [Shard(0)])},
    }.items():
        refused(name, TypeError, "distribute it", lambda along=along: opt.first_step(along=along))
    unchanged = torch.equal(plain, torch.ones(2, 2)) and not opt.is_perturbed
    figures["changed"] = float(not unchanged)

    from torch.distributed.fsdp import FullyShardedDataParallel

    for orig in (False, True):
        flat = FullyShardedDataParallel(mlp(), use_orig_params=orig, device_id=torch.device("cpu"))
        refused(
            f"flat {orig}",
            TypeError,
            "fully_shard",
            lambda flat=flat: AWP(flat.parameters(), torch.optim.SGD, lr=1.0),
        )
    return figures


# ----------------------------------------------------------------


def main():
    directory, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    store = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    results = {}
    for name, (counts, function) in SCENARIOS.items():
        if world in counts and (not sys.argv[4:] or name in sys.argv[4:]):
            everywhere = [None] * world
            start = time.perf_counter()
            dist.all_gather_object(everywhere, function(rank, world, directory))
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
            results[name] = {k: max(f[k] for f in everywhere) for k in everywhere[0]}
    if rank == 0:
        (directory / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
