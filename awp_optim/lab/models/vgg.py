"""VGG networks for small images.

Simonyan & Zisserman, "Very Deep Convolutional Networks", 2015 (https://arxiv.org/abs/1409.1556),
with BatchNorm and one linear layer at the end, as is usual for 32x32 images; names ``features.0``,
..., ``classifier`` and torch's default initialization.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from awp_optim.lab.models.common import Activation, Normalize, check_sizes

__all__ = ["VGG"]


class VGG(nn.Module):
    """A VGG with BatchNorm and one linear layer at the end; images in [0, 1] to logits.

    (N, in_channels, H, W) -> (N, num_classes), for any H and W: what the last stage leaves of the
    image, one pixel for 32x32 and five stages, is averaged.

    Args:
        convs: Number of 3x3 convolutions (each with a bias, BN and the activation) of each stage.
            Stage i has ``width * 2**i`` channels, at most ``8 * width``, and ends with a 2x2
            max-pool, which keeps the last row and column of odd sizes.
        width: Channels of the first stage.
        num_classes, in_channels, mean, std, activation: As in
            :func:`~awp_optim.lab.models.build_model`.
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
        check_sizes(convs=convs, width=width, num_classes=num_classes, in_channels=in_channels)
        self.normalize = Normalize(mean, std, in_channels)
        layers: list[nn.Module] = []
        planes = in_channels
        for i, n in enumerate(convs):
            out = width * min(2**i, 8)
            for _ in range(n):
                layers.append(nn.Conv2d(planes, out, 3, padding=1))
                layers += [nn.BatchNorm2d(out), _ActivationLayer(activation)]
                planes = out
            # Rounded up, so that no image is too small.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.features(self.normalize(x))
        logits: Tensor = self.classifier(out.mean((2, 3)))
        return logits


class _ActivationLayer(nn.Module):
    """Any activation as a layer."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x)
