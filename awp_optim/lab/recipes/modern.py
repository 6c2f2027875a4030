"""What leads RobustBench's ranking for small images, with AWP in it.

The settings are those of the authors' scripts, except where ``docs/recent-methods.md`` says so.

- GKL: Cui et al., 2024 (https://arxiv.org/abs/2305.13948).
- A radius that grows: Addepalli et al., 2022 (https://arxiv.org/abs/2210.15318).
- Generated images: Wang et al., 2023 (https://arxiv.org/abs/2302.04638).
- N-FGSM: de Jorge et al., 2022 (https://arxiv.org/abs/2202.01181).
"""

from __future__ import annotations

from dataclasses import replace

from awp_optim.lab.config import Config
from awp_optim.lab.recipes.recipe import Recipe

__all__ = ["MODERN"]

_GROWING = Config(
    gamma=5e-3,
    awp_start=9,
    eps_schedule="linear",
    step_size=4 / 255,
    train_steps=5,
    lr=0.2,
    schedule="cosine",
    ema=0.9996,
    ema_start=150,
)
_GKL = replace(_GROWING, method="gkl", alpha=4.0, beta=20.0, arch="wide_resnet34_10")
_GENERATED = Config(
    method="rst",
    beta=5.0,
    arch="dm_wide_resnet28_10",
    activation="silu",
    batch_size=512,
    unlabeled_share=0.7,
    epochs=400,
    lr=0.2,
    schedule="one-cycle",
    nesterov=True,
    bn_decay=False,
    bn_momentum=0.01,
    ema=0.995,
    ema_start=10,
    ema_warmup=True,
    label_smoothing=0.1,
    select_on="val",
    val_images=1024,
)
_FAST = Config(train_attack="n-fgsm", epochs=30, lr=0.2, schedule="cyclic")
_NEEDS_GENERATED = "--unlabeled FILE: the 1M images that Wang et al. generated with EDM"

MODERN: dict[str, Recipe] = {
    "gkl-awp/cifar10-linf-wrn34-10": Recipe(
        _GKL, "cifar10", "Cui et al., 2024", {"natural": 85.31, "AutoAttack": 57.13}
    ),
    "gkl-awp/cifar100-linf-wrn34-10": Recipe(
        _GKL, "cifar100", "Cui et al., 2024", {"natural": 65.76, "AutoAttack": 31.91}
    ),
    "trades-awp-growing/cifar10-linf-preact18": Recipe(
        replace(_GROWING, method="trades", beta=11.0),
        "cifar10",
        "Addepalli et al., 2022, without AutoAugment",
    ),
    "rst/cifar10-linf-wrn28-10-edm1m": Recipe(
        _GENERATED,
        "cifar10",
        "Wang et al., 2023",
        {"natural": 91.12, "AutoAttack": 63.35},
        _NEEDS_GENERATED,
    ),
    "rst-awp/cifar10-linf-wrn28-10-edm1m": Recipe(
        replace(_GENERATED, gamma=5e-3),
        "cifar10",
        "Wang et al., 2023, with AWP",
        needs=_NEEDS_GENERATED,
    ),
    "fast-at/cifar10-linf-preact18": Recipe(_FAST, "cifar10", "de Jorge et al., 2022"),
    "fast-awp/cifar10-linf-preact18": Recipe(
        replace(_FAST, gamma=5e-3), "cifar10", "de Jorge et al., 2022, with AWP"
    ),
}
"""Runs by name; ``reported`` is what their authors measured, where they did."""
