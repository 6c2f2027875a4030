"""The results of an evaluation as tables: as in the paper, by attack, and by example."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from awp_optim.evaluation import Evaluation
from awp_optim.lab.reports.summary import Cells, markdown

__all__ = [
    "as_csv",
    "as_json",
    "as_markdown",
    "as_report",
    "findings",
    "per_attack",
    "per_example",
    "radius",
    "title",
]

PAPER = ("fgsm", "pgd20", "pgd100", "cw", "spsa", "autoattack")
"""The attacks of the paper's Table 2, in the order of its columns."""
TITLES = {
    "natural": "Natural",
    "fgsm": "FGSM",
    "spsa": "SPSA",
    "autoattack": "AA",
    "apgd": "APGD-CE",
    "apgd-dlr": "APGD-DLR",
    "apgd-t": "APGD-T",
    "fab-t": "FAB-T",
    "square": "Square",
    "worst_case": "worst case",
}


def title(name: str, norm: str = "linf") -> str:
    """The heading of an attack's column, as in papers.

    >>> title("pgd20"), title("pgd50x10"), title("cw"), title("cw", "l2")
    ('PGD-20', 'PGD-50x10', 'CW_inf', 'CW_2')
    >>> title("autoattack/fab-t")
    'AA/fab-t'
    """
    name, _, part = name.partition("/")
    if name.startswith("pgd"):
        text = f"PGD-{name[3:]}"
    elif name == "cw":
        text = {"linf": "CW_inf", "l2": "CW_2"}.get(norm, "CW")
    else:
        text = TITLES.get(name, name.replace("autoattack", "AA"))
    return f"{text}/{part}" if part else text


def radius(eps: float) -> str:
    """An eps in 255ths if it is a whole number of them, unless its decimals are short.

    >>> radius(8 / 255), radius(0.1), radius(0.0123456)
    ('8/255', '0.1', '0.01235')
    """
    decimals, levels = f"{eps:.4g}", round(255 * eps)
    is_level = levels > 0 and math.isclose(levels / 255, eps)
    return f"{levels}/255" if is_level and float(decimals) != eps else decimals


def as_markdown(r: Evaluation, name: str = "", norm: str = "linf") -> str:
    """Accuracies in %, a row as in the paper's Table 2, with their 95% intervals below.

    Args:
        r: the evaluation.
        name: of the model, in the first column.
        norm: of its attacks, for the names of the columns.
    """
    columns = {column: 100 * accuracy for column, accuracy in _accuracies(r).items()}
    intervals = [r.interval(column) for column in columns]
    return markdown(
        [
            ["", *(title(column, norm) for column in columns)],
            [name or "accuracy", *(f"{accuracy:.2f}" for accuracy in columns.values())],
            [
                f"95%, n = {r.n}",
                *(f"{100 * low:.1f} to {100 * high:.1f}" for low, high in intervals),
            ],
        ]
    )


def per_attack(r: Evaluation, norm: str = "linf") -> Cells:
    """A row for each attack, and for each part of attacks that have several.

    The columns: its accuracy, how many images it broke first, its time, its price.
    """
    head = ["attack", "accuracy", "95% interval", "broken first", "seconds"]
    parts = Counter(name.partition("/")[0] for name in r.records if "/" in name)
    # The row of a single part would be that of its attack.
    records = [name for name in r.records if "/" not in name or parts[name.partition("/")[0]] > 1]
    names = ["natural", *records, "worst_case"]
    return [[*head, "forward passes an image"], *(_attack_row(r, name, norm) for name in names)]


def findings(r: Evaluation) -> str:
    """The reasons to doubt the accuracies, as a list; "" if nothing was found."""
    return "\n".join(f"- {finding.check}: {finding.message}" for finding in r.warnings)


def as_report(r: Evaluation, about: str, name: str = "", norm: str = "linf") -> str:
    """The tables and the findings in Markdown.

    Args:
        r: the evaluation.
        about: a line above the tables: what was evaluated, and how.
        name: of the model, in the first column.
        norm: of its attacks, for the names of the columns.
    """
    paragraphs = [about, as_markdown(r, name, norm), markdown(per_attack(r, norm))]
    if r.warnings:
        paragraphs += ["Warnings: there are reasons to doubt these accuracies.", findings(r)]
    return "\n\n".join(paragraphs) + "\n"


def as_json(r: Evaluation, about: Mapping[str, Any]) -> str:
    """Everything but the single examples, after what ``about`` says."""
    return json.dumps({**about, **r.to_dict()}, indent=2) + "\n"


def as_csv(r: Evaluation) -> str:
    """A line for each accuracy."""
    rows = [
        [name, r.n, f"{accuracy:.6f}", *(f"{end:.6f}" for end in r.interval(name))]
        for name, accuracy in r.accuracies.items()
    ]
    return _csv([["attack", "n", "accuracy", "low", "high"], *rows])


def per_example(r: Evaluation) -> str:
    """A line for each example: what broke it first, and its loss under each attack."""
    head = ["index", "label", "prediction", "broken_by", *(f"loss_{name}" for name in r.records)]
    losses = [record.loss for record in r.records.values()]
    rows = [
        [i, int(r.labels[i]), int(r.predictions[i]), str(r.broken_by[i])]
        + ["" if loss[i] != loss[i] else f"{loss[i]:.6g}" for loss in losses]  # NaN: not attacked
        for i in range(r.n)
    ]
    return _csv([head, *rows])


def _accuracies(r: Evaluation) -> dict[str, float]:
    """Accuracies by name: the attacks in the paper's order, then others, then the worst case."""
    names = list(r.robust)
    if not r.skip_broken:  # else an accuracy counts the attacks before it, too: keep the order
        names.sort(key=lambda name: PAPER.index(name) if name in PAPER else len(PAPER))
    worst_case = {"worst_case": r.worst_case} if len(names) > 1 else {}
    return {"natural": r.natural, **{name: r.robust[name] for name in names}, **worst_case}


def _attack_row(r: Evaluation, name: str, norm: str) -> list[str]:
    accuracy, interval, broken, seconds, passes = "", "", "", "", ""
    if name in r.accuracies:  # a part has none of its own
        accuracy = f"{r.accuracies[name]:.2%}"
        interval = " to ".join(f"{100 * end:.1f}" for end in r.interval(name))
    if name != "worst_case":
        first = [by for by in r.broken_by if by == name or by.startswith(f"{name}/")]
        broken = str(len(first))
    if (record := r.records.get(name)) is not None:
        seconds = f"{record.seconds:.1f}"
        passes = "" if record.passes is None else f"{record.passes:.1f}"
    return [title(name, norm), accuracy, interval, broken, seconds, passes]


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
