"""Results of an evaluation as tables: the paper's row, every attack's figures, every example."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from awp_optim.evaluation import Evaluation
from awp_optim.lab.reports.summary import markdown

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

ORDER = ("fgsm", "pgd20", "pgd100", "cw", "spsa", "autoattack")
"""The columns of the paper's Table 2, after Natural."""
TITLES = {"fgsm": "FGSM", "spsa": "SPSA", "autoattack": "AA", "apgd": "APGD-CE"}
TITLES |= {"apgd-dlr": "APGD-DLR", "apgd-t": "APGD-T", "square": "Square"}
TITLES |= {"natural": "Natural", "worst_case": "worst case"}


def title(name: str, norm: str = "linf") -> str:
    """What a column is called: "PGD-20", "CW_inf", "AA".

    >>> title("pgd20"), title("cw"), title("cw", "l2"), title("autoattack/fab-t")
    ('PGD-20', 'CW_inf', 'CW_2', 'AA/fab-t')
    """
    name, _, part = name.partition("/")
    if name.startswith("pgd") and name[3:].isdigit():
        text = f"PGD-{name[3:]}"
    elif name == "cw":
        text = {"linf": "CW_inf", "l2": "CW_2"}.get(norm, "CW")
    else:
        text = TITLES.get(name, name.replace("autoattack", "AA"))
    return f"{text}/{part}" if part else text


def radius(eps: float) -> str:
    """An eps as people write it: in 255ths, unless it is short in decimals.

    >>> radius(8 / 255), radius(0.1), radius(0.0123456)
    ('8/255', '0.1', '0.01235')
    """
    levels = 255 * eps
    short = f"{eps:.4g}"
    whole = round(levels) > 0 and abs(levels - round(levels)) < 1e-9
    return f"{round(levels)}/255" if whole and float(short) != eps else short


def _columns(r: Evaluation) -> list[str]:
    """Accuracies in the paper's order, then other attacks, then the worst case."""
    paper = [name for name in ORDER if name in r.robust]
    others = [name for name in r.robust if name not in paper]
    # One after the other, an accuracy is that under all attacks before, too.
    attacks = list(r.robust) if r.skip_broken else paper + others
    return ["natural", *attacks, *(["worst_case"] if len(attacks) > 1 else [])]


def _accuracy(r: Evaluation, name: str) -> float:
    return {"natural": r.natural, "worst_case": r.worst_case, **r.robust}[name]


def as_markdown(r: Evaluation, name: str = "", norm: str = "linf") -> str:
    """Accuracies in %, as a row of the paper's Table 2, and their 95% intervals in a second row.

    Args:
        r: the evaluation.
        name: of the model, in the first column.
        norm: of its attacks, for the columns' names.
    """
    columns = _columns(r)
    intervals = [r.interval(column) for column in columns]
    return markdown(
        [
            ["", *(title(column, norm) for column in columns)],
            [name or "accuracy", *(f"{100 * _accuracy(r, column):.2f}" for column in columns)],
            [f"95%, n = {r.n}", *(f"{100 * lo:.1f} to {100 * hi:.1f}" for lo, hi in intervals)],
        ]
    )


def per_attack(r: Evaluation, norm: str = "linf") -> list[list[str]]:
    """A row for each attack and part: accuracy, images it broke first, seconds, passes an image."""
    first = Counter(r.broken_by.tolist())
    cells = [
        ["attack", "accuracy", "95% interval", "broken first", "seconds", "forward passes an image"]
    ]
    for name in ("natural", *r.records, "worst_case"):
        known = name in r.robust or name in ("natural", "worst_case")
        accuracy = f"{_accuracy(r, name):.2%}" if known else ""
        interval = " to ".join(f"{100 * end:.1f}" for end in r.interval(name)) if known else ""
        parent, _, part = name.partition("/")
        if part and sum(other.startswith(f"{parent}/") for other in r.records) == 1:
            continue  # the row of the attack says the same
        record = r.records.get(name)
        parts = [n for key, n in first.items() if key == name or key.startswith(f"{name}/")]
        cells.append(
            [
                title(name, norm),
                accuracy,
                interval,
                "" if name == "worst_case" else str(sum(parts)),
                "" if record is None else f"{record.seconds:.1f}",
                "" if record is None or record.passes is None else f"{record.passes:.1f}",
            ]
        )
    return cells


def findings(r: Evaluation) -> str:
    """What makes the accuracies doubtful, a bullet each; "" if nothing was found."""
    return "\n".join(f"- {finding.check}: {finding.message}" for finding in r.warnings)


def as_report(r: Evaluation, about: str, name: str = "", norm: str = "linf") -> str:
    """All of it in Markdown: the paper's row, a row for each attack, and the warnings.

    Args:
        r: the evaluation.
        about: a line above the tables: what was evaluated, and how.
        name: of the model, in the first column.
        norm: of its attacks, for the columns' names.
    """
    parts = [about, as_markdown(r, name, norm), markdown(per_attack(r, norm))]
    if r.warnings:
        parts += ["Warnings, which make these figures doubtful:", findings(r)]
    return "\n\n".join(parts) + "\n"


def as_json(r: Evaluation, about: Mapping[str, Any]) -> str:
    """Everything but the examples' records."""
    return json.dumps({**about, **r.to_dict()}, indent=2) + "\n"


def as_csv(r: Evaluation) -> str:
    """A line for each accuracy."""
    names = ["natural", *r.robust, "worst_case"]
    rows = [
        [name, r.n, f"{_accuracy(r, name):.6f}", *(f"{end:.6f}" for end in r.interval(name))]
        for name in names
    ]
    return _csv([["attack", "n", "accuracy", "low", "high"], *rows])


def per_example(r: Evaluation) -> str:
    """A line for each example: what broke it first, and its loss under each attack."""
    head = ["index", "label", "prediction", "broken_by", *(f"loss_{name}" for name in r.records)]
    columns = [record.loss for record in r.records.values()]
    rows = [
        [i, int(r.labels[i]), int(r.predictions[i]), str(r.broken_by[i])]
        + ["" if c[i] != c[i] else f"{c[i]:.6g}" for c in columns]
        for i in range(r.n)
    ]
    return _csv([head, *rows])


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
