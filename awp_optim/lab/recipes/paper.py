"""The runs of the paper, with the results that it reports for each.

Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust Generalization" (NeurIPS 2020). What
the paper leaves open is set as in the authors' scripts and published logs: the training attack runs
in train mode for AT and in eval mode for TRADES and MART, TRADES-AWP begins with 10 epochs without
AWP and the runs on SVHN with 5, the learning rate on SVHN is 0.01. What it leaves to the works it
compares with is set as in those: RST has batches of 256, half of them pseudo-labeled (Carmon et
al., 2019); pre-trained weights are fine-tuned with a cosine schedule (Hendrycks et al., 2019).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from awp_optim.lab.config import THREATS, Config
from awp_optim.lab.recipes.recipe import Recipe

__all__ = ["PAPER", "WITH_DATA"]

_LINF = Config()
_L2 = replace(_LINF, **THREATS["l2"])
_SVHN = replace(_LINF, lr=0.01, step_size=1 / 255)
_SVHN_L2 = replace(_L2, lr=0.01)
WITH_DATA: dict[str, dict[str, Any]] = {
    "rst": {"method": "rst", "batch_size": 256, "unlabeled_share": 0.5},
    "pretrain": {"method": "pretrain", "epochs": 50, "lr": 0.001, "schedule": "cosine"},
}
"""Settings of runs with additional data, apart from the network."""
_WRN34 = replace(_LINF, arch="wide_resnet34_10")
_WRN28 = replace(_LINF, arch="wide_resnet28_10")
_RST = replace(_WRN28, **WITH_DATA["rst"])
_PRETRAIN = replace(_WRN28, **WITH_DATA["pretrain"])
_NEEDS_UNLABELED = "--unlabeled FILE: 500K TinyImages (python -m awp_optim.lab.tinyimages)"
_NEEDS_INIT = "--init FILE: weights trained against PGD on ImageNet at 32x32"


def _table1(config: Config, dataset: str, *results: float) -> Recipe:
    return Recipe(config, dataset, "Table 1", dict(zip(("best", "last"), results, strict=True)))


def _table2(config: Config, *results: float, needs: str = "") -> Recipe:
    attacks = ("natural", "FGSM", "PGD-20", "PGD-100", "CW", "SPSA", "AutoAttack")
    return Recipe(config, "cifar10", "Table 2", dict(zip(attacks, results, strict=True)), needs)


def _table45(config: Config, *results: float) -> Recipe:
    names = ("best", "last", "natural, best", "natural, last")
    table = "Table 4" if config.norm == "linf" else "Table 5"
    return Recipe(config, "cifar10", table, dict(zip(names, results, strict=True)))


def _awp(config: Config, gamma: float = 1e-2, start: int = 0) -> Config:
    return replace(config, gamma=gamma, awp_start=start)


_TRADES = replace(_WRN34, method="trades")
_MART = replace(_WRN34, method="mart")

PAPER: dict[str, Recipe] = {
    # Table 1, PreAct ResNet-18.
    "at/svhn-linf-preact18": _table1(_SVHN, "svhn", 53.36, 44.49),
    "at-awp/svhn-linf-preact18": _table1(_awp(_SVHN, start=5), "svhn", 59.12, 55.87),
    "at/cifar10-linf-preact18": _table1(_LINF, "cifar10", 52.79, 44.44),
    "at-awp/cifar10-linf-preact18": _table1(_awp(_LINF), "cifar10", 55.39, 54.73),
    "at/cifar100-linf-preact18": _table1(_LINF, "cifar100", 27.22, 20.82),
    "at-awp/cifar100-linf-preact18": _table1(_awp(_LINF), "cifar100", 30.71, 30.28),
    "at/svhn-l2-preact18": _table1(_SVHN_L2, "svhn", 66.87, 65.03),
    "at-awp/svhn-l2-preact18": _table1(_awp(_SVHN_L2, start=5), "svhn", 72.57, 67.73),
    "at/cifar10-l2-preact18": _table1(_L2, "cifar10", 69.15, 65.93),
    "at-awp/cifar10-l2-preact18": _table1(_awp(_L2), "cifar10", 72.69, 72.08),
    "at/cifar100-l2-preact18": _table1(_L2, "cifar100", 41.33, 35.27),
    "at-awp/cifar100-l2-preact18": _table1(_awp(_L2), "cifar100", 45.60, 44.66),
    # Table 2, CIFAR-10, L_inf.
    "at/cifar10-linf-wrn34-10": _table2(_WRN34, 86.07, 61.76, 56.10, 55.79, 54.19, 61.40, 52.60),
    "at-awp/cifar10-linf-wrn34-10": _table2(
        _awp(_WRN34, 5e-3), 85.57, 62.90, 58.14, 57.94, 55.96, 62.65, 54.04
    ),
    "trades/cifar10-linf-wrn34-10": _table2(
        _TRADES, 84.65, 61.32, 56.33, 56.07, 54.20, 61.10, 53.08
    ),
    "trades-awp/cifar10-linf-wrn34-10": _table2(
        _awp(_TRADES, 5e-3, start=10), 85.36, 63.49, 59.27, 59.12, 57.07, 63.85, 56.17
    ),
    "mart/cifar10-linf-wrn34-10": _table2(_MART, 84.17, 61.61, 58.56, 57.88, 54.58, 58.90, 51.10),
    "mart-awp/cifar10-linf-wrn34-10": _table2(
        _awp(_MART, 5e-3), 84.43, 63.98, 60.68, 59.32, 56.37, 62.75, 54.23
    ),
    "pretrain/cifar10-linf-wrn28-10": _table2(
        _PRETRAIN, 87.89, 63.27, 57.37, 56.80, 55.95, 62.55, 54.92, needs=_NEEDS_INIT
    ),
    "pretrain-awp/cifar10-linf-wrn28-10": _table2(
        _awp(_PRETRAIN, 5e-3), 88.33, 66.34, 61.40, 61.21, 59.28, 65.55, 57.39, needs=_NEEDS_INIT
    ),
    "rst/cifar10-linf-wrn28-10": _table2(
        _RST, 89.69, 69.60, 62.60, 62.22, 60.47, 67.60, 59.53, needs=_NEEDS_UNLABELED
    ),
    "rst-awp/cifar10-linf-wrn28-10": _table2(
        _awp(_RST, 5e-3), 88.25, 67.94, 63.73, 63.58, 61.62, 68.72, 60.05, needs=_NEEDS_UNLABELED
    ),
    # Tables 4 and 5, PreAct ResNet-18 on CIFAR-10.
    "at-l1/cifar10-linf-preact18": _table45(replace(_LINF, l1=5e-6), 51.95, 48.76, 82.77, 83.42),
    "at-l2/cifar10-linf-preact18": _table45(replace(_LINF, l2=5e-3), 51.60, 47.37, 81.05, 81.97),
    "at-cutout/cifar10-linf-preact18": _table45(
        replace(_LINF, cutout=14), 52.78, 50.37, 80.99, 83.46
    ),
    "at-mixup/cifar10-linf-preact18": _table45(
        replace(_LINF, mixup=1.4), 52.87, 49.76, 78.76, 78.50
    ),
    "at-l1/cifar10-l2-preact18": _table45(replace(_L2, l1=5e-6), 67.99, 63.75, 88.04, 88.49),
    "at-l2/cifar10-l2-preact18": _table45(replace(_L2, l2=5e-3), 67.78, 63.62, 88.57, 87.75),
    "at-cutout/cifar10-l2-preact18": _table45(replace(_L2, cutout=14), 69.38, 67.68, 88.36, 88.01),
    "at-mixup/cifar10-l2-preact18": _table45(replace(_L2, mixup=1.4), 70.11, 68.20, 87.29, 86.91),
}
"""The paper's runs by name, such as ``at-awp/cifar10-linf-preact18``."""
