"""Networks for small images, with the normalisation inside.

He et al., "Identity Mappings in Deep Residual Networks", 2016 (https://arxiv.org/abs/1603.05027),
in the layout for 32x32 images that Rice et al., 2020 (https://arxiv.org/abs/2002.11569) and the
AWP paper train: 3x3 stem, no max-pool. Parameters have the names that are usual for this network
(``conv1``, ``layer1.0.bn1``, ..., ``bn``, ``linear``) and torch's default initialisation.

Zagoruyko & Komodakis, "Wide Residual Networks", 2016 (https://arxiv.org/abs/1605.07146): the same
idea, deeper, wider and in three stages. Names (``conv1``, ``block1.layer.0.bn1``, ..., ``bn1``,
``fc``) and initialisation are those usual in adversarial training.

Simonyan & Zisserman, "Very Deep Convolutional Networks", 2015 (https://arxiv.org/abs/1409.1556),
with BatchNorm and one linear layer at the end, as is usual for 32x32 images; names ``features.0``,
..., ``classifier`` and torch's default initialisation.

The sizes, widths and the activation of the three are arguments of their classes; :data:`MODELS`
holds the published ones. :func:`build_model` also knows wide ResNets of any depth and width, and
torchvision's classifiers, by name.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)

Activation = Callable[[Tensor], Tensor]
_CIFAR10 = {"mean": CIFAR10_MEAN, "std": CIFAR10_STD}
ACTIVATIONS: dict[str, Activation] = {
    f.__name__: f
    for f in (F.relu, F.leaky_relu, F.elu, F.celu, F.gelu, F.silu, F.mish, F.softplus, torch.tanh)
}
"""By name, for :func:`build_model`."""
TORCHVISION = "torchvision/"  # before the name of one of torchvision's classifiers


class Normalize(nn.Module):
    """``(x - mean) / std``, channel by channel.

    As a layer of the model, so that attacks work on images in [0, 1].

    The statistics are saved with the model and come back with its checkpoint. A checkpoint without
    them (a network that was normalised outside) loads too, and leaves them as they were built.

    Args:
        mean: One number a channel, in the images' units; or one for all channels.
        std: The same; above zero.

    Raises:
        ValueError: ``std`` is not positive, or the two lengths differ.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        means = [float(mean)] if isinstance(mean, (int, float)) else [float(m) for m in mean]
        stds = [float(std)] if isinstance(std, (int, float)) else [float(s) for s in std]
        if len(means) != len(stds):
            raise ValueError(f"mean and std must be of one length: {mean} and {std}")
        if not all(s > 0 for s in stds):
            raise ValueError(f"std must be above zero: {std}")
        self.register_buffer("mean", torch.tensor(means).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(stds).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # load_state_dict hands every module a copy of its own part, so the caller's stays as it is.
        for name in ("mean", "std"):
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def _normalize(
    mean: float | Sequence[float], std: float | Sequence[float], in_channels: int
) -> Normalize:
    """The first layer of a network for images of ``in_channels`` channels."""
    layer = Normalize(mean, std)
    if len(layer.mean) not in (1, in_channels):
        raise ValueError(f"mean and std have {len(layer.mean)} channels, the images {in_channels}")
    return layer


class PreActBlock(nn.Module):
    """The pre-activation basic block: two times BN, activation, 3x3 convolution, and a shortcut.

    (N, in_planes, H, W) -> (N, expansion * planes, H / stride, W / stride).
    """

    expansion = 1
    projection = "shortcut"  # the name of the 1x1 convolution of the shortcut, None if not needed

    def __init__(
        self, in_planes: int, planes: int, stride: int = 1, activation: Activation = F.relu
    ) -> None:
        super().__init__()
        self.activation = activation
        self._add_layers(in_planes, planes, stride)
        out_planes = self.expansion * planes
        needed = stride != 1 or in_planes != out_planes
        projection = self._project(in_planes, out_planes, stride) if needed else None
        self.add_module(self.projection, projection)

    def _add_layers(self, in_planes: int, planes: int, stride: int) -> None:
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)

    def _project(self, in_planes: int, out_planes: int, stride: int) -> nn.Module:
        # A Sequential of one, for the usual parameter name.
        return nn.Sequential(nn.Conv2d(in_planes, out_planes, 1, stride, bias=False))

    def _residual(self, out: Tensor) -> Tensor:
        out = self.conv1(out)
        out = self.conv2(self.activation(self.bn2(out)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(x))
        # A projection starts from the pre-activated tensor, the identity from the raw one.
        projection = getattr(self, self.projection)
        shortcut = x if projection is None else projection(out)
        out = self._residual(out) + shortcut
        return out


class PreActBottleneck(PreActBlock):
    """The pre-activation bottleneck: 1x1, 3x3 with the stride, and 1x1 to four times the channels.

    (N, in_planes, H, W) -> (N, 4 * planes, H / stride, W / stride).
    """

    expansion = 4

    def _add_layers(self, in_planes: int, planes: int, stride: int) -> None:
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, self.expansion * planes, 1, bias=False)

    def _residual(self, out: Tensor) -> Tensor:
        out = super()._residual(out)
        out = self.conv3(self.activation(self.bn3(out)))
        return out


