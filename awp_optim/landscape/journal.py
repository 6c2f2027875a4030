"""The journal of a landscape: the losses at each point, saved once they are measured."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from awp_optim._utils.distributed import Ranks
from awp_optim._utils.journal import Journal, checksum
from awp_optim.landscape.probe import Point

__all__ = ["LandscapeJournal", "PointLosses"]


@dataclass(frozen=True)
class PointLosses:
    """The losses at a point of weight space: means over the examples, and their standard errors.

    Attributes:
        adv, nat: adversarial and natural loss.
        adv_stderr, nat_stderr: their standard errors.
        rise_stderr: the standard error of the adversarial loss minus that of the unperturbed model,
            paired by example.
        n: the number of examples.
        adv_losses: each example's adversarial loss; only for the unperturbed model.
    """

    adv: float
    nat: float
    adv_stderr: float
    nat_stderr: float
    rise_stderr: float
    n: int
    adv_losses: list[float] | None = None

    @classmethod
    def of(cls, adv: list[float], nat: list[float], unperturbed: PointLosses | None) -> PointLosses:
        """Summarize the losses of all examples; ``unperturbed`` is None for the model itself."""
        base = adv if unperturbed is None else unperturbed.adv_losses
        assert base is not None
        return cls(
            adv=_mean(adv),
            nat=_mean(nat),
            adv_stderr=_stderr(adv),
            nat_stderr=_stderr(nat),
            rise_stderr=_stderr([a - b for a, b in zip(adv, base, strict=True)]),
            n=len(adv),
            adv_losses=adv if unperturbed is None else None,
        )


class LandscapeJournal(Journal):
    """The points in a state file, which the first rank reads and writes for all ranks.

    Args:
        path: the file, or None.
        settings: everything that determines the losses, except for the directions.
        directions: the directions, which points refer to by number; a file may hold points along
            other directions.
        ranks: the processes that share the points.

    Raises:
        ValueError: on all ranks, the file is damaged, or belongs to another landscape.
        OSError: on all ranks, it cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        settings: dict[str, Any],
        directions: Sequence[Mapping[str, Tensor]],
        ranks: Ranks,
    ) -> None:
        self._ids: list[int] | None = None
        if path is not None:
            self._ids = [checksum(d[name] for name in sorted(d)) for d in directions]
        self._recorded: dict[str, PointLosses] = {}
        failure: Exception | None = None
        try:
            super().__init__(path if ranks.rank == 0 else None, "a landscape", settings)
            self._read_points()
        except (OSError, ValueError) as error:
            failure = error
        self._recorded, failure = ranks.broadcast((self._recorded, failure))
        if failure is not None:
            raise failure

    def _read_points(self) -> None:
        try:
            for entry in self.entries:
                values = dict(entry)
                point = [(int(direction), float(alpha)) for direction, alpha in values.pop("point")]
                losses = PointLosses(**values)
                if not point and losses.adv_losses is None:
                    raise ValueError("an entry lacks its losses")
                self._recorded[repr(point)] = losses
        except (KeyError, TypeError, ValueError) as error:
            raise self.damaged(error) from error

    def recorded(self, point: Point) -> PointLosses | None:
        """The recorded losses at a point, or None."""
        return self._recorded.get(repr(self._named(point)))

    def note(self, point: Point, losses: PointLosses) -> None:
        """Record the losses at a point, and write them to disk."""
        self.add({"point": self._named(point), **asdict(losses)})

    def _named(self, point: Point) -> list[tuple[int, float]]:
        """A point by the checksums of its directions, which are the same in every call."""
        return [] if self._ids is None else [(self._ids[i], alpha) for i, alpha in point]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _stderr(values: Sequence[float]) -> float:
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return math.nan
    mean = _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
