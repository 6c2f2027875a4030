"""Robust accuracy of any classifier under any list of attacks.

    r = evaluate(model, loader, {"fgsm": FGSM(), "pgd20": PGD(steps=20), "aa": AutoAttack()})
    r.natural, r.robust["pgd20"], r.worst_case, r.interval("aa"), r.broken_by, r.warnings

An attack is run on the images that the model gets right as they are: an image that is misclassified
without any perturbation is broken under every attack.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from awp_optim._cuda_graphs.graphs import RECORDERS
from awp_optim._utils.batches import NO_DATA, batches, count, device_of, seeded
from awp_optim._utils.checks import check_int, describe
from awp_optim._utils.journal import EvaluationJournal, checksum
from awp_optim._utils.progress import progress_bar
from awp_optim.attacks import Attack, Captured
from awp_optim.attacks.balls import BALLS, limits
from awp_optim.attacks.base import Model, ModelOracle, in_mode
from awp_optim.attacks.captured import attack_id, unwrap
from awp_optim.attacks.losses import ce
from awp_optim.evaluation.diagnostics import Finding, compare, probe

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Evaluation", "EvaluationWarning", "Finding", "Record", "evaluate"]

NATURAL = "natural"
PROBED = 64
"""Images of the first batch that the checks look at."""


class EvaluationWarning(UserWarning):
    """A robust accuracy is doubtful; the text says why and what to do."""


@dataclass(frozen=True)
class Record:
    """What one attack did to each example; arrays of length n, in the order of the data.

    Attributes:
        attacked: bool, whether the attack was run on it.
        fooled: bool, whether that broke it.
        prediction: int64, the class that the model says after the attack; -1 where not attacked.
        loss: float64, the cross-entropy there; NaN where not attacked.
        seconds: the time it took, the look at its result included.
        passes: forward passes an attacked example (about as many backward passes go with them if
            the attack uses gradients); None if graphs were replayed, which nobody can count.
    """

    attacked: np.ndarray[Any, Any]
    fooled: np.ndarray[Any, Any]
    prediction: np.ndarray[Any, Any]
    loss: np.ndarray[Any, Any]
    seconds: float
    passes: float | None


@dataclass(frozen=True)
class Evaluation:
    """Accuracies under attacks; all are shares of all ``n`` examples, in [0, 1].

    Attributes:
        n: how many examples there are.
        natural: accuracy on them as they are.
        robust: accuracy under each attack, by name, in the order given; with ``skip_broken`` under
            it and all before it.
        worst_case: share of examples that stood everything.
        broken_by: array of str, what broke each example first: "natural", an attack's name,
            "NAME/PART" if that attack has parts, or "" if it stood everything.
        labels, predictions: int64, the true class and the model's of each example as it is.
        records: a :class:`Record` for each attack, by name, and for each part, as "NAME/PART".
        warnings: what makes these numbers doubtful; empty if nothing was found.
        skip_broken: whether attacks were spared the examples broken before.
    """

    n: int
    natural: float
    robust: dict[str, float]
    worst_case: float
    broken_by: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any] = field(repr=False)
    predictions: np.ndarray[Any, Any] = field(repr=False)
    records: dict[str, Record] = field(repr=False)
    warnings: tuple[Finding, ...]
    skip_broken: bool

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """The Wilson score interval of an accuracy: what n examples say of all there could be.

        Args:
            name: "natural", "worst_case" or an attack's.
            level: of confidence, between 0 and 1.

        Raises:
            KeyError: there is no such accuracy.
            ValueError: ``level`` is not between 0 and 1.

        >>> import torch
        >>> model = lambda x: torch.stack([x, -x], 1)
        >>> r = evaluate(model, (torch.ones(100), torch.zeros(100).long()), {}, checks=False)
        >>> lo, hi = r.interval("natural")
        >>> round(lo, 4), hi
        (0.963, 1.0)
        """
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level!r}")
        accuracies = {NATURAL: self.natural, "worst_case": self.worst_case, **self.robust}
        if name not in accuracies:
            raise KeyError(f"there is no accuracy {name!r}, only {', '.join(accuracies)}")
        return wilson(accuracies[name], self.n, level)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the examples' records, for ``json.dump``."""
        import numpy as np

        names = [NATURAL, *self.robust, "worst_case"]
        first, counts = np.unique(self.broken_by, return_counts=True)
        return {
            "n": self.n,
            "natural": self.natural,
            "robust": dict(self.robust),
            "worst_case": self.worst_case,
            "intervals": {name: list(self.interval(name)) for name in names},
            "broken_first_by": {
                str(name): int(count)
                for name, count in zip(first, counts, strict=True)
                if name != ""
            },
            "seconds": {name: record.seconds for name, record in self.records.items()},
            "passes": {name: record.passes for name, record in self.records.items()},
            "skip_broken": self.skip_broken,
            "warnings": [{"check": f.check, "message": f.message} for f in self.warnings],
        }


