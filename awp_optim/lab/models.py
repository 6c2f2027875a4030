"""Pre-activation residual networks for small images, with the normalisation inside.

He et al., "Identity Mappings in Deep Residual Networks", 2016 (https://arxiv.org/abs/1603.05027),
in the layout for 32x32 images that Rice et al., 2020 (https://arxiv.org/abs/2002.11569) and the
AWP paper train: 3x3 stem, no max-pool. Parameters have the names that are usual for this network
(``conv1``, ``layer1.0.bn1``, ..., ``bn``, ``linear``) and torch's default initialisation.

Zagoruyko & Komodakis, "Wide Residual Networks", 2016 (https://arxiv.org/abs/1605.07146): the same
idea, deeper, wider and in three stages. Names (``conv1``, ``block1.layer.0.bn1``, ..., ``bn1``,
``fc``) and initialisation are those usual in adversarial training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from awp_optim.lab.data import CIFAR10_MEAN, CIFAR10_STD


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
    """The pre-activation basic block: two times BN, ReLU, 3x3 convolution, and a shortcut.

    (N, in_planes, H, W) -> (N, planes, H / stride, W / stride).
    """

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            # A Sequential of one, for the usual parameter name.
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn1(x))
        # A projection starts from the pre-activated tensor, the identity from the raw one.
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out))) + shortcut
        return out


class PreActResNet(nn.Module):
    """A pre-activation ResNet of basic blocks; images in [0, 1] to logits.

    (N, in_channels, H, W) -> (N, num_classes), for any H and W: the pooling is global.

    Args:
        blocks: Number of blocks of each stage. Stage i has ``width * 2**i`` channels, and every
            stage but the first halves height and width.
        width: Channels of the stem and of the first stage.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        mean: For :class:`Normalize`.
        std: For :class:`Normalize`.

    Raises:
        ValueError: A size is below 1, or ``mean`` and ``std`` do not fit ``in_channels``.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        if not blocks or min(*blocks, width, num_classes, in_channels) < 1:
            raise ValueError(
                "blocks, width, num_classes and in_channels must be at least 1: "
                f"{tuple(blocks)}, {width}, {num_classes}, {in_channels}"
            )
        self.normalize = _normalize(mean, std, in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        planes = width
        for i, (stage, n) in enumerate(zip(self.stages, blocks, strict=True)):
            layers = []
            for j in range(n):
                out = width * 2**i
                layers.append(PreActBlock(planes, out, stride=2 if i > 0 and j == 0 else 1))
                planes = out
            self.add_module(stage, nn.Sequential(*layers))
        self.bn = nn.BatchNorm2d(planes)
        self.linear = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv1(self.normalize(x))
        for stage in self.stages:
            out = getattr(self, stage)(out)
        out = F.relu(self.bn(out)).mean((2, 3))
        out = self.linear(out)
        return out


class WideBlock(nn.Module):
    """The block of a wide ResNet: :class:`PreActBlock` under the names usual there.

    (N, in_planes, H, W) -> (N, planes, H / stride, W / stride).
    """

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.convShortcut: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out))) + shortcut
        return out


class WideStage(nn.Module):
    """``blocks`` wide blocks in a row, the first of them with the stride."""

    def __init__(self, blocks: int, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        first = WideBlock(in_planes, planes, stride)
        self.layer = nn.Sequential(first, *(WideBlock(planes, planes) for _ in range(blocks - 1)))

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
        self.normalize = _normalize(mean, std, in_channels)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(n, 16, 16 * width, stride=1)
        self.block2 = WideStage(n, 16 * width, 32 * width, stride=2)
        self.block3 = WideStage(n, 32 * width, 64 * width, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv1(self.normalize(x))
        out = self.block3(self.block2(self.block1(out)))
        out = F.relu(self.bn1(out)).mean((2, 3))
        out = self.fc(out)
        return out


def preact_resnet18(
    num_classes: int = 10,
    in_channels: int = 3,
    mean: float | Sequence[float] = CIFAR10_MEAN,
    std: float | Sequence[float] = CIFAR10_STD,
) -> PreActResNet:
    """The PreAct ResNet-18 of the paper: 64-128-256-512 channels, 11,172,170 parameters."""
    return PreActResNet(
        (2, 2, 2, 2), 64, num_classes=num_classes, in_channels=in_channels, mean=mean, std=std
    )


def preact_resnet_small(
    num_classes: int = 10,
    in_channels: int = 1,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    width: int = 16,
) -> PreActResNet:
    """A narrow one, of three stages of one block each: for 8x8 digits, on a CPU."""
    return PreActResNet(
        (1, 1, 1), width, num_classes=num_classes, in_channels=in_channels, mean=mean, std=std
    )


def wide_resnet34_10(
    num_classes: int = 10,
    in_channels: int = 3,
    mean: float | Sequence[float] = CIFAR10_MEAN,
    std: float | Sequence[float] = CIFAR10_STD,
) -> WideResNet:
    """The WRN-34-10 of the paper: 160-320-640 channels, 46,160,474 parameters."""
    return WideResNet(34, 10, num_classes=num_classes, in_channels=in_channels, mean=mean, std=std)


def wide_resnet28_10(
    num_classes: int = 10,
    in_channels: int = 3,
    mean: float | Sequence[float] = CIFAR10_MEAN,
    std: float | Sequence[float] = CIFAR10_STD,
) -> WideResNet:
    """The WRN-28-10 of the paper's pre-training and RST: 36,479,194 parameters."""
    return WideResNet(28, 10, num_classes=num_classes, in_channels=in_channels, mean=mean, std=std)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "preact_resnet18": preact_resnet18,
    "preact_resnet_small": preact_resnet_small,
    "wide_resnet28_10": wide_resnet28_10,
    "wide_resnet34_10": wide_resnet34_10,
}


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
) -> nn.Module:
    """A new network of :data:`MODELS` by name, for images in [0, 1].

    Raises:
        ValueError: There is no such name; the text lists those there are.
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; there are: {', '.join(sorted(MODELS))}")
    return MODELS[name](num_classes=num_classes, in_channels=in_channels, mean=mean, std=std)
