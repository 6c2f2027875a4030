"""Networks for small images, by name, with the normalization inside."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from awp_optim.lab.models.common import Activation, Normalize
from awp_optim.lab.models.deepmind import DeepMindWideResNet
from awp_optim.lab.models.preact import PreActBlock, PreActBottleneck, PreActResNet
from awp_optim.lab.models.vgg import VGG
from awp_optim.lab.models.wide import WideResNet

__all__ = [
    "ACTIVATIONS",
    "MODELS",
    "VGG",
    "DeepMindWideResNet",
    "Normalize",
    "PreActBlock",
    "PreActBottleneck",
    "PreActResNet",
    "WideResNet",
    "build_model",
]

PREACT_RESNETS: dict[int, Callable[..., nn.Module]] = {
    10: partial(PreActResNet, (1, 1, 1, 1)),
    18: partial(PreActResNet, (2, 2, 2, 2)),
    34: partial(PreActResNet, (3, 4, 6, 3)),
    50: partial(PreActResNet, (3, 4, 6, 3), block=PreActBottleneck),
}
"""The pre-activation ResNets of four stages, by depth."""

MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"preact_resnet{depth}": build for depth, build in PREACT_RESNETS.items()},
    "preact_resnet_small": partial(PreActResNet, (1, 1, 1), width=16),  # for 8x8 digits, on a CPU
    "dm_wide_resnet28_10": partial(DeepMindWideResNet, 28, 10),
    "dm_wide_resnet70_16": partial(DeepMindWideResNet, 70, 16),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
    "wide_resnet28_10": partial(WideResNet, 28, 10),
    "wide_resnet34_10": partial(WideResNet, 34, 10),
    "wide_resnet34_20": partial(WideResNet, 34, 20),
    "wide_resnet70_16": partial(WideResNet, 70, 16),
}
"""The networks that papers train, for :func:`build_model`."""

ACTIVATIONS: dict[str, Activation] = {
    f.__name__: f
    for f in (F.relu, F.leaky_relu, F.elu, F.celu, F.gelu, F.silu, F.mish, F.softplus, torch.tanh)
}
"""Activations by name, for :func:`build_model`."""

TORCHVISION = "torchvision/"


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    activation: str | None = None,
) -> nn.Module:
    """Build a new network by name, for images in [0, 1].

    Args:
        name: A name in :data:`MODELS`; ``"wide_resnet16_4"`` and so on, of depth 16 and width 4;
            ``"preact_resnet10_32"`` and so on, with 32 channels in the stem instead of 64;
            ``"dm_wide_resnet28_10"`` and so on, a wide ResNet in DeepMind's layout; or
            ``"torchvision/resnet18"`` and so on: any classifier of ``torchvision.models``,
            untrained, after :class:`Normalize`. Those are made for RGB images of about 224x224;
            not all of them accept small ones.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        mean: For :class:`Normalize`. None for no normalization; in DeepMind's layout, for the
            statistics of CIFAR.
        std: The same; give both or none.
        activation: A name in :data:`ACTIVATIONS`. None for "relu"; in DeepMind's layout, for
            "silu". The networks of torchvision have their own.

    Raises:
        ImportError: A network of torchvision was asked for, and torchvision is not installed.
        ValueError: There is no such name (the message lists the names), or a network of
            torchvision was asked for with other images than RGB, or another activation.
    """
    settings: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    if mean is not None and std is not None:
        settings |= {"mean": mean, "std": std}
    if name.startswith(TORCHVISION):
        if activation not in (None, "relu"):
            raise ValueError(f"{name} has its own activation: {activation!r} cannot be set")
        return _torchvision_model(name.removeprefix(TORCHVISION), **settings)
    if activation is not None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"no activation {activation!r}; there are: {', '.join(ACTIVATIONS)}")
        settings["activation"] = ACTIVATIONS[activation]
    return _layout(name)(**settings)


def _layout(name: str) -> Callable[..., nn.Module]:
    """What builds the network of this name."""
    if name in MODELS:
        return MODELS[name]
    if not (parts := re.fullmatch(r"(dm_wide|wide|preact)_resnet(\d+)_(\d+)", name)):
        raise ValueError(
            f"no model {name!r}; there are: {', '.join(sorted(MODELS))}; preact_resnetDEPTH_WIDTH; "
            f"wide_resnetDEPTH_WIDTH; dm_wide_resnetDEPTH_WIDTH; and {TORCHVISION}NAME"
        )
    depth, width = int(parts[2]), int(parts[3])
    if parts[1] == "preact":
        if depth not in PREACT_RESNETS:
            raise ValueError(f"depth must be one of {[*PREACT_RESNETS]}, got {depth}")
        return partial(PREACT_RESNETS[depth], width=width)
    return partial(WideResNet if parts[1] == "wide" else DeepMindWideResNet, depth, width)


def _torchvision_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> nn.Module:
    """torchvision's classifier ``name``, untrained: its parameters have the prefix ``model.``."""
    from torchvision import models

    names = models.list_models(module=models)  # detection and the like are in modules below
    if name not in names:
        raise ValueError(f"torchvision has no classifier {name!r}; it has: {', '.join(names)}")
    if in_channels != 3:
        raise ValueError(f"the networks of torchvision need RGB images, not {in_channels} channels")
    settings: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Without the auxiliary heads, whose logits would be returned too in train mode.
        settings = {"aux_logits": False, "init_weights": True}
    net = models.get_model(name, weights=None, num_classes=num_classes, **settings)
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std, in_channels), model=net))
