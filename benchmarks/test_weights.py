"""The arithmetic of the weights alone: first_step and restore, without a network."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim import SGD

from awp_optim import AWP
from benchmarks.comparison import AddRow, Comparison, Setting
from benchmarks.timing import medians

BASES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "weight_decay": 5e-4},
    "SGD, momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
}
COPY, STEP = "copy", "base.step()"
RESTORE, SECOND = "first_step + restore", "first_step + second_step"
PASSES = 9
"""How often first_step and restore read or write the parameters' bytes: back up 2, norms of weights
and gradients 2, ascend 3, restore 2. A copy does it twice, or three times where the processor also
reads what it is about to overwrite; a share above 100% is then possible."""
TOGETHER = 0.02  # seconds: shorter calls are timed several at a time


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[10, 100, 2000], ids="{}-tensors".format)
def tensors(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module", params=[1e5, 1e6, 1e7, 1e8], ids="{:.0e}-parameters".format)
def parameters(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def measured(
    parameters: int, tensors: int, base: str, setting: Setting
) -> Iterator[tuple[Comparison, dict[str, Any]]]:
    contestants = build(parameters // tensors, tensors, BASES[base], setting.device)
    calls = {name: calls_together(call, setting.device) for name, call in contestants.items()}
    title = f"weights: {parameters:,} parameters in {tensors:,} tensors, {base}"
    comparison = setting.measure(title, STEP, contestants, calls)
    times = medians(comparison.seconds)
    fraction = (PASSES / times[RESTORE]) / (2 / times[COPY])
    about = {"suite": "weights", "parameters": parameters, "tensors": tensors, "optimizer": base}
    yield comparison, about | {"bandwidth_fraction": fraction}
    del contestants
    gc.collect()


def build(
    numel: int, tensors: int, settings: dict[str, Any], device: str
) -> dict[str, Callable[[], Any]]:
    """What is timed, all on the same tensors."""
    g = torch.Generator(device).manual_seed(0)
    shape = (2, numel // 2)  # a matrix, so that AWP perturbs it
    params = [torch.randn(shape, generator=g, device=device) for _ in range(tensors)]
    params = [torch.nn.Parameter(p) for p in params]
    for p in params:
        p.grad = torch.randn(shape, generator=g, device=device) / 1e3
    saved = [p.detach().clone() for p in params]
    sgd = SGD(params, foreach=True, **settings)
    awp = AWP(params, SGD, gamma=5e-3, foreach=True, **settings)

    def restore() -> None:
        awp.first_step()
        awp.restore()

    def second() -> None:
        awp.first_step()
        awp.second_step()

    @torch.no_grad()
    def copy() -> None:
        torch._foreach_copy_(saved, params)

    return {COPY: copy, STEP: sgd.step, RESTORE: restore, SECOND: second}


def calls_together(call: Callable[[], Any], device: str) -> int:
    """How many calls take about :data:`TOGETHER` seconds, at least one."""
    for _ in range(2):  # the second counts
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    return max(1, round(TOGETHER / (time.perf_counter() - start)))


@pytest.mark.parametrize("name", [COPY, STEP, RESTORE, SECOND])
def test_weights(name: str, measured: tuple[Comparison, dict[str, Any]], add_times: AddRow) -> None:
    comparison, about = measured
    add_times(comparison, name, **about)
