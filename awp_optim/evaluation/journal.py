"""The journal of an evaluation: the outcome of each attack on each batch, saved at once."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from awp_optim._utils.journal import Journal, checksum

__all__ = ["EvaluationJournal", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one attack on one batch, in plain numbers.

    Attributes:
        index: the rows of the batch that were attacked.
        fooled, prediction, loss: for each of these rows, whether the model is wrong after the
            attack, the class that it predicts, and the cross-entropy.
        nan: the number of these rows whose logits hold NaN.
        seconds: the time for the attack and the classification of its result.
        passes: the number of examples that the model processed; None if graphs were replayed.
        outside: the number of adversarial examples outside the ball or box, or not finite.
        notes: the attack's warnings.
    """

    index: list[int] = field(default_factory=list)
    fooled: list[bool] = field(default_factory=list)
    prediction: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    nan: int = 0
    seconds: float = 0.0
    passes: int | None = 0
    outside: int = 0
    notes: list[str] = field(default_factory=list)

    def check(self, n: int) -> None:
        """Raise ValueError or TypeError unless this is the outcome of a batch of n examples."""
        if not len(self.index) == len(self.fooled) == len(self.prediction) == len(self.loss):
            raise ValueError("the lists of an entry differ in length")
        if not all(0 <= row < n for row in self.index):
            raise ValueError("an index of an entry is not a row of the batch")

    def fooled_rows(self, n: int) -> Tensor:
        """Which of the batch's n rows were attacked and fooled, a bool tensor of shape (n,)."""
        rows = torch.zeros(n, dtype=torch.bool)
        rows[torch.tensor(self.index, dtype=torch.int64)] = torch.tensor(
            self.fooled, dtype=torch.bool
        )
        return rows


class EvaluationJournal(Journal):
    """The outcomes of all batches by attack, in memory and, with a path, in a file.

    An evaluation may continue one whose attacks are the first of its own.

    Args:
        path: the file, or None.
        settings: everything that determines the results, except for the data.

    Attributes:
        batches: the outcomes of each batch so far, by attack.

    Raises:
        ValueError: the file is damaged, or belongs to another evaluation.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: dict[str, Any]) -> None:
        super().__init__(path, "an evaluation", settings)
        self.batches: list[dict[str, Outcome]] = []
        self._data = 0
        self._recorded: dict[int, dict[str, Outcome]] = {}
        self._recorded_data: dict[int, int] = {}
        try:
            for entry in self.entries:
                values = dict(entry)
                batch, name = int(values.pop("batch")), str(values.pop("name"))
                self._recorded_data[batch] = values.pop("data")
                self._recorded.setdefault(batch, {})[name] = Outcome(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise self.damaged(error) from error

    def _is_same(self, name: str, value: Any, recorded: dict[str, Any]) -> bool:
        before = recorded.get(name)
        if name == "attacks" and isinstance(before, dict):
            return list(before.items()) == list(value.items())[: len(before)]
        return super()._is_same(name, value, recorded)

    def next_batch(self, x: Tensor, y: Tensor) -> dict[str, Outcome]:
        """Begin the next batch.

        Returns:
            Its recorded outcomes by attack; :meth:`note` adds to them.

        Raises:
            ValueError: the file belongs to other data, or its entries do not fit the batch.
        """
        number = len(self.batches)
        self._data = 0 if self.path is None else checksum([x, y.to(torch.int64)])
        if self._recorded_data.get(number, self._data) != self._data:
            raise ValueError(
                f"{self.path} belongs to an evaluation on other data: batch {number} differs. "
                "Resume with the same images in the same batches, or delete it to start again"
            )
        outcomes = self._recorded.get(number, {})
        try:
            for outcome in outcomes.values():
                outcome.check(len(y))
        except (ValueError, TypeError) as error:
            raise self.damaged(error) from error
        self.batches.append(outcomes)
        return outcomes

    def note(self, name: str, outcome: Outcome) -> None:
        """Record the outcome of an attack on the current batch, and write it to disk."""
        number = len(self.batches) - 1
        self.batches[number][name] = outcome
        self.add({"batch": number, "data": self._data, "name": name, **asdict(outcome)})
