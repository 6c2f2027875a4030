"""``awp recipes``: the paper's runs and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from awp_optim.lab.commands.options import parse, terminal
from awp_optim.lab.job import Job
from awp_optim.lab.recipes import RECIPES

__all__ = ["main"]

HELP = "List the recipes of awp train and awp compare, with the results that the paper reports."


@dataclass(frozen=True)
class Options:
    """``awp recipes`` has no options."""


def main(arguments: Sequence[str], ranks: Job) -> None:
    """Print the table of recipes."""
    parse(Options, arguments, "awp recipes", HELP)
    table = Table(title="Runs of the paper: accuracy on the test set in %")
    table.add_column("--recipe", no_wrap=True)
    for column in ("table", "the paper's results", "needs"):
        table.add_column(column)
    for name, recipe in RECIPES.items():
        results = ", ".join(f"{k} {v:.2f}" for k, v in recipe.paper.items())
        table.add_row(name, str(recipe.table), results, recipe.needs)
    terminal().print(table)
