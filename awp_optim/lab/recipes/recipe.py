"""A named run: its settings, its images, and the result that somebody reports for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from awp_optim.lab.config import Config

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """A named run.

    Attributes:
        config: its settings.
        dataset: the name of its data set.
        source: where the settings and the results are from: a table of the AWP paper, or a work.
        reported: the results there, accuracies on the test set in %: "best" and "last" robust
            accuracy under PGD-20, or by attack at the best checkpoint.
        needs: the option that the run requires, if any, and what to give there.
        train_images: how many training images it is for, as many of each class; None for all.
    """

    config: Config
    dataset: str
    source: str
    reported: Mapping[str, float] = field(default_factory=dict)
    needs: str = ""
    train_images: int | None = None
