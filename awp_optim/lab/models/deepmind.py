"""Wide residual networks in DeepMind's layout, that of today's best published checkpoints.

Gowal et al., "Uncovering the Limits of Adversarial Training against Norm-Bounded Adversarial
Examples", 2020 (https://arxiv.org/abs/2010.03593), and after it Rebuffi et al., 2021, Wang et al.,
2023 (https://arxiv.org/abs/2302.04638), and Bartoldson et al., 2024. It differs from
:mod:`awp_optim.lab.models.wide` in the names of parameters (``init_conv``,
``layer.0.block.0.conv_0``, ..., ``logits``), in the activation, and in that convolutions with a
stride pad as TensorFlow's "SAME": below and on the right alone, if the size is even.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from awp_optim.lab.models.common import Activation, Normalize, check_sizes
from awp_optim.lab.models.preact import projection
from awp_optim.lab.models.wide import initialize_layers, make_stages

__all__ = ["DeepMindBlock", "DeepMindWideResNet"]

STATISTICS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Mean and std of CIFAR-10 and CIFAR-100, which the published networks normalize with."""


class DeepMindBlock(nn.Module):
    """The block of :mod:`awp_optim.lab.models.wide`, but for names and padding.

    (N, in_planes, H, W) -> (N, planes, H / stride, W / stride), rounded up.
    """

    def __init__(
        self, in_planes: int, planes: int, stride: int = 1, activation: Activation = F.silu
    ) -> None:
        super().__init__()
        self.activation = activation
        self.batchnorm_0 = nn.BatchNorm2d(in_planes)
        padding = 1 if stride == 1 else 0  # else forward pads
        self.conv_0 = nn.Conv2d(in_planes, planes, 3, stride, padding, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(planes)
        self.conv_1 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut = projection(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        if self.conv_0.stride[0] == 2:
            height, width = out.shape[-2:]
            out = F.pad(out, (width % 2, 1, height % 2, 1))
        out = self.conv_0(out)
        out = self.conv_1(self.activation(self.batchnorm_1(out)))
        return out + shortcut


class DeepMindWideResNet(Normalize):
    """WRN-depth-width in DeepMind's layout; images in [0, 1] to logits.

    (N, in_channels, H, W) -> (N, num_classes), for any H and W: the pooling is global. The network
    is its own :class:`~awp_optim.lab.models.Normalize`, as published: checkpoints may hold ``mean``
    and ``std`` beside the layers.

    Args:
        depth, width: As for :class:`~awp_optim.lab.models.WideResNet`.
        mean: As in :func:`~awp_optim.lab.models.build_model`; None for that of CIFAR-100 with 100
            classes, else of CIFAR-10.
        std: The same; give both or none.
        num_classes, in_channels, activation: As in :func:`~awp_optim.lab.models.build_model`.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        activation: Activation = F.silu,
    ) -> None:
        check_sizes(width=width, num_classes=num_classes, in_channels=in_channels)
        if mean is None or std is None:
            mean, std = STATISTICS.get(num_classes, STATISTICS[10])
        super().__init__(mean, std, in_channels)
        self.activation = activation
        self.init_conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer = nn.Sequential(*make_stages(DeepMindBlock, "block", depth, width, activation))
        self.batchnorm = nn.BatchNorm2d(64 * width)
        self.logits = nn.Linear(64 * width, num_classes)
        initialize_layers(self, self.logits)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(self.init_conv(super().forward(x)))
        logits: Tensor = self.logits(self.activation(self.batchnorm(out)).mean((2, 3)))
        return logits
