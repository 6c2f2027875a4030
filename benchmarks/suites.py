"""What the pytest-benchmark suites share: what is timed, on what, and the rows that come of it."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from awp_optim import AWP, AdversarialStep
from awp_optim.attacks import PGD
from awp_optim.lab.data import CIFAR10_MEAN, CIFAR10_STD
from awp_optim.lab.models import build_model
from benchmarks.harness import Seconds, interleaved, median_ratio, ratios
from benchmarks.reference import ReferenceStep

GAMMA = 5e-3
# A learning rate so low that a network trained on one batch over and over stays what it was: its
# gradients would shrink to denormal numbers, which are slow. A step costs the same at any other.
SGD_SETTINGS: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}

Step = Callable[[Tensor, Tensor], Any]
Record = Callable[..., None]
"""What the fixtures ``record`` and ``replay`` give a test to call."""


@dataclass(frozen=True)
class Setting:
    """What a suite runs on, from pytest's command line (``conftest.py``)."""

    arch: str
    batch: int
    rounds: int
    device: str

    def model(self) -> nn.Module:
        """The network, the same every time, in training mode; channels last, as the lab trains."""
        torch.manual_seed(0)
        model = build_model(
            self.arch, num_classes=10, in_channels=3, mean=CIFAR10_MEAN, std=CIFAR10_STD
        )
        return model.to(self.device).to(memory_format=torch.channels_last).train()

    def data(self) -> tuple[Tensor, Tensor]:
        """One batch of random images, shape (batch, 3, 32, 32) in [0, 1], and random labels."""
        g = torch.Generator().manual_seed(1)
        x = torch.rand(self.batch, 3, 32, 32, generator=g)
        y = torch.randint(10, (self.batch,), generator=g)
        return x.to(self.device, memory_format=torch.channels_last), y.to(self.device)

    def __str__(self) -> str:
        return f"{self.arch}, batch {self.batch}"


# ------------------------------------------------------------------------- steps of training

AT = "AT"
AWP_MODES: dict[str, dict[str, Any]] = {
    "AT-AWP exact": {"ascent": "exact"},
    "AT-AWP attack": {"ascent": "attack"},
    "AT-AWP momentum": {"ascent": "momentum"},
    "AT-AWP interval 2": {"interval": 2},
}
REFERENCE_AT = "reference AT"
REFERENCE_AWP = "reference AT-AWP"
STEPS = (AT, *AWP_MODES, REFERENCE_AT, REFERENCE_AWP)
CYCLE = {"AT-AWP interval 2": 2}
"""How many steps make a cycle: after so many the same work begins again. One where not named."""


def training_step(
    name: str, model: nn.Module, *, attack_steps: int = 10, cuda_graph: bool | str = "auto"
) -> Step:
    """One of :data:`STEPS` for a model of its own; L_inf 8/255, PGD, SGD with momentum."""
    pgd: dict[str, Any] = {"eps": 8 / 255, "step_size": 2 / 255, "steps": attack_steps}
    if name in (REFERENCE_AT, REFERENCE_AWP):
        gamma = GAMMA if name == REFERENCE_AWP else 0.0
        return ReferenceStep(model, SGD(model.parameters(), **SGD_SETTINGS), gamma=gamma, **pgd)
    if name == AT:
        sgd = SGD(model.parameters(), **SGD_SETTINGS)
        return AdversarialStep(model, sgd, PGD(**pgd), cuda_graph=cuda_graph)
    awp = AWP(model.parameters(), SGD, gamma=GAMMA, **SGD_SETTINGS)
    return AdversarialStep(model, awp, PGD(**pgd), cuda_graph=cuda_graph, **AWP_MODES[name])


class Watched:
    """An eager step whose phases are timed where they run.

    A phase is a method of the step; one that runs inside another counts as part of the outer. On a
    GPU it is the device's time, and nothing waits for it before :meth:`seconds`.
    """

    PHASES = ("attack", "ascent", "descent", "update")
    _METHODS = ("_attack", "_ascend", "_descend", "_update")

    def __init__(self, step: Step, device: str) -> None:
        self._step = step
        self._mark = _device_mark if torch.device(device).type == "cuda" else time.perf_counter
        self._calls: list[dict[str, list[tuple[Any, Any]]]] = []
        self._inside = False
        for phase, method in zip(self.PHASES, self._METHODS, strict=True):
            setattr(step, method, partial(self._timed, phase, getattr(step, method)))

    def __call__(self, x: Tensor, y: Tensor) -> Any:
        self._calls.append(defaultdict(list))
        return self._step(x, y)

    def _timed(self, phase: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return method(*args, **kwargs)
        self._inside = True
        start = self._mark()
        try:
            return method(*args, **kwargs)
        finally:
            self._inside = False
            self._calls[-1][phase].append((start, self._mark()))

    def seconds(self, last: int, cycle: int = 1) -> dict[str, float]:
        """Seconds of each phase in a step: the median over the last so many cycles of steps."""
        calls = self._calls[-last * cycle :]
        cycles = [calls[i : i + cycle] for i in range(0, len(calls), cycle)]
        return {
            phase: statistics.median(
                sum(_between(*span) for call in calls for span in call[phase]) / cycle
                for calls in cycles
            )
            for phase in self.PHASES
        }


def _device_mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


# ------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Comparison:
    """What contestants timed in turn came to.

    Args:
        title: what was timed, for the head of a table.
        base: the contestant that the others are compared with.
        seconds: all timed calls, by contestant.
    """

    title: str
    base: str
    seconds: Seconds

    def row(self, name: str, **extra: Any) -> dict[str, Any]:
        """All about one contestant: what goes into the JSON, and what ``report.py`` reads."""
        each = ratios(self.seconds, name, self.base)
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        return {
            "comparison": self.title,
            "contestant": name,
            "seconds": self.seconds[name],
            "median": statistics.median(self.seconds[name]),
            "base": self.base,
            "ratio": median_ratio(self.seconds, name, self.base),
            "ratio_quartiles": [low, high],
            **extra,
        }


def measure(
    contestants: Mapping[str, Callable[[], Any]],
    setting: Setting,
    *,
    warmup: int = 1,
    calls: dict[str, int] | int = 1,
) -> Seconds:
    """Seconds of a call of each, timed in turn.

    Args:
        contestants: called without arguments.
        setting: says how many rounds, and on which device.
        warmup: rounds before, that are not timed.
        calls: calls that are timed together, by name or the same for all; each is given an equal
            share of their time. For contestants that do not do the same at every call, and for
            ones that are too short to be timed alone.
    """
    n = {k: calls if isinstance(calls, int) else calls.get(k, 1) for k in contestants}
    together = {k: partial(_repeat, call, n[k]) for k, call in contestants.items()}
    seconds = interleaved(together, rounds=setting.rounds, warmup=warmup, device=setting.device)
    return {k: [s / n[k] for s in times] for k, times in seconds.items()}


def _repeat(call: Callable[[], Any], n: int) -> None:
    for _ in range(n):
        call()
