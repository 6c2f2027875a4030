"""The settings of a training run, apart from its data and its folder.

The defaults are those of Rice et al. (2020) and of Section 4.4 of the AWP paper. Each field's text
is also the help of its option on the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from awp_optim._utils.checks import check_choice
from awp_optim.attacks import NFGSM, PGD
from awp_optim.lab.schedules import Schedule
from awp_optim.objectives import AT, GKL, MART, SCORE, TRADES

__all__ = ["PRECISIONS", "THREATS", "Config", "Precision"]

Method = Literal["at", "trades", "mart", "rst", "pretrain", "gkl", "score"]
"""RST is TRADES with more data; pretrain is adversarial training from given weights."""
Activation = Literal[
    "relu", "leaky_relu", "elu", "celu", "gelu", "silu", "mish", "softplus", "tanh"
]
Precision = Literal["auto", "float32", "bfloat16"]

PRECISIONS: dict[Precision, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
"""Autocast's dtype by name; weights and optimizer state are float32 either way. "auto" is replaced
by one of the two before a run begins (:mod:`awp_optim.lab.precision`)."""


THREATS: dict[str, dict[str, Any]] = {
    "linf": {"norm": "linf", "eps": 8 / 255, "step_size": 2 / 255},
    "l2": {"norm": "l2", "eps": 128 / 255, "step_size": 15 / 255},
}
"""The paper's threat models for CIFAR-10 (Section 4.4), for images in [0, 1]."""

_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "beta alpha gamma ascent_below": ("finite and >= 0", lambda v: 0 <= v < math.inf),
    "lr weight_decay l1 l2 mixup cutmix": ("finite and >= 0", lambda v: 0 <= v < math.inf),
    "momentum ema label_smoothing": ("in [0, 1)", lambda v: 0 <= v < 1),
    "unlabeled_share": ("in (0, 1)", lambda v: 0 < v < 1),
    "bn_momentum": ("in (0, 1]", lambda v: v is None or 0 < v <= 1),
    "awp_start ema_start epoch_images": ("at least 0", lambda v: v >= 0),
    "test_eval cutout save_every patience": ("at least 0", lambda v: v >= 0),
    "train_steps test_steps": ("at least 0", lambda v: v >= 0),
    "ascent_steps alternations epochs batch_size": ("at least 1", lambda v: v >= 1),
    "train_eval eval_every val_images": ("at least 1", lambda v: v >= 1),
    "seed": ("between -2**63 and 2**63", lambda v: -(2**63) < v < 2**63),
}
"""What a number must be, and the check, by the names of the fields it holds for."""
REMOVED: dict[str, Any] = {"interval": 1}
"""Settings of earlier versions, and the value that meant what all runs do now."""


