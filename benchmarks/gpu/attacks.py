"""How long does PGD take, eager and captured, against torchattacks?

    python -m benchmarks.gpu.attacks

torchattacks is left out where it is not installed.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awp_optim.attacks import PGD, Captured
from benchmarks.gpu.networks import networks, warmup
from benchmarks.gpu.question import Details, Options, Record, answer, milliseconds
from benchmarks.steps import EPS, STEP_SIZE, images
from benchmarks.timing import Call, interleaved, median_ratio


def cases(options: Options) -> dict[str, partial[Details]]:
    batches = [4] if options.quick else [128, 1000]
    return {f"PGD-20, batch {n}": partial(measure, n, options) for n in batches}


def measure(batch: int, options: Options, record: Record) -> Details:
    net, *_ = networks(options)
    steps = 2 if options.quick else 20
    pgd = PGD(eps=EPS, step_size=STEP_SIZE, steps=steps)

    def inputs(memory_format: torch.memory_format) -> tuple[nn.Module, Tensor, Tensor]:
        model = net.build(options.device, memory_format).eval()
        return model, *images(batch, options.device, memory_format)

    float32, bf16 = inputs(torch.contiguous_format), inputs(torch.channels_last)
    captured_bf16 = Captured(pgd)

    def attack_in_bf16() -> Tensor:
        with torch.autocast(options.device.type, torch.bfloat16, cache_enabled=False):
            return captured_bf16(*bf16)

    contestants: dict[str, Call] = {
        "eager float32": partial(pgd, *float32),
        "captured float32": partial(Captured(pgd), *float32),
        "captured bf16 channels_last": attack_in_bf16,
    }
    peer = optional_module("torchattacks")
    if peer is None:
        record.note("torchattacks is not installed: left out")
    else:
        model, x, y = float32
        theirs = peer.PGD(model, eps=EPS, alpha=STEP_SIZE, steps=steps, random_start=True)
        contestants["torchattacks"] = partial(theirs, x, y)
    seconds = interleaved(
        contestants, rounds=net.rounds, warmup=warmup(options), calls=3, device=options.device
    )
    details = milliseconds(seconds)
    record.figures("ms", details["median_ms"])
    for name in contestants if peer is not None else ():
        if name.startswith("captured"):
            ratio = median_ratio(seconds, "torchattacks", name)
            record.figure(f"torchattacks / {name}", ratio, at_least=3)
    return details


def optional_module(name: str) -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def main(argv: list[str] | None = None) -> int:
    return answer("attacks", __doc__, cases, argv)


if __name__ == "__main__":
    sys.exit(main())
