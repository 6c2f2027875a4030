"""Named settings of runs."""

from __future__ import annotations

from awp_optim.lab.trainer import Config

__all__ = ["QUICKSTART", "QUICKSTART_IMAGES"]

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