@dataclass(frozen=True)
class Config:
    """The settings of a training run.

    Raises:
        ValueError: a setting is out of its range, or does not go with another.
    """

    method: Method = "at"
    """Training method; rst needs pseudo-labeled images, pretrain needs initial weights."""
    beta: float = 6.0
    """Trade-off: beta of trades, rst, gkl and score, lambda of mart. awp train sets 20 for gkl and
    4 for score, unless a recipe or the option names another."""
    alpha: float = 4.0
    """Weight of gkl's cross-entropy with the natural predictions."""
    gamma: float = 0.0
    """Size of AWP's weight perturbation; 0 trains without AWP."""
    direction: Literal["gradient", "random"] = "gradient"
    """Direction of the weight perturbation; random is the paper's RWP."""
    awp_start: int = 0
    """Epochs without AWP at the beginning."""
    awp_norm: Literal["l2", "l1"] = "l2"
    """Norm in which gamma is measured."""
    ascent_steps: int = 1
    """K2, weight ascents for each attack."""
    alternations: int = 1
    """A, how often inputs and weights are perturbed in turn."""
    ascent: Literal["exact", "attack"] = "exact"
    """Gradient for the weight ascent: a pass of its own, or the attack's last iteration."""
    ascent_below: float = 0.0
    """Weight ascents count only examples with a cross-entropy below this, as 1.7; 0 for all."""
    arch: str = "preact_resnet18"
    """Name in awp_optim.lab.models.MODELS, preact_resnetDEPTH_WIDTH, wide_resnetDEPTH_WIDTH,
    dm_wide_resnetDEPTH_WIDTH (DeepMind's layout) or torchvision/NAME."""
    activation: Activation = "relu"
    """Activation function of the network."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the threat, for training and testing."""
    eps: float = 8 / 255
    """Radius of the threat, for images in [0, 1]."""
    step_size: float = 2 / 255
    """Step size of PGD, for images in [0, 1]."""
    eps_schedule: Literal["constant", "linear"] = "constant"
    """linear: in epoch t of T the training attack has t/T of eps and step_size."""
    train_steps: int = 10
    """PGD steps of the training attack."""
    test_steps: int = 20
    """PGD steps of the test attack."""
    train_attack: Literal["pgd", "n-fgsm"] = "pgd"
    """Training attack; n-fgsm is one step of length eps, and does not use step_size."""
    attack_mode: Literal["eval", "train"] | None = None
    """Mode of the model in the training attack; by default train with at and pretrain, eval with
    the others."""
    epochs: int = 200
    """Epochs to train."""
    batch_size: int = 128
    """Images in a training batch, over all processes."""
    epoch_images: int = 0
    """Images in an epoch; 0 for as many as have labels."""
    lr: float = 0.1
    """Initial learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Whether the momentum is Nesterov's."""
    weight_decay: float = 5e-4
    """Weight decay of SGD."""
    bn_decay: bool = True
    """Whether the weight decay includes the parameters of BatchNorm layers."""
    bn_momentum: float | None = None
    """A batch's share in BatchNorm's running statistics; by default the network's own share, mostly
    0.1."""
    l1: float = 0.0
    """L1 regularization of the weights, not of biases and norm layers; the paper's is 5e-6."""
    l2: float = 0.0
    """Weight decay of the weights alone, none for biases and norm layers; the paper's is 5e-3."""
    ema: float = 0.0
    """Decay of an exponential moving average of the model, such as 0.995; 0 for none.
    With it, the best epoch and the reported accuracies are those of the averaged weights."""
    ema_start: int = 0
    """Epochs before the averaging begins, in which the average is a copy of the model."""
    ema_warmup: bool = False
    """Let the decay of the average grow: min(ema, (1 + k) / (10 + k)) in step k."""
    label_smoothing: float = 0.0
    """Label smoothing applied to the objective's cross-entropy, not to the attack's."""
    precision: Precision = "float32"
    """Precision of the forward passes; bfloat16 uses autocast. auto is bfloat16 on GPUs from Ampere
    on, and for convolutional networks on CPUs with AMX or AVX512-BF16, else float32."""
    compile: bool = False
    """Compile the network by torch.compile, which takes a minute or more at the start."""
    schedule: Schedule = "piecewise"
    """Learning-rate schedule, stepped after every batch."""
    augment: bool = True
    """Augment by random crops (4 pixels of padding) and horizontal flips."""
    idbh: bool = False
    """Augment by IDBH-weak (Li and Spratling, 2023) instead of random crops and flips."""
    cutout: int = 0
    """Side of a square blackened in every training image; 0 for none, the paper's is 14."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 for none, the paper's is 1.4."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; 0 for none, 1 is usual. Not with mixup."""
    unlabeled_share: float = 0.5
    """Share of each batch drawn from pseudo-labeled or generated images, if there are any."""
    train_eval: int = 1000
    """Training images on which the train_* metrics are measured."""
    test_eval: int = 0
    """Test images, drawn at random, on which the test_* metrics are measured; 0 for all."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    save_every: int = 0
    """Epochs between checkpoints that are kept, such as epoch_0020.pt; 0 for none."""
    select_on: Literal["test", "val"] = "test"
    """What the best epoch is picked on: test as in the paper, or val, held-out training images."""
    val_images: int = 1000
    """Training images held out with select_on val, the same for every seed."""
    patience: int = 0
    """Epochs without a new best after which training stops early; 0 for never."""
    seed: int = 0
    """Seed of the weights, the order of images, the augmentation and the attacks."""

    def __post_init__(self) -> None:
        for name, options in _CHOICES.items():
            check_choice(name, getattr(self, name), options)
        for names, (what, holds) in _RANGES.items():
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise ValueError(f"{name} must be {what}, got {getattr(self, name)}")
        self._check_together()
        _ = self.test_attack  # checks eps, step_size and norm

    def _check_together(self) -> None:
        """Raise ValueError for settings of which one rules out another."""
        if self.mixup and self.cutmix:
            raise ValueError("mixup and cutmix: give one of the two")
        if (self.mixup or self.cutmix) and self.batch_size < 2:
            raise ValueError("mixup and cutmix need pairs: a batch_size of 2 or more")
        if self.gamma and self.awp_start >= self.epochs:
            raise ValueError(
                f"awp_start ({self.awp_start}) must be below epochs ({self.epochs}), or AWP never "
                "begins: give --awp-start 0, or more --epochs"
            )
        if self.ascent == "attack" and (self.ascent_below or self.ascent_steps > 1):
            raise ValueError(
                "ascent attack has the gradient of all examples, once for each attack: "
                "ascent_below, and ascent_steps above 1, need ascent exact"
            )
        if (self.ema_start or self.ema_warmup) and not self.ema:
            raise ValueError("ema_start and ema_warmup need ema, such as 0.995")
        if self.ema and self.ema_start >= self.epochs:
            raise ValueError(
                f"ema_start ({self.ema_start}) must be below epochs ({self.epochs}), or nothing is "
                "averaged: give --ema-start 0, or more --epochs"
            )
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.train_attack == "n-fgsm" and self.norm != "linf":
            raise ValueError("train_attack n-fgsm is for norm linf; with l2, leave it at pgd")

    @staticmethod
    def complete(saved: Mapping[str, Any]) -> dict[str, Any]:
        """Saved settings, with the default of each setting that is newer than they are."""
        return {**REMOVED, **asdict(Config()), **saved}

    @classmethod
    def from_saved(cls, settings: Mapping[str, Any]) -> Config:
        """The settings in a ``config.json``, which may be of an earlier version.

        A setting that the file lacks gets its default, which is what runs did before the setting
        existed. Keys that are no settings are ignored.

        Raises:
            ValueError: a setting is out of its range, or the run used one that has been removed.
        """
        for name, default in REMOVED.items():
            if settings.get(name, default) != default:
                raise ValueError(
                    f"{name}={settings[name]}: this option has been removed, and without it the "
                    "run would be another"
                )
        return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})

    @property
    def objective(self) -> AT | TRADES | MART | GKL | SCORE:
        """The loss that training minimizes; that of GKL with equal weights of all classes."""
        if self.method in ("trades", "rst"):
            return TRADES(self.beta, self.label_smoothing)
        if self.method == "mart":
            return MART(self.beta, self.label_smoothing)
        if self.method == "gkl":
            return GKL(self.alpha, self.beta, self.label_smoothing)
        if self.method == "score":
            return SCORE(self.beta, label_smoothing=self.label_smoothing)
        return AT(self.label_smoothing)

    @property
    def training_mode(self) -> Literal["eval", "train"]:
        """The mode of the model in the training attack; by default the published scripts'.

        SCORE's script normalizes by the batch without updating BatchNorm's statistics, which is not
        to be had here: by default its attack runs in eval mode.
        """
        return self.attack_mode or ("train" if isinstance(self.objective, AT) else "eval")

    @property
    def training_attack(self) -> PGD | NFGSM:
        """The method's attack. PGD of TRADES, MART and GKL starts from a little Gaussian noise."""
        loss = self.objective.attack_loss
        if self.train_attack == "n-fgsm":
            return NFGSM(self.eps, loss=loss, model_mode=self.training_mode)
        return PGD(
            self.eps,
            self.step_size,
            self.train_steps,
            norm=self.norm,
            loss=loss,
            model_mode=self.training_mode,
            start_std=None if isinstance(self.objective, (AT, SCORE)) else 0.001,
        )

    def training_attack_in(self, epoch: int) -> PGD | NFGSM:
        """The method's attack in an epoch, counted from 0.

        The linear schedule is that of Addepalli et al. (2022), whose steps are a fixed part of
        eps. https://arxiv.org/abs/2210.15318
        """
        if self.eps_schedule == "constant":
            return self.training_attack
        part = (epoch + 1) / self.epochs
        return replace(self, eps=part * self.eps, step_size=part * self.step_size).training_attack

    @property
    def test_attack(self) -> PGD:
        """PGD under the same threat, on the cross-entropy, in eval mode."""
        return PGD(self.eps, self.step_size, self.test_steps, norm=self.norm)


def _choices() -> dict[str, tuple[Any, ...]]:
    """The options of each field whose type lists them, with None where it may be None."""
    choices = {}
    for name, hint in get_type_hints(Config).items():
        literals = [t for t in (hint, *get_args(hint)) if get_origin(t) is Literal]
        if literals:
            none = (None,) if type(None) in get_args(hint) else ()
            choices[name] = get_args(literals[0]) + none
    return choices


_CHOICES = _choices()
