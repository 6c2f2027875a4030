"""Pre-activation residual networks for small images.

He et al., "Identity Mappings in Deep Residual Networks", 2016 (https://arxiv.org/abs/1603.05027),
in the layout for 32x32 images that Rice et al., 2020 (https://arxiv.org/abs/2002.11569) and the
AWP paper train: 3x3 stem, no max-pool. Parameters have the usual names of this network (``conv1``,
``layer1.0.bn1``, ..., ``bn``, ``linear``) and torch's default initialization.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from awp_optim.lab.models.common import Activation, Normalize, check_sizes

__all__ = ["PreActBlock", "PreActBottleneck", "PreActResNet"]


def projection(in_planes: int, out_planes: int, stride: int) -> nn.Conv2d | None:
    """The 1x1 convolution of a shortcut; None where the identity will do."""
    if stride == 1 and in_planes == out_planes:
        return None
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class PreActBlock(nn.Module):
    """The basic block: BN, activation and 3x3 convolution, twice, and a shortcut.

    (N, in_planes, H, W) -> (N, planes, H / stride, W / stride).
    """

    expansion = 1
    shortcut_name = "shortcut"

    def __init__(
        self, in_planes: int, planes: int, stride: int = 1, activation: Activation = F.relu
    ) -> None:
        super().__init__()
        self.activation = activation
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.add_module(self.shortcut_name, self.make_shortcut(in_planes, planes, stride))

    @staticmethod
    def make_shortcut(in_planes: int, out_planes: int, stride: int) -> nn.Module | None:
        """The projection as a Sequential of one layer, for the usual parameter name."""
        layer = projection(in_planes, out_planes, stride)
        return None if layer is None else nn.Sequential(layer)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.bn1(x))
        # A projection starts from the pre-activated tensor, the identity from the raw one.
        project = getattr(self, self.shortcut_name)
        shortcut = x if project is None else project(out)
        out = self.conv1(out)
        out = self.conv2(self.activation(self.bn2(out)))
        return out + shortcut


class PreActBottleneck(nn.Module):
    """The bottleneck: 1x1, 3x3 with the stride, and 1x1 to four times the channels.

    (N, in_planes, H, W) -> (N, 4 * planes, H / stride, W / stride).
    """

    expansion = 4

    def __init__(
        self, in_planes: int, planes: int, stride: int = 1, activation: Activation = F.relu
    ) -> None:
        super().__init__()
        self.activation = activation
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, self.expansion * planes, 1, bias=False)
        self.shortcut = PreActBlock.make_shortcut(in_planes, self.expansion * planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.activation(self.bn2(out)))
        out = self.conv3(self.activation(self.bn3(out)))
        return out + shortcut


class PreActResNet(nn.Module):
    """A pre-activation ResNet; images in [0, 1] to logits.

    (N, in_channels, H, W) -> (N, num_classes), for any H and W: the pooling is global.

    Args:
        blocks: Number of blocks of each stage. Stage i has ``width * 2**i`` channels, times the
            ``expansion`` of the block, and every stage but the first halves height and width.
        width: Channels of the stem and, times ``expansion``, of the first stage.
        block: :class:`PreActBlock` or :class:`PreActBottleneck`.
        num_classes, in_channels, mean, std, activation: As in
            :func:`~awp_optim.lab.models.build_model`.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        *,
        block: type[PreActBlock | PreActBottleneck] = PreActBlock,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        activation: Activation = F.relu,
    ) -> None:
        super().__init__()
        check_sizes(blocks=blocks, width=width, num_classes=num_classes, in_channels=in_channels)
        self.activation = activation
        self.normalize = Normalize(mean, std, in_channels)
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
        logits: Tensor = self.linear(self.activation(self.bn(out)).mean((2, 3)))
        return logits
