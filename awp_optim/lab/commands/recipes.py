"""``awp recipes``: named runs and their reported results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from awp_optim.lab.commands.options import parse, terminal
from awp_optim.lab.job import Job
from awp_optim.lab.recipes import RECIPES

__all__ = ["main"]

HELP = "List the recipes of awp train and awp compare, with the results reported for them."


@dataclass(frozen=True)
class Options:
    """``awp recipes`` has no options."""


def main(arguments: Sequence[str], ranks: Job) -> None:
    """Print the table of recipes."""
    parse(Options, arguments, "awp recipes", HELP)
    table = Table(title="Recipes, with the accuracies reported for the test set in %")
    table.add_column("--recipe", no_wrap=True)
    for column in ("source", "reported", "needs"):
        table.add_column(column)
    for name, recipe in RECIPES.items():
        results = ", ".join(f"{k} {v:.2f}" for k, v in recipe.reported.items())
        table.add_row(name, recipe.source, results, recipe.needs)
    terminal().print(table)
