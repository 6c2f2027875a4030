"""All there is to say about a run but its data and its folder.

The defaults are those of Rice et al. (2020) and of Section 4.4 of the AWP paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from awp_optim.attacks import PGD
from awp_optim.attacks.base import MODEL_MODES
from awp_optim.lab.models import ACTIVATIONS
from awp_optim.lab.schedules import SCHEDULES
from awp_optim.objectives import AT, MART, TRADES, Objective

__all__ = ["METHODS", "PRECISIONS", "SELECTIONS", "THREATS", "Config", "Threat"]

METHODS: dict[str, Callable[[float, float], Objective]] = {
    "at": lambda beta, smoothing: AT(smoothing),
    "trades": TRADES,
    "mart": MART,
    "rst": TRADES,
    "pretrain": lambda beta, smoothing: AT(smoothing),
}
"""The objective of each method, by its trade-off (beta of TRADES, lambda of MART) and smoothing.

RST is TRADES on more data, pre-training is adversarial training from other weights.
"""
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
"""Autocast's dtype by name; the weights and the optimizer are in float32 either way."""
SELECTIONS = ("test", "val")
"""What the best epoch can be picked on."""


@dataclass(frozen=True)
class Threat:
    """What the attacker may do, in the units of images in [0, 1]."""

    norm: str
    eps: float
    step_size: float


THREATS = {
    "linf": Threat("linf", 8 / 255, 2 / 255),
    "l2": Threat("l2", 128 / 255, 15 / 255),
}
"""The paper's threat models for CIFAR-10 (Section 4.4)."""


