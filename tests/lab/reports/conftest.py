"""What the tests of the reports share."""

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


@pytest.fixture(scope="session")
def lines_of():
    """The lines of a panel that the legend names, by label."""

    def lines_of(axes):
        lines = {line.get_label(): line for line in axes.get_lines()}
        return {label: line for label, line in lines.items() if not label.startswith("_")}

    return lines_of


@pytest.fixture(scope="session")
def legend_of():
    """The texts of a panel's legend."""
    return lambda axes: [text.get_text() for text in axes.get_legend().get_texts()]