def wilson(share: float, n: int, level: float) -> tuple[float, float]:
    """The score interval of a binomial share (Wilson, 1927), which is right near 0 and 1, too."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (
        0.0 if share == 0 else max(0.0, centre - half),
        1.0 if share == 1 else min(1.0, centre + half),
    )


def evaluate(
    model: Model,
    data: Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor],
    attacks: Mapping[str, Callable[..., Tensor]],
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    skip_broken: bool = False,
    seed: int | None = 0,
    state: str | os.PathLike[str] | None = None,
    checks: bool = True,
) -> Evaluation:
    """Measure accuracy as it is, under each attack, and under the worst of them an example.

    One batch is in memory at a time. Every attack on every batch starts from a seed of its own, so
    that results do not depend on the other attacks, and an evaluation that was interrupted gives
    what it would have given; torch's generators are left as they were.

    Args:
        model: maps inputs to logits (N, C); normalisation is one of its layers. A module is put in
            eval mode for the evaluation and left as it was.
        data: batches (x, y), as a DataLoader gives them; or one pair of tensors. x: floating
            point, shape (N, ...), in the range that the attacks' ``clip`` names; y: class indices,
            shape (N,).
        attacks: by name, in the order in which they run. Attacks of this package, or any function
            ``(model, x, y) -> x_adv``. What an attack of this package returns counts only inside
            its ball and its box.
        batch_size: cut the data to batches of this size; None takes batches as they come, and a
            pair of tensors 128 at a time.
        device: where the model is, and batches are moved to; None: where its first parameter is.
        progress: show a bar on a terminal, if rich is installed.
        skip_broken: spare an attack the examples that were broken before. The worst case is sooner
            known, and the same but for chance: a random start depends on what else is in the
            batch. ``robust`` then falls from attack to attack.
        seed: of all attacks; None leaves torch's generators alone, and results to chance.
        state: a file that holds what is done after each attack on each batch. Called again with
            the same, an evaluation goes on from there.
        checks: look for signs that the result is too good to be true
            (:mod:`awp_optim.evaluation.diagnostics`), at a cost of about 60 passes over the first 64 images; each is also issued as an
            :class:`EvaluationWarning`.

    Raises:
        TypeError: data, labels or attacks are of another type.
        ValueError: there is no data; shapes do not fit; an attack's name is taken; ``state`` is of
            another evaluation, model or data.
        OSError: ``state`` cannot be read or written.

    >>> import torch
    >>> from awp_optim.attacks import FGSM
    >>> x, y = torch.tensor([[0.5, 0.3], [0.5, 0.45], [0.2, 0.6]]), torch.tensor([0, 0, 0])
    >>> r = evaluate(lambda x: x, (x, y), {"fgsm": FGSM(eps=0.05)}, checks=False)
    >>> round(r.natural, 3), round(r.robust["fgsm"], 3), r.broken_by.tolist()
    (0.667, 0.333, ['', 'fgsm', 'natural'])
    """
    contestants = _contestants(attacks)
    if batch_size is not None:
        check_int("batch_size", batch_size, least=1)
    device = device_of(model, device)
    found: list[Finding] = []
    if isinstance(model, nn.Module) and model.training:
        found.append(
            Finding(
                "train_mode",
                "the model was in train mode, in which BatchNorm and dropout make accuracies "
                "depend on the batch: it was evaluated in eval mode. Call model.eval() before",
            )
        )
    counted = _counted(model)
    journal = EvaluationJournal(state, _settings(model, contestants, skip_broken, seed))
    total = count(data, batch_size)
    stood: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    steps = None if total is None else total * max(1, len(contestants))
    with in_mode(model, "eval"), progress_bar(progress, "evaluating", steps) as advance, journal:

        def report(name: str, stand: int, n: int) -> None:
            stood[name] += stand
            seen[name] += n
            advance(f"{name}: {stood[name]} of {seen[name]} stand")

        for i, (x, y) in enumerate(batches(data, batch_size)):
            journal.open_batch(i, x, y)
            here = device or x.device
            x, y = x.to(here, non_blocking=True), y.to(here, torch.int64, non_blocking=True)
            if checks and i == 0:
                found += probe(model, x[:PROBED], y[:PROBED], _box(contestants))
            _evaluate_batch(counted, i, x, y, contestants, journal, skip_broken, seed, report)
    if not journal.batches:
        raise ValueError(NO_DATA)
    result = _result(journal, contestants, skip_broken, found, checks)
    for finding in result.warnings:
        warnings.warn(f"{finding.check}: {finding.message}", EvaluationWarning, stacklevel=2)
    return result


@dataclass(frozen=True)
class _Contestant:
    """An attack, or one part of an attack that has several."""

    name: str
    parent: str
    attack: Callable[..., Tensor]


def _contestants(attacks: Mapping[str, Callable[..., Tensor]]) -> list[_Contestant]:
    if not isinstance(attacks, Mapping):
        raise TypeError(f"attacks must be a dict from names to attacks, got {describe(attacks)}")
    contestants = []
    for name, attack in attacks.items():
        if not isinstance(name, str):
            raise TypeError(f"an attack's name must be a str, got {describe(name)}")
        if name in (NATURAL, "worst_case", "") or "/" in name:
            raise ValueError(f"an attack cannot be called {name!r}: choose another name")
        if not callable(attack):
            raise TypeError(f"attack {name!r} must be callable, got {describe(attack)}")
        parts = attack.parts() if hasattr(attack, "parts") else None
        if parts is None:
            contestants.append(_Contestant(name, name, attack))
        else:
            contestants += [_Contestant(f"{name}/{k}", name, part) for k, part in parts.items()]
    return contestants


def _box(contestants: list[_Contestant]) -> tuple[float, float]:
    clips = (getattr(unwrap(c.attack), "clip", None) for c in contestants)
    return next((clip for clip in clips if clip is not None), (0.0, 1.0))


def _evaluate_batch(
    model: _Counted,
    i: int,
    x: Tensor,
    y: Tensor,
    contestants: list[_Contestant],
    journal: EvaluationJournal,
    skip_broken: bool,
    seed: int | None,
    report: Callable[[str, int, int], None],
) -> None:
    entries = journal.batches[i]
    if NATURAL not in entries:
        prediction, loss, wrong, nans = _judge(model.model, x, y)
        journal.add(
            i,
            NATURAL,
            {"labels": y.tolist(), "prediction": prediction, "loss": loss, "fooled": wrong}
            | ({"nan": nans} if nans else {}),
        )
    right = ~torch.tensor(entries[NATURAL]["fooled"])
    broken: dict[str, Tensor] = {}  # by each attack so far
    anything = torch.zeros_like(right)
    for c in contestants:
        before = broken.setdefault(c.parent, torch.zeros_like(right))
        if c.name not in entries:
            which = right & ~(anything if skip_broken else before)
            entry = _attack(model, i, x, y, which.nonzero().flatten(), c, seed)
            journal.add(i, c.name, entry)
        entry = entries[c.name]
        fooled = torch.zeros_like(right)
        fooled[torch.tensor(entry["index"], dtype=torch.int64)] = torch.tensor(
            entry["fooled"], dtype=torch.bool
        )
        before |= fooled
        anything |= fooled
        standing = right & ~(anything if skip_broken else before)
        report(c.name, int(standing.sum()), len(right))


def _attack(
    model: _Counted, i: int, x: Tensor, y: Tensor, index: Tensor, c: _Contestant, seed: int | None
) -> dict[str, Any]:
    """Run one attack on the examples of a batch that ``index`` names."""
    if len(index) == 0:
        return {"index": [], "fooled": [], "prediction": [], "loss": [], "seconds": 0.0}
    replayed = isinstance(c.attack, Captured) and x.device.type in RECORDERS
    chosen = slice(None) if len(index) == len(x) else index.to(x.device)
    if not replayed:
        x, y, chosen = x[chosen], y[chosen], slice(None)
    # Else the whole batch: a graph is of one shape, and how many are left changes.
    model.passes = 0
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught, seeded(x.device, seed, i, c.name):
        warnings.simplefilter("always")
        x_adv = c.attack(model.face, x, y)
    notes = []
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    passes = model.passes
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
        raise TypeError(
            f"attack {c.name!r} must return a tensor of shape {tuple(x.shape)}, got "
            f"{describe(x_adv)}"
        )
    x, y, x_adv = x[chosen], y[chosen], x_adv[chosen]
    outside = _outside(c.attack, x, x_adv)
    prediction, loss, fooled, nans = _judge(model.model, x_adv, y)
    entry: dict[str, Any] = {
        "index": index.tolist(),
        "fooled": [f and not o for f, o in zip(fooled, outside, strict=True)],
        "prediction": prediction,
        "loss": loss,
        "seconds": time.perf_counter() - started,
    }
    if not replayed:
        entry["passes"] = passes
    if any(outside):
        entry["outside"] = sum(outside)
    if nans:
        entry["nan"] = nans
    if notes:
        entry["notes"] = notes
    return entry


def _judge(model: Model, x: Tensor, y: Tensor) -> tuple[list[int], list[float], list[bool], int]:
    """The model's class, the cross-entropy and whether it is wrong, for each example; how many NaN.

    Logits that hold NaN name no class: they are wrong.
    """
    logits = ModelOracle(model, x, y).logits(x.detach())
    odd = logits.isnan().any(1)
    prediction = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(1)
    loss = ce(logits, y).double()
    return prediction.tolist(), loss.tolist(), ((prediction != y) | odd).tolist(), int(odd.sum())


def _outside(attack: object, x: Tensor, x_adv: Tensor) -> list[bool]:
    """Which examples left the attack's ball or box, beyond rounding, or are not finite."""
    inner = unwrap(attack)
    outside = ~x_adv.isfinite().flatten(1).all(1) if x.ndim > 1 else ~x_adv.isfinite()
    if isinstance(inner, Attack):
        lo, hi = limits(x.dtype, inner.clip)
        gone = (x_adv < lo) | (x_adv > hi)
        outside |= gone.flatten(1).any(1) if x.ndim > 1 else gone
        eps, norm = getattr(inner, "eps", None), getattr(inner, "norm", None)
        if isinstance(eps, float) and norm in BALLS:
            p = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}[str(norm)]
            apart = (x_adv.double() - x.double()).reshape(len(x), -1)
            # What float32 images and sums of thousands of values can be off by.
            slack = max(1e-6, 4 * torch.finfo(x.dtype).eps) + 1e-4 * eps
            outside |= torch.linalg.vector_norm(apart, p, dim=1) > eps + slack
    return list(outside.tolist())


