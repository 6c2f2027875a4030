"""One batch of an evaluation: runs attacks on it and classifies the results."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awp_optim._cuda_graphs.graphs import RECORDERS
from awp_optim._utils.attacking import perturb
from awp_optim._utils.batches import check_classes, seeded
from awp_optim._utils.checks import describe
from awp_optim.attacks import Attack, Captured
from awp_optim.attacks.balls import BALLS, limits
from awp_optim.attacks.captured import unwrap
from awp_optim.attacks.losses import ce
from awp_optim.attacks.oracle import Model, ModelOracle
from awp_optim.evaluation.journal import Outcome
from awp_optim.evaluation.results import NATURAL

__all__ = ["AttackedBatch", "ObservedModel"]


class ObservedModel(nn.Module):
    """The model as attacks see it: it returns logits, and counts the examples that it processes.

    Attributes:
        examples: the number of examples processed; set it to 0 to restart the count.
    """

    def __init__(
        self, model: Callable[[Tensor], Any], logits: Callable[[Any], Tensor] | None
    ) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(
                f"model must be a module or a function of inputs, got {describe(model)}"
            )
        self.model, self.logits = model, logits
        self.examples = 0

    @property
    def for_attacks(self) -> Model:
        """What attacks get: a module if the model is one, else a function."""
        return self if isinstance(self.model, nn.Module) else self.forward

    def forward(self, x: Tensor) -> Tensor:
        self.examples += len(x)
        output: Tensor = self.model(x)
        return output if self.logits is None else self.logits(output)


@dataclass(frozen=True)
class AttackedBatch:
    """A batch on the model's device, to be attacked.

    Attributes:
        number: its position in the evaluation.
        x, y: its examples and their labels.
        model: the model.
        seed: the evaluation's seed, or None.
    """

    number: int
    x: Tensor
    y: Tensor
    model: ObservedModel
    seed: int | None

    def classify(self) -> Outcome:
        """Classify the examples without an attack."""
        with seeded(self.x.device, self.seed, self.number, NATURAL):  # the model may be random
            verdict = _verdict(self.model.for_attacks, self.x, self.y)
        return Outcome(list(range(len(self.y))), *verdict)

    def attack(self, name: str, attack: Callable[..., Tensor], rows: Tensor) -> Outcome:
        """Attack these rows, and classify the adversarial examples."""
        if len(rows) == 0:
            return Outcome()
        x, y, device = self.x, self.y, self.x.device
        chosen = slice(None) if len(rows) == len(x) else rows.to(device)
        replayed = isinstance(attack, Captured) and device.type in RECORDERS
        target = self.model.for_attacks
        if not replayed:  # a graph has a fixed shape, so it gets the full batch
            x, y, chosen = x[chosen], y[chosen], slice(None)
        elif self.model.logits is None:  # the caller's model, whose graphs outlive this evaluation
            target = self.model.model
        self.model.examples = 0
        started = time.perf_counter()
        notes: list[str] = []
        with seeded(device, self.seed, self.number, name):
            with _collected_warnings(notes):
                x_adv = perturb(f"attack {name!r}", attack, target, x, y)
            passes = None if replayed else self.model.examples
            x, y, x_adv = x[chosen], y[chosen], x_adv[chosen]
            fooled, prediction, loss, nan = _verdict(self.model.for_attacks, x_adv, y)
        outside = _outside(unwrap(attack), x, x_adv)
        return Outcome(
            index=rows.tolist(),
            fooled=[f and not o for f, o in zip(fooled, outside, strict=True)],
            prediction=prediction,
            loss=loss,
            nan=nan,
            seconds=time.perf_counter() - started,
            passes=passes,
            outside=sum(outside),
            notes=notes,
        )


@contextmanager
def _collected_warnings(notes: list[str]) -> Iterator[None]:
    """Collect the texts of UserWarnings; warnings of other kinds are shown afterwards."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for w in caught:
        if issubclass(w.category, UserWarning):
            notes.append(str(w.message))
        else:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


def _verdict(model: Model, x: Tensor, y: Tensor) -> tuple[list[bool], list[int], list[float], int]:
    """Errors, predictions and cross-entropies of the examples, and how many have NaN logits.

    An example whose logits hold NaN counts as wrong.
    """
    logits = ModelOracle(model, x, y).logits(x)
    check_classes(y, logits.shape[1])
    nan = logits.isnan().any(1)
    prediction = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(1)
    wrong = (prediction != y) | nan
    loss = ce(logits, y).double()
    return wrong.tolist(), prediction.tolist(), loss.tolist(), int(nan.sum())


def _outside(attack: object, x: Tensor, x_adv: Tensor) -> list[bool]:
    """Which examples are not finite, or outside the attack's box or ball by more than rounding."""
    n = len(x)
    outside = ~x_adv.isfinite().reshape(n, -1).all(1)
    if isinstance(attack, Attack):
        lo, hi = limits(x.dtype, attack.clip)
        outside |= ((x_adv < lo) | (x_adv > hi)).reshape(n, -1).any(1)
        eps, norm = getattr(attack, "eps", None), getattr(attack, "norm", None)
        if isinstance(eps, float) and norm in BALLS:
            p = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}[str(norm)]
            difference = (x_adv.double() - x.double()).reshape(n, -1)
            # The rounding errors of float32 images and of sums over thousands of values.
            slack = max(1e-6, 4 * torch.finfo(x.dtype).eps) + 1e-4 * eps
            outside |= torch.linalg.vector_norm(difference, p, dim=1) > eps + slack
    return list(outside.tolist())
