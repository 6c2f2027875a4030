"""The results of an evaluation: accuracies, records of each example, and warnings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from awp_optim.evaluation.journal import Outcome

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = [
    "NATURAL",
    "Evaluation",
    "EvaluationWarning",
    "Finding",
    "Record",
    "attack_of",
    "summarize",
    "wilson",
]

NATURAL = "natural"
"""The name of the results without an attack."""


class EvaluationWarning(UserWarning):
    """A robust accuracy is doubtful; the message says why and what to do."""


@dataclass(frozen=True)
class Finding:
    """Something that makes an evaluation doubtful.

    Attributes:
        check: the name of the check that found it; see :mod:`awp_optim.evaluation.diagnostics`.
        message: what was seen, what it may mean and what to do.
    """

    check: str
    message: str


@dataclass(frozen=True)
class Record:
    """The results of one attack for each example; arrays of length n, in the order of the data.

    Attributes:
        attacked: bool, whether the attack was run on the example.
        fooled: bool, whether the attack broke the example.
        prediction: int64, the class that the model predicts after the attack; -1 if not attacked.
        loss: float64, the cross-entropy there; NaN if not attacked.
        seconds: the time for the attack and the classification of its results.
        passes: forward passes per attacked example (and about as many backward passes if the attack
            uses gradients); None if graphs were replayed, which hides them.
    """

    attacked: Array
    fooled: Array
    prediction: Array
    loss: Array
    seconds: float
    passes: float | None


@dataclass(frozen=True)
class Evaluation:
    """Accuracies under attacks, as fractions of all ``n`` examples, in [0, 1].

    Attributes:
        n: the number of examples.
        natural: accuracy without an attack.
        robust: accuracy under each attack, by name, in the order given; with ``skip_broken``, under
            this and all previous attacks.
        worst_case: fraction of the examples that no attack broke.
        broken_by: array of str: the attack that broke each example first ("NAME/PART" if the attack
            has parts), "natural" if the model is wrong without an attack, or "" if none did.
        labels, predictions: int64, each example's class, and the model's prediction without an
            attack.
        records: a :class:`Record` for each attack, by name, and for each part, as "NAME/PART".
        warnings: reasons to doubt these numbers; empty if none were found.
        skip_broken: whether attacks skipped the examples that previous attacks had broken.
    """

    n: int
    natural: float
    robust: dict[str, float]
    worst_case: float
    broken_by: Array
    labels: Array = field(repr=False)
    predictions: Array = field(repr=False)
    records: dict[str, Record] = field(repr=False)
    warnings: tuple[Finding, ...]
    skip_broken: bool

    @property
    def accuracies(self) -> dict[str, float]:
        """All accuracies: "natural", each attack by name, and "worst_case"."""
        return {NATURAL: self.natural, **self.robust, "worst_case": self.worst_case}

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """The Wilson score interval of an accuracy, with the examples as a random sample.

        Args:
            name: one of :attr:`accuracies`.
            level: the confidence level, between 0 and 1.

        Raises:
            KeyError: there is no such accuracy.
            ValueError: ``level`` is not between 0 and 1.

        >>> import torch
        >>> from awp_optim.evaluation import evaluate
        >>> model = lambda x: torch.stack([x, -x], 1)
        >>> r = evaluate(model, (torch.ones(100), torch.zeros(100).long()), {}, checks=False)
        >>> lo, hi = r.interval("natural")
        >>> round(lo, 4), hi
        (0.963, 1.0)
        """
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level!r}")
        if name not in self.accuracies:
            names = ", ".join(self.accuracies)
            raise KeyError(f"there is no accuracy {name!r}; choose one of {names}")
        return wilson(self.accuracies[name], self.n, level)

    def to_dict(self) -> dict[str, Any]:
        """Everything except for the records of examples, for ``json.dump``."""
        import numpy as np

        broken = self.broken_by[self.broken_by != ""]
        first, counts = (values.tolist() for values in np.unique(broken, return_counts=True))
        return {
            "n": self.n,
            "natural": self.natural,
            "robust": dict(self.robust),
            "worst_case": self.worst_case,
            "intervals": {name: list(self.interval(name)) for name in self.accuracies},
            "broken_first_by": dict(zip(first, counts, strict=True)),
            "seconds": {name: record.seconds for name, record in self.records.items()},
            "passes": {name: record.passes for name, record in self.records.items()},
            "skip_broken": self.skip_broken,
            "warnings": [{"check": f.check, "message": f.message} for f in self.warnings],
        }


def wilson(share: float, n: int, level: float) -> tuple[float, float]:
    """The score interval of a proportion (Wilson, 1927), which is also valid near 0 and 1."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (
        0.0 if share == 0 else max(0.0, center - half),
        1.0 if share == 1 else min(1.0, center + half),
    )


