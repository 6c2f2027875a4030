"""How much more memory does training take with AWP than without?

    python -m benchmarks.gpu.memory

Peaks of torch's allocator over what was allocated before. Reserved memory is recorded, too: a
CUDA graph reserves its own.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from benchmarks.gpu.networks import (
    CAPTURED,
    EAGER_BF16,
    Network,
    Setting,
    build_step,
    networks,
    warmup,
)
from benchmarks.gpu.question import Details, Options, Record, answer, free_memory
from benchmarks.steps import AT, ATTACK, EXACT

METHODS = (AT, EXACT, ATTACK)


def cases(options: Options) -> dict[str, partial[Details]]:
    return {
        f"{net.arch}, {setting.name}": partial(measure, net, setting, options)
        for net in networks(options)
        for setting in (EAGER_BF16, CAPTURED)
    }


def measure(net: Network, setting: Setting, options: Options, record: Record) -> Details:
    # Trying out algorithms takes workspaces, and not always the same ones.
    torch.backends.cudnn.benchmark = False
    parameters = net.build(torch.device("cpu"), torch.contiguous_format).parameters()
    size = sum(p.numel() * p.element_size() for p in parameters if p.ndim > 1)
    peak_bytes(net, AT, setting, options)  # what libraries keep once they are loaded
    peaks = {method: peak_bytes(net, method, setting, options) for method in METHODS}
    allocated = {method: peak[0] for method, peak in peaks.items()}
    over = {m: (allocated[m] - allocated[AT]) / size for m in METHODS if m != AT}
    if options.on_gpu:
        for method, ratio in over.items():
            record.figure(f"({method} - AT) / parameters", ratio, at_most=1.05)
    else:
        record.figure("peak", "unknown: torch keeps no statistics on a CPU")
    return {
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": {method: peak[1] for method, peak in peaks.items()},
        "perturbed_parameters_bytes": size,
        "over_at_in_parameters": over,
    }


def peak_bytes(net: Network, method: str, setting: Setting, options: Options) -> tuple[int, int]:
    """Peak bytes allocated and reserved, over those before; zeros on a CPU."""
    free_memory(options)
    before = _statistics(options, reset=True)
    step = build_step(net, method, setting, options)
    for _ in range(warmup(options)):  # up to the first replay
        step()
    allocated, reserved = _statistics(options)
    return allocated - before[0], reserved - before[1]


def _statistics(options: Options, reset: bool = False) -> tuple[int, int]:  # noqa: FBT001, FBT002
    if not options.on_gpu:
        return 0, 0
    torch.cuda.synchronize()
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def main(argv: list[str] | None = None) -> int:
    return answer("memory", __doc__, cases, argv)


if __name__ == "__main__":
    sys.exit(main())
