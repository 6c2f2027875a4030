"""What test_sharded.py has each process do (see forked.py): AWP on DTensors.

The figures are relative differences to what one process should have, by the textbook or the
equation in float64; or 1 for what must not be.
"""

from __future__ import annotations

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
    full,
    mine,
    mlp,
    model_off,
    off,
    weights,
)
from torch import nn
from torch.distributed import checkpoint as checkpoints
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, parallel
from torch.nn import functional as F

from awp_optim import AWP, AdversarialStep
from awp_optim.attacks import PGD
from tests.core.toolbox import backward, train

SCENARIOS = scenario = Scenarios()


def fully_sharded(model, mesh, **kwargs):
    fully_shard(model[0], mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def prepare():
    """Before the processes are forked: what all of them would compute."""
    for way in WAYS:
        expected(way)
    for way in WAYS[:2]:
        expected(way, 12)


def runs(shard, here, ways=WAYS, hidden=10):
    """Twenty steps in all the ways that take another path, against the textbook.

    ``shard`` distributes the model it is given; ``here`` is this process' share of the data.
    """
    figures = {}
    for way in ways:
        base, norm, steps, foreach = way
        model = shard(mlp(hidden=hidden))
        settings = {"norm": norm, "ascent_steps": steps, "foreach": foreach}
        opt = AWP(model.parameters(), base, gamma=GAMMA, **settings)
        train(model, opt, here)
        name = f"{norm}, {steps} ascents{', readable' if foreach is False else ''}"
        figures[name] = model_off(model, expected(way, hidden))
    return figures


# ---------------------------------------------------------------- ways to shard


@scenario(2, 4)
def fsdp2(rank, world, directory):
    mesh = dist.init_device_mesh("cpu", (world,))
    data = batches(20)
    ways = WAYS[1:] if world == 2 else WAYS[:1]
    return runs(lambda model: fully_sharded(model, mesh), mine(data, rank, world), ways)


@scenario(4)
def hsdp(rank, world, directory):
    """Two copies of the model, each spread over two processes."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "part"))
    data = batches(20)
    return runs(lambda model: fully_sharded(model, mesh), mine(data, rank, world), WAYS[1:2])


def tensor_parallel(model, mesh):
    plan = {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}
    return parallel.parallelize_module(model, mesh, plan)


@scenario(2)
def tensor_parallelism(rank, world, directory):
    """Split by rows, then by columns; the last layer is a plain tensor, alike in all."""
    mesh = dist.init_device_mesh("cpu", (world,))
    return runs(lambda model: tensor_parallel(model, mesh), batches(20), WAYS[:1], hidden=12)


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
    figures = runs(shard, share, WAYS[1:2], hidden=12)
    return {**figures, "not strided": float("_StridedShard" not in seen)}


# ---------------------------------------------------------------- one ascent, in detail


def distributed(mesh, *placements, shape=(7, 3), seed=0, scale=1.0):
    """A parameter with a gradient, and the full tensors of both."""
    torch.manual_seed(seed)
    w, g = torch.randn(2, *shape, dtype=torch.float64) * scale
    p = nn.Parameter(distribute_tensor(w.clone(), mesh, placements))
    p.grad = distribute_tensor(g, mesh, placements)
    return p, w, g


@scenario(4)
def placements(rank, world, directory):
    """Every mix of Shard and Replicate on a mesh of two dimensions; parts that are empty."""
    mesh = dist.init_device_mesh("cpu", (2, 2))
    figures, params, fulls = {}, [], []
    for i, one in enumerate([Replicate(), Shard(0), Shard(1)]):
        for j, other in enumerate([Replicate(), Shard(0), Shard(1)]):
            for shape in [(7, 3), (3, 1, 2)]:
                p, *full_ones = distributed(mesh, one, other, shape=shape, seed=i * 3 + j)
                params.append(p)
                fulls.append(full_ones)
    params.append(nn.Parameter(torch.ones(2, 2, dtype=torch.float64)))
    params[-1].grad = torch.ones(2, 2, dtype=torch.float64)
    fulls.append([torch.ones(2, 2, dtype=torch.float64)] * 2)
    expected_v = [GAMMA * w.norm() * g / g.norm() for w, g in fulls]

    def max_off():
        return max(off(p, w + v) for p, (w, _), v in zip(params, fulls, expected_v))

    for foreach in (None, False):
        before = [p.detach().clone() for p in params]
        opt = AWP(params, torch.optim.SGD, gamma=GAMMA, lr=1.0, foreach=foreach)
        opt.first_step()
        v = opt.perturbation()
        figures[f"v {foreach}"] = max(off(v[p], t) for p, t in zip(params, expected_v))
        figures[f"w {foreach}"] = max_off()
        opt.restore()
        same = all(torch.equal(full(p), full(b)) for p, b in zip(params, before))
        figures[f"restored {foreach}"] = float(not same)
        opt.first_step(along=v)  # what perturbation() gave is something to ascend along
        figures[f"along {foreach}"] = max_off()
        opt.restore()
    return figures


@scenario(4)
def collectives(rank, world, directory):
    """One all-reduce for a batch, and one for the projection; none along Replicate."""
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
    mesh = dist.init_device_mesh("cpu", (4,))
    params = [distributed(mesh, place)[0] for place in [Shard(0), Replicate(), *[Shard(0)] * 3]]
    w = full(params[0]).clone()  # all are alike
    summed, copies, infinite, none, zero = params
    for p in (summed, copies):
        partial_grad = torch.full((7, 3), rank + 1.0, dtype=torch.float64)
        p.grad = DTensor.from_local(partial_grad, mesh, [Partial()])
    if rank == 1:
        infinite.grad.to_local()[0, 0] = float("inf")
    none.grad = None
    zero.grad.zero_()
    AWP(params, torch.optim.SGD, gamma=GAMMA, lr=1.0).first_step()
    moved = w + GAMMA * w.norm() / 21**0.5  # along ones
    return {
        "partial to shard": off(summed, moved),
        "partial to copies": off(copies, moved),
        **{f"unusable {i}": off(p, w) for i, p in enumerate((infinite, none, zero))},
    }


@scenario(4)
def random_directions(rank, world, directory):
    """Copies are equal and parts differ, whatever the seeds; sizes are those of full tensors."""
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
            abs(full(v[p]).norm() / (GAMMA * (full(p) - full(v[p])).norm()) - 1).item()
            for p in shards
        )
        opt.restore()
    return figures


@scenario(2)
def refusals(rank, world, directory):
    """Errors come before anything has changed."""
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
        "plain along": {shard: full(shard)},
        "distributed along": {plain: DTensor.from_local(torch.ones(1, 2), mesh, [Shard(0)])},
    }.items():
        refused(name, TypeError, "distribute it", lambda along=along: opt.first_step(along=along))
    unchanged = torch.equal(plain, torch.ones(2, 2)) and not opt.is_perturbed
    figures["changed"] = float(not unchanged)

    for orig in (False, True):
        flat = FullyShardedDataParallel(mlp(), use_orig_params=orig, device_id=torch.device("cpu"))
        refused(
            f"flat {orig}",
            TypeError,
            "fully_shard",
            lambda flat=flat: AWP(flat.parameters(), torch.optim.SGD, lr=1.0),
        )
    return figures


# ---------------------------------------------------------------- around the two steps


@scenario(2)
def second_forward(rank, world, directory):
    """It sees w + v; so does one without a backward pass, and the start after it."""
    figures = {}
    ((x, y),) = batches(1)
    for name, kwargs in {"default": {}, "resharding": {"reshard_after_forward": True}}.items():
        alone = mlp()
        backward(alone, x, y)
        for p in alone.parameters():
            if p.ndim > 1:
                p.data += GAMMA * p.norm() * p.grad / p.grad.norm()
        expected_loss = F.cross_entropy(alone(x), y).detach()
        model = fully_sharded(mlp(), dist.init_device_mesh("cpu", (world,)), **kwargs)
        opt = AWP(model.parameters(), SGD, gamma=GAMMA)
        backward(model, x, y)
        with torch.no_grad(), opt.perturbed():
            figures[f"evaluated, {name}"] = off(F.cross_entropy(model(x), y), expected_loss)
        if name == "default":  # the root keeps the weights it gathered, and cannot know
            model.reshard()
        before = F.cross_entropy(mlp()(x), y).detach()
        figures[f"start, {name}"] = off(backward(model, x, y), before)
        opt.zero_grad()
        backward(model, x, y)
        opt.first_step(zero_grad=True)
        figures[f"trained, {name}"] = off(backward(model, x, y), expected_loss)
        opt.restore()
    return figures


def amp_step(model, opt, scaler, x, y, clip=True, overflow_in=None):
    for name in ("ascent", "descent"):
        loss = scaler.scale(F.cross_entropy(model(x), y))
        (loss * float("inf") if name == overflow_in else loss).backward()
        if name == "ascent":
            opt.first_step(zero_grad=True)
    if clip:
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


@scenario(2)
def scaled_and_clipped(rank, world, directory):
    """GradScaler and clipping in between; an overflow at w + v in one process is one for all."""
    figures = {}
    for name, clip, base in [
        ("SGD", False, SGD),
        ("SGD, clipped", True, SGD),
        ("fused Adam", False, functools.partial(ADAM, fused=True)),
        ("fused Adam, clipped", True, functools.partial(ADAM, fused=True)),
    ]:
        alone, model = mlp(), fully_sharded(mlp(), dist.init_device_mesh("cpu", (world,)))
        plain = AWP(alone.parameters(), SGD if base is SGD else ADAM, gamma=GAMMA)
        opt = AWP(model.parameters(), base, gamma=GAMMA)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for x, y in batches(4):
            backward(alone, x, y)
            plain.first_step(zero_grad=True)
            backward(alone, x, y)
            if clip:
                nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
            plain.second_step(zero_grad=True)
            amp_step(model, opt, scaler, x.chunk(world)[rank], y.chunk(world)[rank], clip)
        figures[name] = model_off(model, weights(alone))
        for place in ("ascent", "descent"):
            before = [full(p).clone() for p in model.parameters()]
            amp_step(model, opt, scaler, x, y, clip, place if rank == 1 else None)
            moved = not all(torch.equal(full(p), b) for p, b in zip(model.parameters(), before))
            figures[f"{name}: overflow in the {place}"] = float(moved != (place == "ascent"))
    return figures


@scenario(2)
def closures(rank, world, directory):
    """One that zeroes is right, one that accumulates is refused."""
    alone, model = mlp(), fully_sharded(mlp(), dist.init_device_mesh("cpu", (world,)))
    opts = [AWP(m.parameters(), SGD, gamma=GAMMA) for m in (alone, model)]
    for x, y in batches(3):
        parts = (x, y), (x.chunk(world)[rank], y.chunk(world)[rank])
        for m, opt, part in zip((alone, model), opts, parts):

            def closure(m=m, opt=opt, part=part):
                opt.zero_grad()
                return backward(m, *part)

            opt.step(closure)
    figures = {"zeroed": model_off(model, weights(alone))}
    figures["accumulated"] = 1.0
    try:
        opts[1].step(lambda: backward(model, *parts[1]))
    except RuntimeError as error:
        figures["accumulated"] = float("did not zero" not in str(error))
    return figures | {"restored": float(opts[1].is_perturbed)}


@torch.no_grad()
def no_attack(model, x, y):
    model(x)  # leaves the root of the model with the weights it gathered
    return x


@scenario(2)
def in_one_call(rank, world, directory):
    """AdversarialStep, of a batch each, like one process with the full batch."""
    attack = PGD(eps=0.3, step_size=0.1, steps=2, random_start=False, clip=(-9, 9))
    figures = {}
    for name, kwargs in {
        "exact": {"ascent": "exact", "clip_grad_norm": 1.0},
        "no gradient in the attack": {"attack": no_attack},
    }.items():
        alone, model = mlp(), fully_sharded(mlp(), dist.init_device_mesh("cpu", (world,)))
        both = []
        for m in (alone, model):
            opt = AWP(m.parameters(), SGD, gamma=GAMMA)
            both.append(AdversarialStep(m, opt, **{"attack": attack, **kwargs}))
        for x, y in batches(4):
            both[0](x, y)
            out = both[1](x.chunk(world)[rank], y.chunk(world)[rank])
        assert out.x_adv.shape == (8 // world, 6)
        figures[name] = model_off(model, weights(alone))
    for name, kwargs in {"attack": {"ascent": "attack"}, "graph": {"cuda_graph": True}}.items():
        try:
            AdversarialStep(model, both[1].optimizer, attack, **kwargs)
        except ValueError as error:
            figures[f"{name} refused"] = float("FSDP" not in str(error))
        else:
            figures[f"{name} refused"] = 1.0
    return figures


@scenario(2)
def half_precision(rank, world, directory):
    """Weights in float32, passes in bfloat16: an ascent is of the weights in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_sharded(mlp().float(), dist.init_device_mesh("cpu", (world,)), mp_policy=policy)
    opt = AWP(model.parameters(), SGD, gamma=GAMMA)
    ((x, y),) = mine(batches(1), rank, world)
    backward(model, x.bfloat16(), y)
    before = {p: full(p).clone() for p in model.parameters()}
    opt.first_step()
    figures = {}
    for p, v in opt.perturbation().items():
        size = full(v).norm() / (GAMMA * before[p].norm()) - 1
        figures["size"] = max(figures.get("size", 0.0), float(abs(size) > 1e-5))
    backward(model, x.bfloat16(), y)
    opt.second_step()
    return figures


# ---------------------------------------------------------------- checkpoints


@scenario(4, 2)
def checkpoint(rank, world, directory):
    """Saved by four processes, loaded by two, which continue as one process would have."""
    figures = {}
    data = mine(batches(20), rank, world)
    for way, given in zip(WAYS, ("AWP", "base")):
        base, norm, steps, _ = way
        place = directory / f"{given}-{norm}"
        model = fully_sharded(mlp(seed=world), dist.init_device_mesh("cpu", (world,)))
        opt = AWP(model.parameters(), base, gamma=0.5, norm=norm, ascent_steps=steps)
        saved = opt if given == "AWP" else opt.base_optimizer
        if world == 4:
            for p, start in zip(model.parameters(), mlp().parameters()):
                p.data.copy_(distribute_tensor(start.data, p.device_mesh, p.placements))
            opt.param_groups[0]["gamma"] = GAMMA
            train(model, opt, data[:10])
            states = dict(zip(("model", "optimizer"), get_state_dict(model, saved)))
            checkpoints.save(states, checkpoint_id=place)
            continue
        before = [full(p).clone() for p in model.parameters()]
        states = dict(zip(("model", "optimizer"), get_state_dict(model, saved)))
        tried = not all(torch.equal(full(p), b) for p, b in zip(model.parameters(), before))
        checkpoints.load(states, checkpoint_id=place)
        set_state_dict(
            model, saved, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
        )
        train(model, opt, data[10:])
        figures[f"{given}, {norm}"] = model_off(model, expected(way))
        figures[f"{given}, {norm}: moved by the trial step"] = float(tried)
        figures[f"{given}, {norm}: gamma"] = abs(opt.param_groups[0]["gamma"] - GAMMA)
    return figures