@dataclass(frozen=True)
class Config:
    """All there is to say about a run but its data and its folder.

    Args:
        method: "at", "trades", "mart"; "rst", which is TRADES with unlabelled images; "pretrain",
            which is adversarial training that starts from given weights.
        beta: the trade-off of "trades" and "rst" (beta) and "mart" (lambda).
        gamma: AWP's; 0 trains without it. The published runs have 1e-2 with "at" (5e-3 in Table 2),
            5e-3 with the others.
        direction: AWP's; "random" is the paper's RWP.
        awp_start: epochs without AWP at the beginning. The published runs of TRADES-AWP have 10.
        awp_norm: in which gamma is measured, "l2" or "l1".
        ascent_steps: K2, ascents of the weights for each attack.
        alternations: A, how often inputs and weights are perturbed in turn.
        ascent, interval: of :class:`~awp_optim.AdversarialStep`; the paper's are "exact" and 1.
        arch: a name in :data:`awp_optim.lab.models.MODELS`, wide_resnetDEPTH_WIDTH or
            torchvision/NAME.
        activation: a name in :data:`awp_optim.lab.models.ACTIVATIONS`.
        norm, eps, step_size: the threat, for training and testing.
        train_steps, test_steps: PGD steps.
        attack_mode: the mode in which the training attack runs. None is the published scripts':
            "train" with "at" and "pretrain", "eval" with the others.
        epochs, batch_size: as they say.
        epoch_images: images an epoch; 0 for as many as there are labelled ones.
        lr, momentum, weight_decay: of SGD.
        l1, l2: lambda of the weight regularisation in Section 5.3, a multiple of the L1 norm added
            to the loss or a weight decay of their own; not on biases and norm layers, which with
            ``l2`` have no decay at all. The paper uses 5e-6 and 5e-3. 0 for none.
        ema: decay of an exponential moving average of the weights and of BatchNorm's statistics,
            one step after another, for example 0.995; it is tested and saved beside the weights
            themselves. 0 for none.
        label_smoothing: of the objective's cross-entropy, in [0, 1); the attack is not smoothed.
        precision: "float32", or "bfloat16" for autocast in training and testing.
        schedule: a name in :data:`awp_optim.lab.schedules.SCHEDULES`, stepped after every batch.
        augment: random crop (4 pixels of padding) and horizontal flip.
        cutout: side of a square blackened in every training image; the paper's is 14. 0 for none.
        mixup: alpha of the Beta distribution by which pairs of images are mixed before the attack,
            which climbs the mixed loss; the paper's is 1.4. 0 for none.
        unlabeled_share: of each batch, the share drawn from pseudo-labelled images, if there are
            any; that of Carmon et al. (2019) is 0.5.
        train_eval: how many training images the ``train_*`` figures are measured on.
        eval_every: epochs between evaluations; the last is always evaluated.
        save_every: epochs between checkpoints that are kept, such as ``epoch_0020.pt``, to draw
            landscapes of; 0 for none.
        select_on: what the best epoch is picked on: "test", as in the paper, or "val", images held
            out of the training set, which is honest.
        val_images: how many are held out then, drawn by a seed that does not change.
        patience: stop early, at the evaluation that finds no new best for this many epochs. 0 for
            never; best.pt is the paper's early stopping (AT-ES) either way.
        seed: of the weights, the order, the augmentation and the attacks.

    Raises:
        ValueError: a setting is out of its range.
    """

    method: str = "at"
    beta: float = 6.0
    gamma: float = 0.0
    direction: str = "gradient"
    awp_start: int = 0
    awp_norm: str = "l2"
    ascent_steps: int = 1
    alternations: int = 1
    ascent: str = "exact"
    interval: int = 1
    arch: str = "preact_resnet18"
    activation: str = "relu"
    norm: str = "linf"
    eps: float = 8 / 255
    step_size: float = 2 / 255
    train_steps: int = 10
    test_steps: int = 20
    attack_mode: str | None = None
    epochs: int = 200
    batch_size: int = 128
    epoch_images: int = 0
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    l1: float = 0.0
    l2: float = 0.0
    ema: float = 0.0
    label_smoothing: float = 0.0
    precision: str = "float32"
    schedule: str = "piecewise"
    augment: bool = True
    cutout: int = 0
    mixup: float = 0.0
    unlabeled_share: float = 0.5
    train_eval: int = 1000
    eval_every: int = 1
    save_every: int = 0
    select_on: str = "test"
    val_images: int = 1000
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        choices: dict[str, Collection[str | None]] = {
            "method": METHODS,
            "activation": ACTIVATIONS,
            "precision": PRECISIONS,
            "schedule": SCHEDULES,
            "select_on": SELECTIONS,
            "attack_mode": (None, *MODEL_MODES),
        }
        for name, options in choices.items():
            if getattr(self, name) not in options:
                raise ValueError(
                    f"{name} must be one of {tuple(options)}, got {getattr(self, name)!r}"
                )
        for name in ("gamma", "beta", "lr", "weight_decay", "l1", "l2", "mixup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        for name in ("cutout", "epoch_images", "patience", "awp_start", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("momentum", "ema", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in (
            "ascent_steps",
            "alternations",
            "epochs",
            "batch_size",
            "train_eval",
            "eval_every",
            "val_images",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.unlabeled_share < 1:
            raise ValueError(f"unlabeled_share must be in (0, 1), got {self.unlabeled_share}")
        if self.mixup and self.batch_size < 2:
            raise ValueError("mixup needs pairs: a batch_size of 2 or more")

    @property
    def objective(self) -> Objective:
        """What training minimises."""
        return METHODS[self.method](self.beta, self.label_smoothing)

    @property
    def training_mode(self) -> str:
        """The mode in which the training attack runs."""
        return self.attack_mode or ("eval" if self._starts_beside else "train")

    @property
    def training_attack(self) -> PGD:
        """The attack that the method trains with: TRADES' and MART's start beside the image."""
        return PGD(
            self.eps,
            self.step_size,
            self.train_steps,
            norm=self.norm,
            loss="kl" if isinstance(self.objective, TRADES) else "ce",
            model_mode=self.training_mode,
            start_std=0.001 if self._starts_beside else None,
        )

    @property
    def test_attack(self) -> PGD:
        """PGD under the same threat, on the cross-entropy, in eval mode."""
        return PGD(self.eps, self.step_size, self.test_steps, norm=self.norm)

    @property
    def _starts_beside(self) -> bool:
        return not isinstance(self.objective, AT)
