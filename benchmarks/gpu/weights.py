"""How long does the weight arithmetic take, against a copy of the same bytes?

    python -m benchmarks.gpu.weights

``first_step`` and ``restore`` on parameters alone, without a network. They read or write the
parameters' bytes nine times: back up 2, norms of weights and gradients 2, ascend 3, restore 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from awp_optim import AWP
from benchmarks.gpu.question import Details, Options, Record, answer, milliseconds
from benchmarks.timing import interleaved, medians

# Shaped like a transformer's: projections, and the two layers of an MLP.
MLP = [(2048, 2048), (2048, 2048), (8192, 2048), (2048, 8192)]
SHAPES = {"100 M parameters": [*MLP, *MLP, (4096, 4096)], "1 B parameters": [(4096, 4096)] * 60}
QUICK_SHAPES = {"9 K parameters": [(64, 32), (32, 64), (73, 70)]}
PASSES = {"eager": 9, "captured": 9, "copy": 2}


def cases(options: Options) -> dict[str, partial[Details]]:
    shapes = QUICK_SHAPES if options.quick else SHAPES
    return {name: partial(measure, each, options) for name, each in shapes.items()}


def measure(shapes: list[tuple[int, int]], options: Options, record: Record) -> Details:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device=options.device)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    awp = AWP(params, torch.optim.SGD, gamma=5e-3, lr=0.1)

    def perturb_and_restore() -> None:
        awp.first_step()
        awp.restore()

    perturb_and_restore()  # allocates the backup
    contestants: dict[str, Callable[[], Any]] = {"eager": perturb_and_restore}
    if options.on_gpu:
        contestants["captured"] = capture(perturb_and_restore).replay
    count = sum(p.numel() for p in params)
    source = torch.randn(count, device=options.device)
    contestants["copy"] = partial(torch.empty_like(source).copy_, source)
    seconds = interleaved(
        contestants, rounds=2 if options.quick else 20, warmup=3, calls=5, device=options.device
    )
    median = medians(seconds)
    speed = {name: PASSES[name] * 4 * count / median[name] / 1e12 for name in seconds}
    share = {name: speed[name] / speed["copy"] for name in seconds if name != "copy"}
    for name, value in share.items():
        record.figure(f"{name}: share of a copy's bandwidth", value, at_least=0.8)
    record.figure("copy, TB/s", speed["copy"])
    return {
        **milliseconds(seconds),
        "parameters": count,
        "shapes": shapes,
        "passes": PASSES,
        "terabytes_a_second": speed,
        "share_of_copy_bandwidth": share,
    }


def capture(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """The function's kernels as a graph, after two calls on another stream as torch asks for."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def main(argv: list[str] | None = None) -> int:
    return answer("weights", __doc__, cases, argv)


if __name__ == "__main__":
    sys.exit(main())
