"""Runs that a CPU finishes: the quickstart's, and those on CIFAR-10."""

from __future__ import annotations

from dataclasses import replace

from awp_optim.lab.config import Config
from awp_optim.lab.recipes.recipe import Recipe

__all__ = ["QUICKSTART", "QUICKSTART_IMAGES", "SMALL"]

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

450 training images, batches of 32 and 40 epochs were chosen for plain adversarial training alone,
with another seed than those reported, as a setting in which it overfits.
"""
QUICKSTART_IMAGES = 450
"""How many training images :data:`QUICKSTART` is for."""

_TRAIN_IMAGES = 1000
_CIFAR10_SMALL = Config(
    arch="preact_resnet10_16",
    precision="bfloat16",
    epochs=100,
    batch_size=64,
    train_eval=500,
    test_eval=1000,
    eval_every=10,
    save_every=20,
)
_FAST = Config(
    train_attack="n-fgsm",
    arch="preact_resnet10_32",
    precision="bfloat16",
    epochs=12,
    lr=0.2,
    schedule="one-cycle",
    ema=0.995,
    ema_warmup=True,
    test_eval=1000,
    eval_every=2,
)
SMALL: dict[str, Recipe] = {
    "fast-at/cifar10-cpu": Recipe(_FAST, "cifar10", "this project"),
    "fast-awp/cifar10-cpu": Recipe(replace(_FAST, gamma=5e-3), "cifar10", "this project"),
    "at/cifar10-small": Recipe(
        _CIFAR10_SMALL, "cifar10", "this project", train_images=_TRAIN_IMAGES
    ),
    "at-awp/cifar10-small": Recipe(
        replace(_CIFAR10_SMALL, gamma=1e-2),
        "cifar10",
        "this project",
        train_images=_TRAIN_IMAGES,
    ),
}
"""CIFAR-10 in an hour or less on a CPU."""
