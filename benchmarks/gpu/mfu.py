"""Which share of the device's bf16 matrix rate does a training step reach?

    python -m benchmarks.gpu.mfu
    python -m benchmarks.gpu.mfu --compiled --case preact_resnet18

Operations are counted in an eager step (two for each multiply-add, as torch counts them); the rate
is that of a large matrix product, timed in turn with the steps.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.compiled import many_compilations
from benchmarks.gpu.networks import (
    CAPTURED,
    COMPILED,
    EAGER_BF16,
    Network,
    Setting,
    build_step,
    networks,
    warmup,
)
from benchmarks.gpu.question import Details, Options, Record, answer, milliseconds
from benchmarks.steps import AT, EXACT
from benchmarks.timing import interleaved, medians


def cases(options: Options) -> dict[str, partial[Details]]:
    setting = COMPILED if options.extra.compiled else CAPTURED
    return {
        f"{net.arch}, {setting.name}": partial(measure, net, setting, options)
        for net in networks(options)
    }


def measure(net: Network, setting: Setting, options: Options, record: Record) -> Details:
    flops = {method: count_operations(net, method, options) for method in (AT, EXACT)}
    n = 256 if options.quick else 8192
    a, b = (torch.randn(n, n, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    with many_compilations() if setting.compiled else nullcontext():
        contestants = {m: build_step(net, m, setting, options) for m in flops}
        contestants["matrices"] = partial(torch.mm, a, b, out=torch.empty_like(a))
        seconds = interleaved(
            contestants,
            rounds=net.rounds,
            warmup=warmup(options),
            calls=net.calls,
            device=options.device,
        )
    median = medians(seconds)
    counted = {**flops, "matrices": 2 * n**3}
    tflops = {name: counted[name] / median[name] / 1e12 for name in counted}
    share = {method: tflops[method] / tflops["matrices"] for method in flops}
    record.figures("TFLOP/s", tflops)
    record.figure("exact / matrices", share[EXACT], at_least=net.share)
    return {
        **milliseconds(seconds),
        "matrix_size": n,
        "operations": flops,
        "tflops": tflops,
        "share": share,
    }


def count_operations(net: Network, method: str, options: Options) -> int:
    """Operations of one step, after a first one that creates the optimizer's state."""
    step = build_step(net, method, EAGER_BF16, options)
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compiled", action="store_true", help="through torch.compile")


def main(argv: list[str] | None = None) -> int:
    return answer("mfu", __doc__, cases, argv, add_arguments)


if __name__ == "__main__":
    sys.exit(main())
