"""Tables of an evaluation against its own results."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
import torch

from awp_optim.attacks import FGSM, PGD
from awp_optim.evaluation import Finding, evaluate
from awp_optim.lab.reports.tables import (
    as_csv,
    as_json,
    as_markdown,
    as_report,
    per_attack,
    per_example,
    radius,
)


def model(x):
    return torch.cat([0.5 - x, x - 0.5], 1)


def evaluation(**settings):
    """100 points on a line: 10 on the wrong side, 90 at margins of 0.005, 0.01 and so on."""
    x = torch.cat([torch.full((10,), 0.4), 0.5 + 0.005 + torch.arange(90) * 0.005]).unsqueeze(1)
    attacks = {
        "own": PGD(0.3001, 0.05, 10),
        "pgd100": PGD(0.2001, 0.05, 100),
        "fgsm": FGSM(0.1001),
    }
    return evaluate(model, (x, torch.ones(100).long()), attacks, checks=False, **settings)


def test_the_columns_are_in_the_papers_order():
    head, _, accuracies, intervals = as_markdown(evaluation(), "mine").splitlines()
    assert head == "|  | Natural | FGSM | PGD-100 | own | worst case |"
    # A margin of 0.005 k falls to eps = 0.1001 for k up to 20, and so on.
    assert accuracies == "| mine | 90.00 | 70.00 | 50.00 | 30.00 | 30.00 |"
    assert intervals.startswith("| 95%, n = 100 | 82.6 to 94.5 |")


def test_attacks_that_skip_what_is_broken_are_in_the_order_run():
    head, _, accuracies, _ = as_markdown(evaluation(skip_broken=True)).splitlines()
    assert head == "|  | Natural | own | PGD-100 | FGSM | worst case |"
    assert accuracies == "| accuracy | 90.00 | 30.00 | 30.00 | 30.00 | 30.00 |"


@pytest.mark.parametrize(
    ("eps", "expected"),
    [(8 / 255, "8/255"), (128 / 255, "128/255"), (0.2, "0.2"), (0.0, "0"), (12.0, "12")],
)
def test_radii(eps, expected):
    assert radius(eps) == expected


def test_every_attack_has_its_row():
    head, *table = per_attack(evaluation())
    by_name = {row[0]: dict(zip(head, row, strict=True)) for row in table}
    assert list(by_name) == ["Natural", "own", "PGD-100", "FGSM", "worst case"]
    assert [row["broken first"] for row in by_name.values()] == ["10", "60", "0", "0", ""]
    assert by_name["FGSM"]["forward passes an image"] == "1.0"
    assert by_name["own"]["accuracy"] == "30.00%"


class Composite:
    """FGSM in several parts, each run on what the previous ones left."""

    def __init__(self, parts):
        self._parts = parts

    def parts(self):
        return {name: FGSM(0.1001) for name in self._parts}

    def __call__(self, model, x, y):
        raise AssertionError("its parts are run")


@pytest.mark.parametrize(
    ("parts", "expected"), [(["a"], ["aa"]), (["a", "b"], ["aa/a", "aa/b", "aa"])]
)
def test_parts_have_rows_if_there_are_several(parts, expected):
    data = torch.linspace(0.4, 0.8, 20).unsqueeze(1), torch.ones(20).long()
    r = evaluate(model, data, {"aa": Composite(parts)}, checks=False)
    head, *table = per_attack(r)
    assert [row[0] for row in table] == ["Natural", *expected, "worst case"]
    attack = dict(zip(head, table[len(expected)]))
    assert attack["broken first"] == str(round(20 * (r.natural - r.robust["aa"])))


def test_the_report_holds_both_tables_and_the_findings():
    r = evaluation()
    plain = as_report(r, "mine on points", "mine")
    about, accuracies, attacks = plain.rstrip("\n").split("\n\n")
    assert about == "mine on points"
    assert accuracies == as_markdown(r, "mine")
    assert "| PGD-100 | 50.00% | 40.4 to 59.6 | 0 |" in attacks
    found = (Finding("vanishing", "no [gradient] there"), Finding("random", "differs"))
    doubtful = as_report(replace(r, warnings=found), "mine on points", "mine")
    assert doubtful.startswith(plain.rstrip("\n"))
    assert doubtful.endswith("\n\n- vanishing: no [gradient] there\n- random: differs\n")


def test_files_hold_the_results():
    r = evaluation()
    head, *lines = csv.reader(io.StringIO(as_csv(r)))
    assert head == ["attack", "n", "accuracy", "low", "high"]
    assert [(line[0], float(line[2])) for line in lines] == [
        ("natural", 0.9), ("own", 0.3), ("pgd100", 0.5), ("fgsm", 0.7), ("worst_case", 0.3),
    ]  # fmt: skip
    content = json.loads(as_json(r, {"eps": 0.1}))
    assert content["eps"] == 0.1
    assert content["robust"] == r.robust


def test_examples_have_a_line_each():
    r = evaluation()
    head, *lines = csv.reader(io.StringIO(per_example(r)))
    attacks = [f"loss_{name}" for name in r.robust]
    assert head == ["index", "label", "prediction", "broken_by", *attacks]
    assert len(lines) == 100
    assert lines[0] == ["0", "1", "0", "natural", "", "", ""]
    assert lines[10][:4] == ["10", "1", "1", "own"]
    assert lines[99][:4] == ["99", "1", "1", ""]
    assert float(lines[99][6]) == pytest.approx(r.records["fgsm"].loss[99], rel=1e-5)