class PreActResNet(nn.Module):
    """A pre-activation ResNet; images in [0, 1] to logits.

    (N, in_channels, H, W) -> (N, num_classes), for any H and W: the pooling is global.

    Args:
        blocks: Number of blocks of each stage. Stage i has ``width * 2**i`` channels, times the
            block's ``expansion``, and every stage but the first halves height and width.
        width: Channels of the stem and, times ``expansion``, of the first stage.
        block: :class:`PreActBlock` or :class:`PreActBottleneck`.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        mean: For :class:`Normalize`.
        std: For :class:`Normalize`.
        activation: Of all blocks and before the pooling.

    Raises:
        ValueError: A size is below 1, or ``mean`` and ``std`` do not fit ``in_channels``.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        *,
        block: type[PreActBlock] = PreActBlock,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        activation: Activation = F.relu,
    ) -> None:
        super().__init__()
        if not blocks or min(*blocks, width, num_classes, in_channels) < 1:
            raise ValueError(
                "blocks, width, num_classes and in_channels must be at least 1: "
                f"{tuple(blocks)}, {width}, {num_classes}, {in_channels}"
            )
        self.activation = activation
        self.normalize = _normalize(mean, std, in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        planes = width
        for i, (stage, n) in enumerate(zip(self.stages, blocks, strict=True)):
            layers = []
            for j in range(n):
                stride = 2 if i > 0 and j == 0 else 1
                layers.append(block(planes, width * 2**i, stride, activation))
                planes = block.expansion * width * 2**i
            self.add_module(stage, nn.Sequential(*layers))
        self.bn = nn.BatchNorm2d(planes)
        self.linear = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv1(self.normalize(x))
        for stage in self.stages:
            out = getattr(self, stage)(out)
        out = self.activation(self.bn(out)).mean((2, 3))
        out = self.linear(out)
        return out


class WideBlock(PreActBlock):
    """The block of a wide ResNet: :class:`PreActBlock` under the names usual there."""

    projection = "convShortcut"

    def _project(self, in_planes: int, out_planes: int, stride: int) -> nn.Module:
        return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class WideStage(nn.Module):
    """``blocks`` wide blocks in a row, the first of them with the stride."""

    def __init__(
        self, blocks: int, in_planes: int, planes: int, stride: int, activation: Activation = F.relu
    ) -> None:
        super().__init__()
        rest = (WideBlock(planes, planes, 1, activation) for _ in range(blocks - 1))
        self.layer = nn.Sequential(WideBlock(in_planes, planes, stride, activation), *rest)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-depth-width without dropout; images in [0, 1] to logits.

    (N, in_channels, H, W) -> (N, num_classes), for any H and W: the pooling is global.

    Args:
        depth: Number of 3x3 convolutions and projections, 6n + 4: a stem of 16 channels and three
            stages of n blocks.
        width: k; the stages have 16k, 32k and 64k channels, and the second and third halve height
            and width.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        mean: For :class:`Normalize`.
        std: For :class:`Normalize`.
        activation: Of all blocks and before the pooling. The initialisation is ReLU's throughout.

    Raises:
        ValueError: ``depth`` is not 6n + 4, a size is below 1, or ``mean`` and ``std`` do not fit
            ``in_channels``.
    """

    def __init__(
        self,
        depth: int = 34,
        width: int = 10,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        activation: Activation = F.relu,
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6n + 4 with n at least 1 (10, 16, ...), got {depth}")
        if min(width, num_classes, in_channels) < 1:
            raise ValueError(
                "width, num_classes and in_channels must be at least 1: "
                f"{width}, {num_classes}, {in_channels}"
            )
        n = (depth - 4) // 6
        self.activation = activation
        self.normalize = _normalize(mean, std, in_channels)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(n, 16, 16 * width, 1, activation)
        self.block2 = WideStage(n, 16 * width, 32 * width, 2, activation)
        self.block3 = WideStage(n, 32 * width, 64 * width, 2, activation)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv1(self.normalize(x))
        out = self.block3(self.block2(self.block1(out)))
        out = self.activation(self.bn1(out)).mean((2, 3))
        out = self.fc(out)
        return out


class _Call(nn.Module):
    """Any activation as a layer."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x)


class VGG(nn.Module):
    """A VGG with BatchNorm and one linear layer at the end; images in [0, 1] to logits.

    (N, in_channels, H, W) -> (N, num_classes), for any H and W: what is left of the image after
    the last stage, one pixel for 32x32 and five stages, is averaged.

    Args:
        convs: Number of 3x3 convolutions (each with a bias, BN and the activation) of each stage.
            Stage i has ``width * 2**i`` channels, at most ``8 * width``, and ends with a 2x2
            max-pool, which keeps the last row and column of odd sizes.
        width: Channels of the first stage.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        mean: For :class:`Normalize`.
        std: For :class:`Normalize`.
        activation: After each BN.

    Raises:
        ValueError: A size is below 1, or ``mean`` and ``std`` do not fit ``in_channels``.
    """

    def __init__(
        self,
        convs: Sequence[int] = (2, 2, 4, 4, 4),
        width: int = 64,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        activation: Activation = F.relu,
    ) -> None:
        super().__init__()
        if not convs or min(*convs, width, num_classes, in_channels) < 1:
            raise ValueError(
                "convs, width, num_classes and in_channels must be at least 1: "
                f"{tuple(convs)}, {width}, {num_classes}, {in_channels}"
            )
        self.normalize = _normalize(mean, std, in_channels)
        layers: list[nn.Module] = []
        planes = in_channels
        for i, n in enumerate(convs):
            for _ in range(n):
                out = width * min(2**i, 8)
                layers.append(nn.Conv2d(planes, out, 3, padding=1))
                layers += [nn.BatchNorm2d(out), _Call(activation)]
                planes = out
            # Rounded up, so that no image is too small.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.features(self.normalize(x))
        out = self.classifier(out.mean((2, 3)))
        return out


# The published networks: CIFAR-10's statistics unless others are given, and what their class takes.


def _for_cifar10(num_classes: int, in_channels: int, settings: dict[str, Any]) -> dict[str, Any]:
    """A builder's settings; the statistics are CIFAR-10's unless others are given."""
    return {"num_classes": num_classes, "in_channels": in_channels, **_CIFAR10, **settings}


def preact_resnet18(num_classes: int = 10, in_channels: int = 3, **settings: Any) -> PreActResNet:
    """The PreAct ResNet-18 of the paper: 64-128-256-512 channels, 11,172,170 parameters."""
    return PreActResNet((2, 2, 2, 2), 64, **_for_cifar10(num_classes, in_channels, settings))


def preact_resnet34(num_classes: int = 10, in_channels: int = 3, **settings: Any) -> PreActResNet:
    """The PreAct ResNet-34: 64-128-256-512 channels, 21,280,330 parameters."""
    return PreActResNet((3, 4, 6, 3), 64, **_for_cifar10(num_classes, in_channels, settings))


def preact_resnet50(num_classes: int = 10, in_channels: int = 3, **settings: Any) -> PreActResNet:
    """The PreAct ResNet-50: 256-512-1024-2048 channels, 23,513,162 parameters."""
    return PreActResNet(
        (3, 4, 6, 3), 64, block=PreActBottleneck, **_for_cifar10(num_classes, in_channels, settings)
    )


def preact_resnet_small(
    num_classes: int = 10, in_channels: int = 1, width: int = 16, **settings: Any
) -> PreActResNet:
    """A narrow one, of three stages of one block each: for 8x8 digits, on a CPU."""
    settings = {"num_classes": num_classes, "in_channels": in_channels, **settings}
    return PreActResNet((1, 1, 1), width, **settings)


def wide_resnet28_10(num_classes: int = 10, in_channels: int = 3, **settings: Any) -> WideResNet:
    """The WRN-28-10 of the paper's pre-training and RST: 36,479,194 parameters."""
    return WideResNet(28, 10, **_for_cifar10(num_classes, in_channels, settings))


def wide_resnet34_10(num_classes: int = 10, in_channels: int = 3, **settings: Any) -> WideResNet:
    """The WRN-34-10 of the paper: 160-320-640 channels, 46,160,474 parameters."""
    return WideResNet(34, 10, **_for_cifar10(num_classes, in_channels, settings))


def wide_resnet34_20(num_classes: int = 10, in_channels: int = 3, **settings: Any) -> WideResNet:
    """The WRN-34-20: 320-640-1280 channels, 184,531,674 parameters."""
    return WideResNet(34, 20, **_for_cifar10(num_classes, in_channels, settings))


def wide_resnet70_16(num_classes: int = 10, in_channels: int = 3, **settings: Any) -> WideResNet:
    """The WRN-70-16: 256-512-1024 channels, 266,796,506 parameters."""
    return WideResNet(70, 16, **_for_cifar10(num_classes, in_channels, settings))


def vgg19(num_classes: int = 10, in_channels: int = 3, **settings: Any) -> VGG:
    """The VGG-19 with BatchNorm: 64-128-256-512-512 channels, 20,040,522 parameters."""
    return VGG((2, 2, 4, 4, 4), 64, **_for_cifar10(num_classes, in_channels, settings))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "preact_resnet18": preact_resnet18,
    "preact_resnet34": preact_resnet34,
    "preact_resnet50": preact_resnet50,
    "preact_resnet_small": preact_resnet_small,
    "vgg19": vgg19,
    "wide_resnet28_10": wide_resnet28_10,
    "wide_resnet34_10": wide_resnet34_10,
    "wide_resnet34_20": wide_resnet34_20,
    "wide_resnet70_16": wide_resnet70_16,
}


