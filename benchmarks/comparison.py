"""What the pytest-benchmark suites share: what they run on, and the rows of results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.steps import images, network
from benchmarks.timing import WARMUP_CALLS, Call, Seconds, interleaved, median_ratio, ratios

AddRow = Callable[..., None]
"""What the fixtures ``add_row`` and ``add_times`` give a test to call."""


@dataclass(frozen=True)
class Setting:
    """What a suite runs on, from pytest's command line."""

    arch: str
    batch: int
    rounds: int
    device: str

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def warmup(self) -> int:
        """Calls before the timed ones."""
        return WARMUP_CALLS if self.on_gpu else 1

    def model(self) -> nn.Module:
        """The network, with the same weights at every call, in training mode."""
        return network(self.arch, self.device)

    def data(self) -> tuple[Tensor, Tensor]:
        """One batch of random images and labels."""
        return images(self.batch, self.device)

    def measure(
        self,
        title: str,
        base: str,
        contestants: Mapping[str, Call],
        calls: Mapping[str, int] | int | None = None,
    ) -> Comparison:
        """Time the contestants in turn.

        Args:
            title: what is timed, for the head of a table.
            base: the contestant that the others are compared with.
            contestants: called without arguments.
            calls: calls that are timed together; by default one on a CPU and three on a GPU.
        """
        seconds = interleaved(
            contestants,
            rounds=self.rounds,
            warmup=self.warmup,
            calls=calls or (3 if self.on_gpu else 1),
            device=self.device,
        )
        return Comparison(title, base, seconds)

    def __str__(self) -> str:
        return f"{self.arch}, batch {self.batch}"


@dataclass(frozen=True)
class Comparison:
    """The times of contestants that were measured in turn.

    Attributes:
        title: what was timed.
        base: the contestant that the others are compared with.
        seconds: the time of a call in every round, by contestant.
    """

    title: str
    base: str
    seconds: Seconds

    def row(self, name: str, **extra: Any) -> dict[str, Any]:
        """What is recorded about one contestant."""
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
