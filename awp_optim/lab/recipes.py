"""Named settings of runs: the quickstart's, and the paper's with what it reports of each.

Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust Generalization" (NeurIPS 2020). Where
the paper leaves a setting out it is that of the authors' scripts and published logs: the training
attack runs in train mode for AT and in eval mode for TRADES and MART, TRADES-AWP has 10 epochs
without AWP at the beginning and the runs on SVHN 5, the learning rate on SVHN is 0.01.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from awp_optim.lab.trainer import THREATS, Config

__all__ = ["QUICKSTART", "QUICKSTART_IMAGES", "RECIPES", "Recipe", "defaults"]

QUICKSTART = Config(
    arch="preact_resnet_small",
    eps=0.2,
    step_size=0.05,
    attack_mode="eval",
    epochs=40,
    batch_size=32,
    augment=False,  # a mirrored digit is another sign, and 8x8 pixels leave nothing to crop
    train_eval=450,
    eval_every=5,
)
"""Scikit-learn's digits on a CPU, without AWP; the paper's gamma for AT-AWP is 1e-2.

450 training images, batches of 32 and 40 epochs were chosen by looking at plain adversarial
training alone, on another seed than those reported, as a setting where it overfits.
"""
QUICKSTART_IMAGES = 450
"""How many training images :data:`QUICKSTART` is for."""


@dataclass(frozen=True)
class Recipe:
    """A published run.

    Attributes:
        config: its settings.
        dataset: its data set's name.
        table: where in the paper it is.
        paper: what it says there, accuracies on the test set in %: "best" and "last" robust
            accuracy under PGD-20 (means of five runs), or by attack at the best checkpoint.
    """

    config: Config
    dataset: str
    table: int
    paper: Mapping[str, float]


# Table 1, PreAct ResNet-18: best and last robust accuracy of AT, then of AT-AWP.
_TABLE_1 = {
    ("svhn", "linf"): ((53.36, 44.49), (59.12, 55.87)),
    ("cifar10", "linf"): ((52.79, 44.44), (55.39, 54.73)),
    ("cifar100", "linf"): ((27.22, 20.82), (30.71, 30.28)),
    ("svhn", "l2"): ((66.87, 65.03), (72.57, 67.73)),
    ("cifar10", "l2"): ((69.15, 65.93), (72.69, 72.08)),
    ("cifar100", "l2"): ((41.33, 35.27), (45.60, 44.66)),
}
# Table 2, WideResNet-34-10 on CIFAR-10, L_inf.
_ATTACKS = ("natural", "FGSM", "PGD-20", "PGD-100", "CW", "SPSA", "AutoAttack")
_TABLE_2 = {
    "at": (86.07, 61.76, 56.10, 55.79, 54.19, 61.40, 52.60),
    "at-awp": (85.57, 62.90, 58.14, 57.94, 55.96, 62.65, 54.04),
    "trades": (84.65, 61.32, 56.33, 56.07, 54.20, 61.10, 53.08),
    "trades-awp": (85.36, 63.49, 59.27, 59.12, 57.07, 63.85, 56.17),
    "mart": (84.17, 61.61, 58.56, 57.88, 54.58, 58.90, 51.10),
    "mart-awp": (84.43, 63.98, 60.68, 59.32, 56.37, 62.75, 54.23),
}


def _recipes() -> dict[str, Recipe]:
    recipes = {}
    for (dataset, norm), results in _TABLE_1.items():
        threat = THREATS[norm]
        config = Config(norm=norm, eps=threat.eps, step_size=threat.step_size)
        if dataset == "svhn":
            config = replace(config, lr=0.01)
            if norm == "linf":
                config = replace(config, step_size=1 / 255)
        awp = replace(config, gamma=1e-2, awp_start=5 if dataset == "svhn" else 0)
        for name, c, (best, last) in zip(("at", "at-awp"), (config, awp), results, strict=True):
            paper = {"best": best, "last": last}
            recipes[f"{name}/{dataset}-{norm}-preact18"] = Recipe(c, dataset, 1, paper)
    for name, accuracies in _TABLE_2.items():
        method, _, awp_too = name.partition("-")
        config = Config(method=method, arch="wide_resnet34_10")
        if awp_too:
            config = replace(config, gamma=5e-3, awp_start=10 if method == "trades" else 0)
        paper = dict(zip(_ATTACKS, accuracies, strict=True))
        recipes[f"{name}/cifar10-linf-wrn34-10"] = Recipe(config, "cifar10", 2, paper)
    return recipes


RECIPES: dict[str, Recipe] = _recipes()
"""The paper's runs by name, such as ``at-awp/cifar10-linf-preact18``."""


def defaults(dataset: str, norm: str = "linf", method: str = "at") -> Config:
    """The paper's settings with AWP for a data set; CIFAR-10's for one that is not in the paper.

    PreAct ResNet-18; gamma as in the published runs, 1e-2 with "at" and 5e-3 with other methods.
    """
    fallback = RECIPES[f"at-awp/cifar10-{norm}-preact18"]
    config = RECIPES.get(f"at-awp/{dataset}-{norm}-preact18", fallback).config
    return config if method == "at" else replace(config, method=method, gamma=5e-3)
