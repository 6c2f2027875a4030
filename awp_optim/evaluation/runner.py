"""Robust accuracy of any classifier under any attacks.

    r = evaluate(model, loader, {"fgsm": FGSM(), "pgd20": PGD(steps=20), "aa": AutoAttack()})
    r.natural, r.robust["pgd20"], r.worst_case, r.interval("aa"), r.broken_by, r.warnings

Attacks run on correctly classified images: an image that is misclassified without an attack counts
as broken by every attack.
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
from awp_optim._utils.batches import (
    NO_DATA,
    Data,
    batches,
    count_batches,
    device_of,
    seeded,
    to_device,
)
from awp_optim._utils.checks import describe
from awp_optim._utils.identity import identify
from awp_optim._utils.model_state import in_mode
from awp_optim._utils.optional import require_numpy
from awp_optim._utils.progress import progress_bar
from awp_optim.attacks import NFGSM
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

    One batch is in memory at a time. Each attack on each batch has its own seed, so results do not
    depend on the other attacks, and a resumed evaluation gives the same result as an uninterrupted
    one. torch's generators are restored.

    Args:
        model: maps inputs to logits (N, C); normalization is one of its layers. A module is put in
            eval mode, and its mode is restored afterwards.
        data: batches (x, y), as from a DataLoader; one pair (x, y); or a torch Dataset of examples.
            x: floating point, shape (N, ...), in the range of the attacks' ``clip``; y: class
            indices from 0, shape (N,). Both are tensors or numpy arrays.
        attacks: attacks by name, in the order in which they run: attacks of this package, or any
            functions ``(model, x, y) -> x_adv``. For attacks of this package, only adversarial
            examples inside the ball and the box count.
        batch_size: cut the data into batches of this size; None keeps given batches, and cuts a
            pair or a Dataset into batches of 128.
        device: the device to compute on, which must hold the model; None uses the device of its
            first parameter.
        logits: gets the logits from the model's output, such as ``lambda out: out.logits``; None if
            the output is the logits.
        progress: show a progress bar on a terminal, if rich is installed.
        skip_broken: run each attack only on examples that no previous attack has broken. This is
            faster, and gives the same worst case up to random starts, which depend on the other
            examples in the batch. ``robust`` then decreases from attack to attack.
        seed: the seed of all attacks; None uses torch's generators without seeding them.
        state: a file that saves the outcome of every attack on every batch. The same call resumes
            an interrupted evaluation; with more attacks after the same ones, it runs those alone.
        key: a name for everything that ``state`` cannot identify by itself: functions used as
            model, attacks or ``logits``, and custom attacks that are not dataclasses of plain
            settings. Choose another key whenever their code changes.
        checks: look for signs that the result is too good to be true
            (:mod:`awp_optim.evaluation.diagnostics`), with about 60 passes over the first 64
            images. Each finding is also issued as an :class:`EvaluationWarning`.

    Raises:
        TypeError: data, labels or attacks are of the wrong type.
        ValueError: there is no data; shapes do not match; a label is not among the model's classes;
            an attack's name is reserved; ``state`` belongs to another evaluation, model or data, or
            needs a ``key``.
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
                with seeded(batch.x.device, seed, number, "checks"):
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
"""Attacks by name; an attack that has parts is replaced by them, as "NAME/PART"."""


def _split(attacks: Mapping[str, Callable[..., Tensor]]) -> _Parts:
    if not isinstance(attacks, Mapping):
        raise TypeError(f"attacks must be a dict from names to attacks, got {describe(attacks)}")
    parts: _Parts = {}
    for name, attack in attacks.items():
        if not isinstance(name, str):
            raise TypeError(f"an attack's name must be a str, got {describe(name)}")
        if name in (NATURAL, "worst_case", "") or "/" in name:
            raise ValueError(f"an attack cannot be named {name!r}: choose another name")
        check_attack(f"attack {name!r}", attack)
        if isinstance(unwrap(attack), NFGSM):
            raise ValueError(f"attack {name!r}, N-FGSM, leaves its ball: evaluate with PGD")
        if hasattr(attack, "parts"):
            parts |= {f"{name}/{part}": function for part, function in attack.parts().items()}
        else:
            parts[name] = attack
    return parts


def _box(parts: _Parts) -> tuple[float, float]:
    """The box of valid inputs, from the first attack that has one."""
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
    """How many examples each attack has left unbroken so far, shown on the progress bar."""

    def __init__(self, advance: Callable[[str], None]) -> None:
        self._advance = advance
        self._robust: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()

    def add(self, name: str, unbroken: Tensor) -> None:
        self._robust[name] += int(unbroken.sum())
        self._seen[name] += len(unbroken)
        self._advance(f"{name}: {self._robust[name]} of {self._seen[name]} robust")


def _attack(
    batch: AttackedBatch,
    parts: _Parts,
    journal: EvaluationJournal,
    tally: _Tally,
    *,
    skip_broken: bool,
) -> None:
    """Run each attack on the examples of a batch that are still classified correctly.

    Examples broken by previous parts of the attack (by all previous ones with ``skip_broken``) are
    left out.
    """
    outcomes = journal.batches[-1]
    n = len(batch.y)
    right = ~outcomes[NATURAL].fooled_rows(n)
    remaining: defaultdict[str, Tensor] = defaultdict(right.clone)
    for name, attack in parts.items():
        unbroken = remaining["" if skip_broken else attack_of(name)]
        if name not in outcomes:
            journal.note(name, batch.attack(name, attack, unbroken.nonzero().flatten()))
        unbroken &= ~outcomes[name].fooled_rows(n)
        tally.add(name, unbroken)