class _Counted:
    """A model that counts how many examples it was shown.

    Attributes:
        model: the model itself.
        face: what attacks are given: a module if the model is one.
        passes: examples so far.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.passes = 0
        self.face: Model = self._call

    def _call(self, x: Tensor) -> Tensor:
        self.passes += len(x)
        return self.model(x)


class _Face(nn.Module):
    def __init__(self, counted: _Counted, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._count = counted._call
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        return self._count(x)


def _counted(model: Model) -> _Counted:
    counted = _Counted(model)
    if isinstance(model, nn.Module):
        counted.face = _Face(counted, model)
    elif not callable(model):
        raise TypeError(f"model must be a module or a function of inputs, got {describe(model)}")
    return counted


def _settings(
    model: Model, contestants: list[_Contestant], skip_broken: bool, seed: int | None
) -> dict[str, Any]:
    """What decides the result, but for the data."""
    return {
        "attacks": {c.name: attack_id(c.attack) for c in contestants},
        "skip_broken": skip_broken,
        "seed": seed,
        "model": checksum(model.state_dict().values()) if isinstance(model, nn.Module) else None,
    }


@dataclass(frozen=True)
class _Outcome:
    attacked: Tensor
    fooled: Tensor


def _result(
    journal: EvaluationJournal,
    contestants: list[_Contestant],
    skip_broken: bool,
    found: list[Finding],
    checks: bool,
) -> Evaluation:
    import numpy as np

    natural = [batch[NATURAL] for batch in journal.batches]
    labels = np.concatenate([np.array(e["labels"], dtype=np.int64) for e in natural])
    predictions = np.concatenate([np.array(e["prediction"], dtype=np.int64) for e in natural])
    wrong = np.concatenate([np.array(e["fooled"], dtype=bool) for e in natural])
    n = len(labels)
    records: dict[str, Record] = {}
    broken_by = np.full(n, "", dtype=object)
    broken_by[wrong] = NATURAL
    robust: dict[str, float] = {}
    stood = ~wrong
    for parent in dict.fromkeys(c.parent for c in contestants):
        parts = [c.name for c in contestants if c.parent == parent]
        of_parts = [_record(journal, name) for name in parts]
        for name, record in zip(parts, of_parts, strict=True):
            records[name] = record
            broken_by[record.fooled & (broken_by == "")] = name
        records[parent] = _together(of_parts)
        stood &= ~records[parent].fooled
        robust[parent] = float((stood if skip_broken else ~wrong & ~records[parent].fooled).mean())
    if checks:
        outcomes = {
            c.name: _Outcome(
                torch.from_numpy(records[c.name].attacked), torch.from_numpy(records[c.name].fooled)
            )
            for c in contestants
        }
        found = [*found, *compare({c.name: c.attack for c in contestants}, outcomes)]
        found += _remarks(journal, contestants)
    return Evaluation(
        n=n,
        natural=float((~wrong).mean()),
        robust=robust,
        worst_case=float(stood.mean()),
        broken_by=broken_by.astype(str),
        labels=labels,
        predictions=predictions,
        records=records,
        warnings=tuple(dict.fromkeys(found)),
        skip_broken=skip_broken,
    )


def _record(journal: EvaluationJournal, name: str) -> Record:
    import numpy as np

    n = sum(len(batch[NATURAL]["labels"]) for batch in journal.batches)
    attacked, fooled = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    prediction, loss = np.full(n, -1, dtype=np.int64), np.full(n, np.nan)
    seconds, passes, at = 0.0, 0, 0
    countable = True
    for batch in journal.batches:
        entry = batch[name]
        index = at + np.array(entry["index"], dtype=np.int64)
        attacked[index] = True
        fooled[index] = entry["fooled"]
        prediction[index] = entry["prediction"]
        loss[index] = entry["loss"]
        seconds += entry["seconds"]
        passes += entry.get("passes", 0)
        countable &= "passes" in entry or not len(index)
        at += len(batch[NATURAL]["labels"])
    each = passes / max(1, int(attacked.sum()))
    return Record(attacked, fooled, prediction, loss, seconds, each if countable else None)


def _together(parts: list[Record]) -> Record:
    """The record of an attack that has parts, each run on what the ones before left."""
    if len(parts) == 1:
        return parts[0]
    attacked, fooled = parts[0].attacked.copy(), parts[0].fooled.copy()
    prediction, loss = parts[0].prediction.copy(), parts[0].loss.copy()
    for part in parts[1:]:
        attacked |= part.attacked
        fooled |= part.fooled
        prediction[part.attacked] = part.prediction[part.attacked]
        loss[part.attacked] = part.loss[part.attacked]
    passes = None
    if all(part.passes is not None for part in parts):
        total = sum((part.passes or 0) * int(part.attacked.sum()) for part in parts)
        passes = total / max(1, int(attacked.sum()))
    seconds = sum(part.seconds for part in parts)
    return Record(attacked, fooled, prediction, loss, seconds, passes)


def _remarks(journal: EvaluationJournal, contestants: list[_Contestant]) -> list[Finding]:
    """What attacks said, and what they returned that did not count."""
    found = []
    nans = sum(batch[NATURAL].get("nan", 0) for batch in journal.batches)
    if nans:
        found.append(
            Finding(
                "not_finite",
                f"logits hold NaN for {nans} images as they are, which count as wrong: accuracies "
                "are not those of a working model",
            )
        )
    for c in contestants:
        entries = [batch[c.name] for batch in journal.batches]
        if outside := sum(entry.get("outside", 0) for entry in entries):
            found.append(
                Finding(
                    "outside",
                    f"{c.name} returned {outside} examples outside its ball or box, or not finite: "
                    "they do not count as broken. That is a fault of the attack",
                )
            )
        if nans := sum(entry.get("nan", 0) for entry in entries):
            found.append(
                Finding(
                    "not_finite",
                    f"logits hold NaN for {nans} images under {c.name}, which count as broken: "
                    "look for an overflow in the model",
                )
            )
        for note in dict.fromkeys(note for entry in entries for note in entry.get("notes", ())):
            found.append(Finding(c.name, note))
    return found
