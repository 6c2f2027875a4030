"""The frameworks' examples run, small; in this process, which has imported the frameworks."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("package", "script", "args", "parts"),
    [
        (None, "tabular.py", ("--seeds", 2, "--epochs", 1, "--data", "wine"), ("AWP less SGD",)),
        (
            "lightning",
            "lightning_awp.py",
            ("--epochs", 1, "--limit", 100),
            ("AT-AWP", "robust (PGD-20), test"),
        ),
        ("accelerate", "accelerate_awp.py", ("--epochs", 1), ("AWP, gamma 0.01", "test accuracy")),
        (
            "transformers",
            "transformers_awp.py",
            ("--epochs", 1, "--pieces", 32),
            ("embeddings only", "training, at w"),
        ),
    ],
)
def test_an_example(package, script, args, parts, tmp_path, monkeypatch, capsys):
    if package is not None:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    finally:
        if package == "accelerate":
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    out = capsys.readouterr().out
    assert all(part in out for part in parts), out
    assert not list(tmp_path.iterdir())