def _torchvision_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    **settings: Any,
) -> nn.Module:
    """torchvision's classifier ``name``, untrained: parameters as there, after ``model.``."""
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(
            f"{TORCHVISION}{name} needs torchvision: pip install torchvision"
        ) from error

    names = models.list_models(module=models)  # detection and the like are in modules below
    if name not in names:
        raise ValueError(f"torchvision has no classifier {name!r}; it has: {', '.join(names)}")
    if in_channels != 3:
        raise ValueError(f"torchvision's networks take RGB images, not {in_channels} channels")
    if name in ("googlenet", "inception_v3"):
        # Without the auxiliary heads: in train mode, they would come back beside the logits.
        settings = {"aux_logits": False, "init_weights": True, **settings}
    net = models.get_model(name, weights=None, num_classes=num_classes, **settings)
    layers = {"normalize": _normalize(mean, std, in_channels), "model": net}
    return nn.Sequential(OrderedDict(layers))


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    activation: str | Activation = "relu",
    **settings: Any,
) -> nn.Module:
    """A new network by name, for images in [0, 1].

    Args:
        name: One of :data:`MODELS`; ``"wide_resnet16_4"`` and so on, of depth 16 and width 4; or
            ``"torchvision/resnet18"`` and so on: any classifier of ``torchvision.models``,
            untrained, after :class:`Normalize`. Those are made for RGB images of about 224x224; not
            all of them take small ones.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        mean: For :class:`Normalize`.
        std: For :class:`Normalize`.
        activation: A name in :data:`ACTIVATIONS`, or any function of a tensor, in place of ReLU.
            torchvision's networks have their own.
        settings: What else the network takes.

    Raises:
        ImportError: torchvision's network was asked for, and it is not installed.
        ValueError: There is no such name (the text lists those there are), or torchvision's
            network was asked for other images than RGB, or for another activation.
    """
    images: dict[str, Any] = {"in_channels": in_channels, "mean": mean, "std": std}
    if name.startswith(TORCHVISION):
        if activation not in ("relu", F.relu):
            raise ValueError(f"{name} has its own activation: {activation!r} cannot be set")
        name = name.removeprefix(TORCHVISION)
        return _torchvision_model(name, num_classes=num_classes, **images, **settings)
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"no activation {activation!r}; there are: {', '.join(ACTIVATIONS)}")
        activation = ACTIVATIONS[activation]
    settings = {**images, **settings, "activation": activation, "num_classes": num_classes}
    if name in MODELS:
        return MODELS[name](**settings)
    if sizes := re.fullmatch(r"wide_resnet(\d+)_(\d+)", name):
        return WideResNet(int(sizes[1]), int(sizes[2]), **settings)
    raise ValueError(
        f"no model {name!r}; there are: {', '.join(sorted(MODELS))}; wide_resnetDEPTH_WIDTH; and "
        f"{TORCHVISION}NAME"
    )
