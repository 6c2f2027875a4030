"""Named settings of runs, for ``awp train --recipe`` and ``awp compare --recipe``."""

from __future__ import annotations

from dataclasses import replace

from awp_optim.lab.config import Config
from awp_optim.lab.recipes.modern import MODERN
from awp_optim.lab.recipes.paper import PAPER, WITH_DATA
from awp_optim.lab.recipes.recipe import Recipe
from awp_optim.lab.recipes.small import QUICKSTART, QUICKSTART_IMAGES, SMALL

__all__ = ["PAPER", "QUICKSTART", "QUICKSTART_IMAGES", "RECIPES", "Recipe", "defaults"]

RECIPES: dict[str, Recipe] = {**PAPER, **MODERN, **SMALL}
"""All recipes by name, such as ``at-awp/cifar10-linf-preact18``."""


BETAS = {"gkl": 20.0, "score": 4.0}
"""The authors' beta of methods that are not in the AWP paper."""


def defaults(dataset: str, norm: str = "linf", method: str = "at") -> Config:
    """The paper's settings with AWP for a data set; CIFAR-10's for one that is not in the paper.

    PreAct ResNet-18; gamma as in the published runs, 1e-2 with "at" and 5e-3 with other methods.
    RST and pre-training have the settings of Table 2 except for the network; TRADES on CIFAR has
    no AWP for 10 epochs. GKL and SCORE have their authors' beta.
    """
    fallback = PAPER[f"at-awp/cifar10-{norm}-preact18"]
    config = PAPER.get(f"at-awp/{dataset}-{norm}-preact18", fallback).config
    if method == "at":
        return config
    if method == "trades" and dataset in ("cifar10", "cifar100"):
        config = replace(config, awp_start=10)
    if method in BETAS:
        config = replace(config, beta=BETAS[method])
    return replace(config, **{"method": method, "gamma": 5e-3, **WITH_DATA.get(method, {})})
