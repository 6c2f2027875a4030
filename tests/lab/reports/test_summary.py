"""Accuracies of runs as tables."""

from __future__ import annotations

import pytest

from awp_optim.lab.reports.summary import accuracies, differences, markdown, spread, summary


def rows(natural, robust, train):
    """A run evaluated at every second epoch."""
    evaluated = [
        {"epoch": float(2 * i + 1), "test_natural_acc": n, "test_robust_acc": r}
        for i, (n, r) in enumerate(zip(natural, robust))
    ]
    evaluated[-1]["train_robust_acc"] = train
    return [row for e in evaluated for row in ({"epoch": e["epoch"] - 1}, e)]


RUNS = {
    "AT": [rows([0.9, 0.9], [0.50, 0.48], 0.80), rows([0.9, 0.9], [0.70, 0.60], 0.90)],
    "AT-AWP": [rows([0.9, 0.8], [0.51, 0.51], 0.75), rows([0.9, 0.8], [0.70, 0.71], 0.80)],
}


def test_summary():
    found = summary(rows([0.8, 0.9, 0.95], [0.5, 0.6, 0.4], 0.75))
    assert found == pytest.approx(
        {
            "natural, best": 90,  # at the epoch with the best robust accuracy
            "natural, last": 95,
            "robust, best": 60,
            "robust, last": 40,
            "robust, training set, last": 75,
            "gap, last": 35,
        }
    )


def test_the_summary_of_averaged_weights_is_theirs_alone():
    of_the_model = rows([0.8, 0.9, 0.95], [0.5, 0.3, 0.4], 0.9)
    of_the_average = rows([0.8, 0.9, 0.95], [0.5, 0.6, 0.4], 0.75)
    both = [
        {**row, **{f"ema_{k}": v for k, v in other.items() if "_" in k}}
        for row, other in zip(of_the_model, of_the_average, strict=True)
    ]
    assert summary(both) == summary(of_the_average) != summary(of_the_model)


def test_spread():
    assert spread([70.0]) == "70.0"
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"  # of a sample: n - 1
    assert spread([0.5, 0.25], 2) == "0.38 ± 0.18"
    assert spread([1.0, 2.0], signed=True) == "+1.5 ± 0.7"


def test_accuracies():
    head, at, awp = accuracies(RUNS)
    assert head == ["", *summary(RUNS["AT"][0])]
    assert at[:4] == ["AT", "90.0 ± 0.0", "90.0 ± 0.0", "60.0 ± 14.1"]
    assert [awp[0], awp[4]] == ["AT-AWP", "61.0 ± 14.1"]


def test_differences_are_by_seed():
    head, row = differences(RUNS, {"AT-AWP": "AT"})
    cells = dict(zip(head, row))
    assert cells[""] == "AT-AWP minus AT"
    assert cells["robust, best"] == "+1.0 ± 0.0"  # though the seeds are far apart
    assert cells["natural, last"] == "-10.0 ± 0.0"
    with pytest.raises(ValueError, match="shorter"):
        differences(RUNS | {"AT": RUNS["AT"][:1]}, {"AT-AWP": "AT"})


def test_markdown():
    lines = markdown([["", "a", "b"], ["x", "1", "2"]]).splitlines()
    assert lines == ["|  | a | b |", "|---|---:|---:|", "| x | 1 | 2 |"]
