"""The journal of an evaluation: what each attack did to each batch, kept as soon as it is known."""

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
    """What one attack did to one batch, in plain numbers.

    Attributes:
        index: the rows of the batch that were attacked.
        fooled, prediction, loss: for each of them, whether the model is wrong after the attack, the
            class it predicts, and the cross-entropy.
        nan: how many of them have logits that hold NaN.
        seconds: the time that the attack and the look at its result took.
        passes: how many examples the model was shown; None if graphs were replayed.
        outside: how many the attack returned outside its ball or box, or not finite.
        notes: what the attack warned of.
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
            raise ValueError("an entry's lists differ in length")
        if not all(0 <= row < n for row in self.index):
            raise ValueError("an entry's index is not among the batch's rows")

    def fooled_rows(self, n: int) -> Tensor:
        """Which of the batch's n rows were attacked and fooled, a bool tensor of shape (n,)."""
        rows = torch.zeros(n, dtype=torch.bool)
        rows[torch.tensor(self.index, dtype=torch.int64)] = torch.tensor(
            self.fooled, dtype=torch.bool
        )
        return rows


class EvaluationJournal(Journal):
    """The outcomes of all batches by attack, in memory and, with a path, in a file.

    Args:
        path: the file, or None.
        settings: what decides the results, but for the data.

    Attributes:
        batches: for each batch so far, its outcomes by attack.

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

    def next_batch(self, x: Tensor, y: Tensor) -> dict[str, Outcome]:
        """Begin the next batch.

        Returns:
            Its outcomes by attack, as far as the file has them; :meth:`note` adds to them.

        Raises:
            ValueError: the file is of other data, or its entries do not fit the batch.
        """
        number = len(self.batches)
        self._data = 0 if self.path is None else checksum([x, y.to(torch.int64)])
        if self._recorded_data.get(number, self._data) != self._data:
            raise ValueError(
                f"{self.path} is the state of an evaluation on other data: batch {number} "
                "differs. Resume with the same images in the same batches, or delete it to start "
                "again"
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
        """Note the outcome of an attack on the current batch; it is on the disk afterwards."""
        number = len(self.batches) - 1
        self.batches[number][name] = outcome
        self.add({"batch": number, "data": self._data, "name": name, **asdict(outcome)})
