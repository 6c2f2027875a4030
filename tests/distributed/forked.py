"""Processes forked once torch is imported: ``python -m forked SCRIPT DIRECTORY PROCESSES...``.

An import for each process would take longer than all that is tested. SCRIPT is a module with
``SCENARIOS``: name -> (numbers of processes it is for, function), where a function is called with
(rank, number of processes, DIRECTORY) and returns figures by name. The largest over the processes
are written to DIRECTORY/results.json, once all is well. A function ``prepare`` of the module is
called before the processes are forked. FORKED_ONLY in the environment names the scenarios to run.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def scenarios(registry: dict[str, Any], rank: int, world: int, directory: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    store = f"file://{directory / f'store{world}'}"
    dist.init_process_group(
        "gloo",
        init_method=store,
        timeout=timedelta(seconds=60),  # for one operation
        rank=rank,
        world_size=world,
    )
    results = {}
    for name, (counts, function) in registry.items():
        if world in counts:
            start = time.perf_counter()
            everywhere: list[Any] = [None] * world
            dist.all_gather_object(everywhere, function(rank, world, directory))
            results[name] = {k: max(f[k] for f in everywhere) for k in everywhere[0]}
            if rank == 0:
                print(f"{name}, {world}: {time.perf_counter() - start:.1f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return results


def fork(registry: dict[str, Any], world: int, directory: Path) -> bool:
    """Whether all processes came through; one that fails leaves the others waiting for it."""
    children = {}
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                results = scenarios(registry, rank, world, directory)
                if rank == 0:
                    (directory / f"results{world}.json").write_text(json.dumps(results))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children[child] = rank
    well = True
    while children:
        child, status = os.wait()
        del children[child]
        if status != 0:
            if well:
                time.sleep(1)  # for others that failed, too, to say why
                for other in children:
                    os.kill(other, 9)
            well = False
    return well


def main() -> None:
    script, directory, worlds = sys.argv[1], Path(sys.argv[2]), list(map(int, sys.argv[3:]))
    module = importlib.import_module(script)
    getattr(module, "prepare", lambda: None)()
    registry = module.SCENARIOS
    if only := os.environ.get("FORKED_ONLY"):
        registry = {n: v for n, v in registry.items() if n in only.split(",")}
    for name in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"):
        importlib.import_module(name)  # what is used on the way
    if all(fork(registry, world, directory) for world in worlds):
        results = {n: json.loads((directory / f"results{n}.json").read_text()) for n in worlds}
        (directory / "results.json").write_text(json.dumps(results))
    else:
        sys.exit(1)


if __name__ == "__main__":
    main()
