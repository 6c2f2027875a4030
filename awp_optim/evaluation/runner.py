"""Robust accuracy of any classifier under any list of attacks.

    r = evaluate(model, loader, {"fgsm": FGSM(), "pgd20": PGD(steps=20), "aa": AutoAttack()})
    r.natural, r.robust["pgd20"], r.worst_case, r.interval("aa"), r.broken_by, r.warnings

Attacks run on the images that the model gets right: an image that is misclassified without any
perturbation is broken under every attack.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from awp_optim._utils.attacking import check_attack
from awp_optim._utils.batches import NO_DATA, Data, batches, count_batches, device_of, to_device
from awp_optim._utils.checks import describe
from awp_optim._utils.identity import identify
from awp_optim._utils.optional import require_numpy
from awp_optim._utils.progress import progress_bar
from awp_optim.attacks.base import in_mode
from awp_optim.attacks.captured import unwrap
from awp_optim.evaluation.batch import AttackedBatch, ObservedModel
from awp_optim.evaluation.diagnostics import compare, mode_findings, probe, remarks
from awp_optim.evaluation.journal import EvaluationJournal
from awp_optim.evaluation.results import (
    NATURAL,
    Evaluation,
    EvaluationWarning,
    attack_of,
    summarize,
)

__all__ = ["evaluate"]


def evaluate(
    model: Callable[[Tensor], Any],
    data: Data,
    attacks: Mapping[str, Callable[..., Tensor]],
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    logits: Callable[[Any], Tensor] | None = None,
    progress: bool = True,
    skip_broken: bool = False,
    seed: int | None = 0,
    state: str | os.PathLike[str] | None = None,
    key: str | None = None,
    checks: bool = True,
) -> Evaluation:
    """Measure the accuracy without an attack, under each attack, and under the worst of them.

    One batch is in memory at a time. Every attack on every batch has its own seed, so that results
    do not depend on the other attacks, and a resumed evaluation gives the same result as one that
    was never interrupted. torch's generators are restored.

    Args:
        model: maps inputs to logits (N, C); normalization is one of its layers. A module is put in
            eval mode for the evaluation, and restored.
        data: batches (x, y), as a DataLoader gives them; one pair (x, y); or a torch Dataset of
            examples. x: floating point, shape (N, ...), in the range that the attacks' ``clip``
            names; y: class indices from 0, shape (N,). Both are tensors or numpy arrays.
        attacks: by name, in the order in which they run. Attacks of this package, or any function
            ``(model, x, y) -> x_adv``. What an attack of this package returns counts only inside
            its ball and its box.
        batch_size: cut the data into batches of this size; None takes batches as they come, and a
            pair or a Dataset 128 at a time.
        device: where to compute; the model must be there. None: where its first parameter is.
        logits: picks the logits out of what the model returns, such as ``lambda out: out.logits``;
            None if it returns them.
        progress: show a progress bar on a terminal, if rich is installed.
        skip_broken: spare an attack the examples that an earlier one broke. The worst case is known
            sooner, and is the same except for chance: a random start depends on what else is in
            the batch. ``robust`` then falls from attack to attack.
        seed: of all attacks; None leaves torch's generators alone, and results to chance.
        state: a file that keeps every attack's outcome on every batch. The same call resumes an
            evaluation that was interrupted.
        key: a name of your own for everything that ``state`` cannot identify by itself: functions,
            as models, attacks or ``logits``, and attacks of your own that are no dataclasses of
            plain settings. Choose another key whenever their code changes.
        checks: look for signs that the result is too good to be true
            (:mod:`awp_optim.evaluation.diagnostics`), for about 60 passes over the first 64 images.
            Each is also issued as an :class:`EvaluationWarning`.

    Raises:
        TypeError: data, labels or attacks are of another type.
        ValueError: there is no data; shapes do not fit; a label is not among the model's classes;
            an attack's name is taken; ``state`` is of another evaluation, model or data, or needs a
            ``key``.
        OSError: ``state`` cannot be read or written.
        ImportError: numpy is not installed.

    >>> import torch
    >>> from awp_optim.attacks import FGSM
    >>> x, y = torch.tensor([[0.5, 0.3], [0.5, 0.45], [0.2, 0.6]]), torch.tensor([0, 0, 0])
    >>> r = evaluate(lambda x: x, (x, y), {"fgsm": FGSM(eps=0.05)}, checks=False)
    >>> round(r.natural, 3), round(r.robust["fgsm"], 3), r.broken_by.tolist()
    (0.667, 0.333, ['', 'fgsm', 'natural'])
    """
    require_numpy("evaluate")
    parts = _split(attacks)
    observed = ObservedModel(model, logits)
    device = device_of(model, device)
    settings: dict[str, Any] = {"skip_broken": skip_broken, "seed": seed}
    if state is not None:
        settings |= _identities(model, logits, parts, key)
    journal = EvaluationJournal(state, settings)
    findings = mode_findings(model)
    labels: list[list[int]] = []
    total = count_batches(data, batch_size)
    bar = progress_bar("evaluating", total and total * max(1, len(parts)), show=progress)
    with in_mode(model, "eval"), bar as advance, journal:
        tally = _Tally(advance)
        for number, (x, y) in enumerate(batches(data, batch_size)):
            outcomes = journal.next_batch(x, y)
            batch = AttackedBatch(number, *to_device(x, y, device), observed, seed)
            labels.append(batch.y.tolist())
            if NATURAL not in outcomes:
                journal.note(NATURAL, batch.classify())
            if checks and number == 0:
                findings += probe(observed.for_attacks, batch.x, batch.y, _box(parts))
            _attack(batch, parts, journal, tally, skip_broken=skip_broken)
    if not labels:
        raise ValueError(NO_DATA)
    result = summarize(labels, journal.batches, parts, skip_broken=skip_broken)
    if checks:
        findings += [*compare(parts, result.records), *remarks(journal.batches)]
    result = dataclasses.replace(result, warnings=tuple(dict.fromkeys(findings)))
    for finding in result.warnings:
        warnings.warn(f"{finding.check}: {finding.message}", EvaluationWarning, stacklevel=2)
    return result


_Parts = dict[str, Callable[..., Tensor]]
"""Attacks by name; one that consists of parts is replaced by these, as "NAME/PART"."""


def _split(attacks: Mapping[str, Callable[..., Tensor]]) -> _Parts:
    if not isinstance(attacks, Mapping):
        raise TypeError(f"attacks must be a dict from names to attacks, got {describe(attacks)}")
    parts: _Parts = {}
    for name, attack in attacks.items():
        if not isinstance(name, str):
            raise TypeError(f"an attack's name must be a str, got {describe(name)}")
        if name in (NATURAL, "worst_case", "") or "/" in name:
            raise ValueError(f"an attack cannot be called {name!r}: choose another name")
        check_attack(f"attack {name!r}", attack)
        if hasattr(attack, "parts"):
            parts |= {f"{name}/{part}": function for part, function in attack.parts().items()}
        else:
            parts[name] = attack
    return parts


def _box(parts: _Parts) -> tuple[float, float]:
    """The box of valid inputs, as the first attack that has one names it."""
    clips = (getattr(unwrap(attack), "clip", None) for attack in parts.values())
    return next((clip for clip in clips if clip is not None), (0.0, 1.0))


def _identities(model: object, logits: object, parts: _Parts, key: str | None) -> dict[str, Any]:
    """The model and the attacks, for the journal's settings."""
    return {
        "model": identify("the model", model, key),
        "logits": None if logits is None else identify("logits", logits, key),
        "attacks": {k: identify(f"attack {k!r}", unwrap(a), key) for k, a in parts.items()},
        "key": key,
    }


class _Tally:
    """How many examples stand after each attack so far, shown on the progress bar."""

    def __init__(self, advance: Callable[[str], None]) -> None:
        self._advance = advance
        self._stood: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()

    def add(self, name: str, standing: Tensor) -> None:
        self._stood[name] += int(standing.sum())
        self._seen[name] += len(standing)
        self._advance(f"{name}: {self._stood[name]} of {self._seen[name]} stand")


def _attack(
    batch: AttackedBatch,
    parts: _Parts,
    journal: EvaluationJournal,
    tally: _Tally,
    *,
    skip_broken: bool,
) -> None:
    """Run each attack on the examples of a batch that are still classified right.

    That is after the attack's own earlier parts; with ``skip_broken`` after all before it.
    """
    outcomes = journal.batches[-1]
    n = len(batch.y)
    right = ~outcomes[NATURAL].fooled_rows(n)
    standing: defaultdict[str, Tensor] = defaultdict(right.clone)
    for name, attack in parts.items():
        still = standing["" if skip_broken else attack_of(name)]
        if name not in outcomes:
            journal.note(name, batch.attack(name, attack, still.nonzero().flatten()))
        still &= ~outcomes[name].fooled_rows(n)
        tally.add(name, still)
