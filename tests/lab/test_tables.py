"""Tables of an evaluation against its own figures."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch

from awp_optim.attacks import FGSM, PGD
from awp_optim.evaluation import evaluate
from awp_optim.lab.tables import as_csv, as_json, as_markdown, per_attack, per_example, title


def evaluation(**settings):
    """100 points on a line: 10 on the wrong side, and one each 0.01 further on the right one."""
    x = torch.cat([torch.full((10,), 0.4), 0.5 + 0.005 + torch.arange(90) * 0.005]).unsqueeze(1)
    attacks = {
        "own": PGD(0.3001, 0.05, 10),
        "pgd100": PGD(0.2001, 0.05, 100),
        "fgsm": FGSM(0.1001),
    }
    return evaluate(
        lambda z: torch.cat([0.5 - z, z - 0.5], 1),
        (x, torch.ones(100).long()),
        attacks,
        checks=False,
        **settings,
    )


def rows(text):
    return list(csv.reader(io.StringIO(text)))


def test_the_columns_are_in_the_papers_order():
    head, _, accuracies, intervals = as_markdown(evaluation(), "mine").splitlines()
    assert head == "|  | Natural | FGSM | PGD-100 | own | worst case |"
    # A margin of 0.005 k falls to eps = 0.1001 for k up to 20, and so on.
    assert accuracies == "| mine | 90.00 | 70.00 | 50.00 | 30.00 | 30.00 |"
    assert intervals.startswith("| 95%, n = 100 | 82.6 to 94.5 |")


def test_one_after_the_other_they_are_in_the_order_run():
    head, _, accuracies, _ = as_markdown(evaluation(skip_broken=True)).splitlines()
    assert head == "|  | Natural | own | PGD-100 | FGSM | worst case |"
    assert accuracies == "| accuracy | 90.00 | 30.00 | 30.00 | 30.00 | 30.00 |"


@pytest.mark.parametrize(
    ("name", "norm", "expected"),
    [
        ("pgd7", "linf", "PGD-7"),
        ("pgdx", "linf", "pgdx"),
        ("cw", "l2", "CW_2"),
        ("autoattack", "linf", "AA"),
        ("autoattack-plus", "linf", "AA-plus"),
        ("autoattack/square", "linf", "AA/square"),
        ("worst_case", "linf", "worst case"),
    ],
)
def test_titles(name, norm, expected):
    assert title(name, norm) == expected


def test_every_attack_has_its_row():
    r = evaluation()
    head, *table = per_attack(r)
    by_name = {row[0]: dict(zip(head, row, strict=True)) for row in table}
    assert list(by_name) == ["Natural", "own", "PGD-100", "FGSM", "worst case"]
    assert [row["broken first"] for row in by_name.values()] == ["10", "60", "0", "0", ""]
    assert by_name["FGSM"]["forward passes an image"] == "1.0"
    assert by_name["own"]["accuracy"] == "30.00%"


def test_files_hold_the_figures():
    r = evaluation()
    head, *lines = rows(as_csv(r))
    assert head == ["attack", "n", "accuracy", "low", "high"]
    assert [(line[0], float(line[2])) for line in lines] == [
        ("natural", 0.9), ("own", 0.3), ("pgd100", 0.5), ("fgsm", 0.7), ("worst_case", 0.3),
    ]  # fmt: skip
    content = json.loads(as_json(r, {"eps": 0.1}))
    assert content["eps"] == 0.1
    assert content["robust"] == r.robust
    head, *lines = rows(per_example(r))
    assert head == [
        "index",
        "label",
        "prediction",
        "broken_by",
        "loss_own",
        "loss_pgd100",
        "loss_fgsm",
    ]
    assert len(lines) == 100
    assert lines[0] == ["0", "1", "0", "natural", "", "", ""]
    assert lines[10][:4] == ["10", "1", "1", "own"]
    assert lines[99][:4] == ["99", "1", "1", ""]
    assert float(lines[99][6]) == pytest.approx(r.records["fgsm"].loss[99], rel=1e-5)
