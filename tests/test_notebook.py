"""The notebook runs from top to bottom, and leads somewhere."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "awp_in_ten_minutes.ipynb"
MOST_BYTES = 100_000
"""Of the file with its pictures, so that the repository stays small."""


def cells(kind: str) -> list[str]:
    """The sources of the cells of one kind, in order."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_is_small_and_its_links_lead_somewhere():
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    links = re.findall(r"\]\(([^)\s]+)\)", "\n".join(cells("markdown")))
    local = [link for link in links if not link.startswith("https://")]
    assert local
    for link in local:
        assert (NOTEBOOK.parent / link).exists(), link


@pytest.mark.slow
@pytest.mark.timeout(3600)  # ten minutes, but not beside other tests
@pytest.mark.usefixtures("one_thread")
def test_runs(tmp_path, monkeypatch):
    if "AWP_DATA" not in os.environ:
        pytest.skip("AWP_DATA names no data folder")
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    (tmp_path / "data").symlink_to(Path(os.environ["AWP_DATA"]).resolve())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with plt.rc_context():
        for code in cells("code"):
            exec(code, names)
    for curve in names["curves"].values():
        on_train, on_test = curve[names["EPOCHS"]]
        assert 40 < on_test <= 100  # guessing gets a third right without an attack
        assert on_train >= on_test - 10
    assert not names["opt"].is_perturbed
    assert names["same"]
