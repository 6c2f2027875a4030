"""Which kernels take the time of a training step?

    python -m benchmarks.gpu.kernels

One eager step in bf16 and channels_last, after a few others: a graph replays the same kernels.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.networks import EAGER_BF16, Network, build_step, networks
from benchmarks.gpu.question import Details, Options, Record, answer
from benchmarks.steps import AT, EXACT

# Parts of a kernel's name; the first group that has one of them counts.
GROUPS = {
    "BatchNorm": ("batch_norm", "bn_fw", "bn_bw"),
    "convolutions": ("conv", "gemm", "cutlass", "addmm"),
    "copies and casts": ("copy", "Memcpy"),
}
LISTED = 30


def cases(options: Options) -> dict[str, partial[Details]]:
    return {
        f"{net.arch}, {method}": partial(measure, net, method, options)
        for net in networks(options)
        for method in (AT, EXACT)
    }


def measure(net: Network, method: str, options: Options, record: Record) -> Details:
    step = build_step(net, method, EAGER_BF16, options)
    for _ in range(1 if options.quick else 3):
        step()
    activity = ProfilerActivity.CUDA if options.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
        if options.on_gpu:
            torch.cuda.synchronize()
    kernels = sorted(_kernels(profiler, options), key=lambda kernel: -kernel["ms"])
    groups: Counter[str] = Counter()
    for kernel in kernels:
        groups[_group(kernel["name"])] += kernel["ms"]
    total = sum(groups.values())
    record.figure("in kernels, ms", total)
    record.figures("% of it", {name: 100 * ms / total for name, ms in groups.most_common()})
    record.figure("launches", sum(kernel["launches"] for kernel in kernels))
    return {"ms": total, "groups_ms": dict(groups), "kernels": kernels[:LISTED]}


def _kernels(profiler: profile, options: Options) -> Iterator[Details]:
    """Name, milliseconds and launches of every kernel; on a CPU of every operator."""
    for event in profiler.key_averages():
        on_device = str(event.device_type).endswith("CUDA")
        microseconds = event.self_device_time_total if options.on_gpu else event.self_cpu_time_total
        annotated = event.key.startswith("Optimizer.step#")  # a span that holds other kernels
        if microseconds and on_device == options.on_gpu and not annotated:
            yield {"name": event.key, "ms": microseconds / 1e3, "launches": event.count}


def _group(name: str) -> str:
    found = (group for group, parts in GROUPS.items() if any(part in name for part in parts))
    return next(found, "other")


def main(argv: list[str] | None = None) -> int:
    return answer("kernels", __doc__, cases, argv)


if __name__ == "__main__":
    sys.exit(main())