def attack_of(part: str) -> str:
    """The attack that a part belongs to: NAME for "NAME/PART"; an attack's own name unchanged."""
    return part.partition("/")[0]


def summarize(
    labels: Sequence[Sequence[int]],
    outcomes: Sequence[Mapping[str, Outcome]],
    parts: Iterable[str],
    *,
    skip_broken: bool,
) -> Evaluation:
    """The result of an evaluation, without warnings.

    Args:
        labels: the labels of each batch.
        outcomes: the outcomes of each batch, by name, including ``NATURAL``.
        parts: the names of the attacks, or of their parts, in order.
        skip_broken: see :class:`Evaluation`.
    """
    import numpy as np

    sizes = [len(batch) for batch in labels]
    natural = _record(sizes, [batch[NATURAL] for batch in outcomes])
    records: dict[str, Record] = {}
    robust: dict[str, float] = {}
    broken_by = np.where(natural.fooled, NATURAL, "").astype(object)
    for attack, names in itertools.groupby(parts, attack_of):
        of_parts = {name: _record(sizes, [batch[name] for batch in outcomes]) for name in names}
        for name, record in of_parts.items():
            broken_by[record.fooled & (broken_by == "")] = name
        records |= {**of_parts, attack: _merged(list(of_parts.values()))}
        broken = broken_by != "" if skip_broken else natural.fooled | records[attack].fooled
        robust[attack] = float((~broken).mean())
    return Evaluation(
        n=sum(sizes),
        natural=float((~natural.fooled).mean()),
        robust=robust,
        worst_case=float((broken_by == "").mean()),
        broken_by=broken_by.astype(str),
        labels=np.concatenate([np.array(batch, dtype=np.int64) for batch in labels]),
        predictions=natural.prediction,
        records=records,
        warnings=(),
        skip_broken=skip_broken,
    )


def _record(sizes: Sequence[int], outcomes: Sequence[Outcome]) -> Record:
    """The outcomes of one attack on all batches, as one record."""
    import numpy as np

    n = sum(sizes)
    attacked, fooled = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    prediction, loss = np.full(n, -1, dtype=np.int64), np.full(n, np.nan)
    start = 0
    for size, outcome in zip(sizes, outcomes, strict=True):
        rows = start + np.array(outcome.index, dtype=np.int64)
        attacked[rows] = True
        fooled[rows] = outcome.fooled
        prediction[rows] = outcome.prediction
        loss[rows] = outcome.loss
        start += size
    passes = [outcome.passes for outcome in outcomes]
    return Record(
        attacked,
        fooled,
        prediction,
        loss,
        sum(outcome.seconds for outcome in outcomes),
        _share(passes, int(attacked.sum())),
    )


def _merged(parts: Sequence[Record]) -> Record:
    """The record of an attack, each of whose parts skipped what previous parts had broken."""
    if len(parts) == 1:
        return parts[0]
    attacked, fooled, prediction, loss = (
        getattr(parts[0], name).copy() for name in ("attacked", "fooled", "prediction", "loss")
    )
    for part in parts[1:]:
        attacked |= part.attacked
        fooled |= part.fooled
        prediction[part.attacked] = part.prediction[part.attacked]
        loss[part.attacked] = part.loss[part.attacked]
    totals = [None if r.passes is None else r.passes * int(r.attacked.sum()) for r in parts]
    seconds = sum(part.seconds for part in parts)
    return Record(attacked, fooled, prediction, loss, seconds, _share(totals, int(attacked.sum())))


def _share(passes: Sequence[float | None], attacked: int) -> float | None:
    """Passes per attacked example; None if some could not be counted."""
    counted = [count for count in passes if count is not None]
    return sum(counted) / max(1, attacked) if len(counted) == len(passes) else None
