"""Named settings of runs: the quickstart's, and the paper's with what it reports of each.

Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust Generalization" (NeurIPS 2020). Where
the paper leaves a setting out it is that of the authors' scripts and published logs: the training
attack runs in train mode for AT and in eval mode for TRADES and MART, TRADES-AWP has 10 epochs
without AWP at the beginning and the runs on SVHN 5, the learning rate on SVHN is 0.01. What the
paper leaves to the works that it compares with is theirs: RST has batches of 256, half of them
pseudo-labelled (Carmon et al., 2019); pre-trained weights are fine-tuned by a cosine schedule
(Hendrycks et al., 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from awp_optim.lab.config import THREATS, Config

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
        needs: the option that it cannot do without, if there is one, and what to give there.
        paper: what it says there, accuracies on the test set in %: "best" and "last" robust
            accuracy under PGD-20 (means of five runs), or by attack at the best checkpoint.
    """

    config: Config
    dataset: str
    table: int
    paper: Mapping[str, float]
    needs: str = ""


# Table 1, PreAct ResNet-18: best and last robust accuracy of AT, then of AT-AWP.
_TABLE_1 = {
    ("svhn", "linf"): ((53.36, 44.49), (59.12, 55.87)),
    ("cifar10", "linf"): ((52.79, 44.44), (55.39, 54.73)),
    ("cifar100", "linf"): ((27.22, 20.82), (30.71, 30.28)),
    ("svhn", "l2"): ((66.87, 65.03), (72.57, 67.73)),
    ("cifar10", "l2"): ((69.15, 65.93), (72.69, 72.08)),
    ("cifar100", "l2"): ((41.33, 35.27), (45.60, 44.66)),
}
# Table 2, CIFAR-10, L_inf; WideResNet-28-10 with additional data, else WideResNet-34-10.
_ATTACKS = ("natural", "FGSM", "PGD-20", "PGD-100", "CW", "SPSA", "AutoAttack")
_TABLE_2 = {
    "at": (86.07, 61.76, 56.10, 55.79, 54.19, 61.40, 52.60),
    "at-awp": (85.57, 62.90, 58.14, 57.94, 55.96, 62.65, 54.04),
    "trades": (84.65, 61.32, 56.33, 56.07, 54.20, 61.10, 53.08),
    "trades-awp": (85.36, 63.49, 59.27, 59.12, 57.07, 63.85, 56.17),
    "mart": (84.17, 61.61, 58.56, 57.88, 54.58, 58.90, 51.10),
    "mart-awp": (84.43, 63.98, 60.68, 59.32, 56.37, 62.75, 54.23),
    "pretrain": (87.89, 63.27, 57.37, 56.80, 55.95, 62.55, 54.92),
    "pretrain-awp": (88.33, 66.34, 61.40, 61.21, 59.28, 65.55, 57.39),
    "rst": (89.69, 69.60, 62.60, 62.22, 60.47, 67.60, 59.53),
    "rst-awp": (88.25, 67.94, 63.73, 63.58, 61.62, 68.72, 60.05),
}
# What changes with additional data, beside the network.
_WITH_DATA: dict[str, dict[str, Any]] = {
    "rst": {"batch_size": 256, "unlabeled_share": 0.5},
    "pretrain": {"epochs": 50, "lr": 0.001, "schedule": "cosine"},
}
_NEEDS = {
    "rst": "--unlabeled FILE: 500K TinyImages, converted by python -m awp_optim.lab.tinyimages",
    "pretrain": "--init FILE: weights trained against PGD on ImageNet at 32x32",
}
# Tables 4 and 5, PreAct ResNet-18 on CIFAR-10: robust and natural accuracy, best and last.
_REGULARISERS: dict[str, dict[str, Any]] = {
    "at-l1": {"l1": 5e-6},
    "at-l2": {"l2": 5e-3},
    "at-cutout": {"cutout": 14},
    "at-mixup": {"mixup": 1.4},
}
_ROBUST_NATURAL = ("best", "last", "natural, best", "natural, last")
_TABLES_4_AND_5 = {
    "linf": {
        "at-l1": (51.95, 48.76, 82.77, 83.42),
        "at-l2": (51.60, 47.37, 81.05, 81.97),
        "at-cutout": (52.78, 50.37, 80.99, 83.46),
        "at-mixup": (52.87, 49.76, 78.76, 78.50),
    },
    "l2": {
        "at-l1": (67.99, 63.75, 88.04, 88.49),
        "at-l2": (67.78, 63.62, 88.57, 87.75),
        "at-cutout": (69.38, 67.68, 88.36, 88.01),
        "at-mixup": (70.11, 68.20, 87.29, 86.91),
    },
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
        wide = "28" if method in _WITH_DATA else "34"
        config = Config(method=method, arch=f"wide_resnet{wide}_10", **_WITH_DATA.get(method, {}))
        if awp_too:
            config = replace(config, gamma=5e-3, awp_start=10 if method == "trades" else 0)
        paper = dict(zip(_ATTACKS, accuracies, strict=True))
        recipes[f"{name}/cifar10-linf-wrn{wide}-10"] = Recipe(
            config, "cifar10", 2, paper, _NEEDS.get(method, "")
        )
    for table, (norm, results_by_name) in enumerate(_TABLES_4_AND_5.items(), 4):
        plain = recipes[f"at/cifar10-{norm}-preact18"].config
        for name, figures in results_by_name.items():
            config = replace(plain, **_REGULARISERS[name])
            paper = dict(zip(_ROBUST_NATURAL, figures, strict=True))
            recipes[f"{name}/cifar10-{norm}-preact18"] = Recipe(config, "cifar10", table, paper)
    return recipes


RECIPES: dict[str, Recipe] = _recipes()
"""The paper's runs by name, such as ``at-awp/cifar10-linf-preact18``."""


def defaults(dataset: str, norm: str = "linf", method: str = "at") -> Config:
    """The paper's settings with AWP for a data set; CIFAR-10's for one that is not in the paper.

    PreAct ResNet-18; gamma as in the published runs, 1e-2 with "at" and 5e-3 with other methods.
    RST and pre-training have the settings of Table 2 but for the network; TRADES on CIFAR has no
    AWP for 10 epochs.
    """
    fallback = RECIPES[f"at-awp/cifar10-{norm}-preact18"]
    config = RECIPES.get(f"at-awp/{dataset}-{norm}-preact18", fallback).config
    if method == "at":
        return config
    if method == "trades" and dataset in ("cifar10", "cifar100"):
        config = replace(config, awp_start=10)
    return replace(config, method=method, gamma=5e-3, **_WITH_DATA.get(method, {}))
