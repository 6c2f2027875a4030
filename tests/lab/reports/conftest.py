"""What the tests of the lab share."""

from __future__ import annotations

import pytest


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures = []
    write = figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        write(self, *args, **kwargs)

    monkeypatch.setattr(figure, "savefig", savefig)
    return figures
