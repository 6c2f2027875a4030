"""What a step costs in several processes, compared with one process that has one's batch.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.distributed --out distributed.json

Every process has its own batch, so that perfect scaling is a time ratio of 1. Contestants are timed
in turn by rank 0. On one machine's CPU the processes share its cores and memory: there, compare the
contestants of several processes with one another.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from awp_optim import AWP, frozen_batch_norm
from awp_optim.attacks import PGD
from awp_optim.lab.models import build_model
from benchmarks.environment import environment, write_json
from benchmarks.timing import interleaved, median_ratio, medians


def train_step(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    attack: PGD,
    x: Tensor,
    y: Tensor,
    *,
    no_sync: bool = False,
) -> None:
    """Adversarial training, or AT-AWP with the ascent synchronized or not."""
    x_adv = attack(model, x, y)
    opt.zero_grad()
    if isinstance(opt, AWP):
        own = model.no_sync() if no_sync else nullcontext()  # type: ignore[operator]
        with own, frozen_batch_norm(model):
            F.cross_entropy(model(x_adv), y).backward()  # type: ignore[no-untyped-call]
        opt.first_step(zero_grad=True)
    F.cross_entropy(model(x_adv), y).backward()  # type: ignore[no-untyped-call]
    opt.step()


def contestants(arch: str, attack: PGD, x: Tensor, y: Tensor) -> dict[str, Callable[[], None]]:
    """What is timed, by name. Steps of one process run on rank 0 while the others wait."""
    rank, device = dist.get_rank(), x.device
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)
    entries: dict[str, Callable[[], None]] = {}

    def model() -> nn.Module:
        torch.manual_seed(0)
        return build_model(arch, num_classes=10, in_channels=3).to(device)

    def add(name: str, net: nn.Module, *, awp: bool, no_sync: bool = False) -> None:
        opt = AWP(net.parameters(), sgd, gamma=5e-3) if awp else sgd(net.parameters())
        entries[name] = partial(train_step, net, opt, attack, x, y, no_sync=no_sync)

    def alone(step: Callable[[], None]) -> None:
        if rank == 0:
            step()
        dist.barrier()

    for awp in (False, True):
        name = "AT-AWP" if awp else "AT"
        add(f"{name}, one process", model(), awp=awp)
        entries[f"{name}, one process"] = partial(alone, entries[f"{name}, one process"])
        add(f"{name}, DDP", DistributedDataParallel(model()), awp=awp)
        if awp:
            add(f"{name}, DDP, no_sync", DistributedDataParallel(model()), awp=awp, no_sync=True)
        sharded = model()
        for child in sharded.children():
            if sum(p.numel() for p in child.parameters()) > 0:
                fully_shard(child)
        fully_shard(sharded)
        add(f"{name}, FSDP2", sharded, awp=awp)
    return entries


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--arch", default="preact_resnet_small")
    parser.add_argument("--batch", type=int, default=32, help="images in each process")
    parser.add_argument("--size", type=int, default=32, help="pixels of an image's side")
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.rand(options.batch, 3, options.size, options.size, generator=generator).to(device)
    y = torch.randint(10, (options.batch,), generator=generator).to(device)
    attack = PGD(eps=8 / 255, step_size=2 / 255, steps=options.attack_steps)
    entries = contestants(options.arch, attack, x, y)
    seconds = interleaved(entries, rounds=options.rounds, warmup=1, device=device)
    if dist.get_rank() == 0:
        report = {
            **environment(device),
            **vars(options),
            "processes": dist.get_world_size(),
            "median_seconds": medians(seconds),
            "over_AT_alike": {
                name: median_ratio(
                    seconds, name, name.replace("AT-AWP", "AT").replace(", no_sync", "")
                )
                for name in seconds
                if name.startswith("AT-AWP")
            },
            "over_one_process": {
                name: median_ratio(seconds, name, f"{name.split(',')[0]}, one process")
                for name in seconds
            },
            "seconds": seconds,
        }
        write_json(options.out, report)
        for name, ratio in report["over_one_process"].items():
            print(f"{name:24} {report['median_seconds'][name]:8.3f} s  x{ratio:.2f} of one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
