"""Wide residual networks.

Zagoruyko & Komodakis, "Wide Residual Networks", 2016 (https://arxiv.org/abs/1605.07146): as
:mod:`awp_optim.lab.models.preact`, but deeper, wider and in three stages. Names of parameters
(``conv1``, ``block1.layer.0.bn1``, ..., ``bn1``, ``fc``) and initialization are those usual in
adversarial training.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from awp_optim.lab.models.common import Activation, Normalize, check_sizes
from awp_optim.lab.models.preact import PreActBlock, projection

__all__ = ["WideBlock", "WideResNet"]


class WideBlock(PreActBlock):
    """The basic block of :mod:`awp_optim.lab.models.preact` under the names usual here."""

    shortcut_name = "convShortcut"

    @staticmethod
    def make_shortcut(in_planes: int, out_planes: int, stride: int) -> nn.Module | None:
        """The projection itself."""
        return projection(in_planes, out_planes, stride)


def make_stages(
    block: Callable[..., nn.Module], name: str, depth: int, width: int, activation: Activation
) -> list[nn.Sequential]:
    """The three stages of a wide ResNet: blocks in a row, the first with the stride, if any.

    Each is a module with a single child, ``name``, for the usual parameter names.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth must be 6n + 4 with n at least 1 (10, 16, ...), got {depth}")
    stages = []
    planes = (16, 16 * width, 32 * width, 64 * width)
    for before, after, stride in zip(planes, planes[1:], (1, 2, 2), strict=False):
        first = block(before, after, stride, activation)
        rest = [block(after, after, 1, activation) for _ in range((depth - 4) // 6 - 1)]
        stages.append(nn.Sequential(OrderedDict({name: nn.Sequential(first, *rest)})))
    return stages


def initialize_layers(network: nn.Module, head: nn.Linear) -> None:
    """He's initialization of the convolutions, by the outputs; the head starts without a bias."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(head.bias)


class WideResNet(nn.Module):
    """WRN-depth-width without dropout; images in [0, 1] to logits.

    (N, in_channels, H, W) -> (N, num_classes), for any H and W: the pooling is global.

    Args:
        depth: Number of 3x3 convolutions and projections, 6n + 4: a stem of 16 channels and three
            stages of n blocks.
        width: k; the stages have 16k, 32k and 64k channels, and the second and third halve height
            and width.
        num_classes, in_channels, mean, std, activation: As in
            :func:`~awp_optim.lab.models.build_model`.
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
        check_sizes(width=width, num_classes=num_classes, in_channels=in_channels)
        self.activation = activation
        self.normalize = Normalize(mean, std, in_channels)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        stages = make_stages(WideBlock, "layer", depth, width, activation)
        self.block1, self.block2, self.block3 = stages
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        initialize_layers(self, self.fc)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv1(self.normalize(x))
        out = self.block3(self.block2(self.block1(out)))
        logits: Tensor = self.fc(self.activation(self.bn1(out)).mean((2, 3)))
        return logits
