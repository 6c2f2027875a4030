"""The frameworks' examples run on a small scale, and end with a sentence on bad input."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = {
    "tabular": "sklearn",
    "lightning_awp": "lightning",
    "accelerate_awp": "accelerate",
    "transformers_awp": "transformers",
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an example in this process, which has imported the frameworks."""

    def run(name: str, *arguments: object) -> None:
        pytest.importorskip(PACKAGES[name])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        finally:
            if name == "accelerate_awp":
                from accelerate.state import AcceleratorState, GradientState

                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()

    return run


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("tabular", ("--seeds", 2, "--epochs", 1, "--data", "wine"), ("AWP minus SGD",)),
        ("lightning_awp", ("--epochs", 1, "--limit", 100), ("AT-AWP", "robust (PGD-20), test")),
        ("accelerate_awp", ("--epochs", 1), ("AWP, gamma 0.01", "test accuracy")),
        ("transformers_awp", ("--epochs", 1, "--pieces", 32), ("embeddings only", "loss, test")),
    ],
)
def test_an_example_runs_and_leaves_no_files(name, arguments, parts, run, tmp_path, capsys):
    run(name, *arguments)
    printed = capsys.readouterr().out
    assert all(part in printed for part in parts), printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tabular", ("--eps", -1)),
        ("tabular", ("--gamma", "inf")),
        ("lightning_awp", ("--epochs", 0)),
        ("lightning_awp", ("--gamma", "inf")),
        ("accelerate_awp", ("--accumulate", -1)),
        ("accelerate_awp", ("--gamma", "inf")),
        ("transformers_awp", ("--gamma", "inf")),
    ],
)
def test_a_bad_option_is_a_sentence_and_exit_code_2(name, arguments, run, capsys):
    with pytest.raises(SystemExit) as exit:
        run(name, *arguments)
    assert exit.value.code == 2
    assert arguments[0] in capsys.readouterr().err
