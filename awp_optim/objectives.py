"""What adversarial training minimises, as functions of logits.

Lower-case functions are the losses, means over the batch. The classes of the same name in capitals
bundle a loss with its settings and with what a training step must know about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor

__all__ = ["AT", "Objective", "at"]


def at(logits_adv: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of adversarial examples: Eq. (1) of the paper with Madry et al.'s loss.

    Args:
        logits_adv: shape (N, C), the logits at the adversarial examples.
        y: shape (N,), class indices.

    Returns:
        A scalar, the mean over the batch.

    Example:
        >>> import torch
        >>> at(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
        tensor(0.6931)
    """
    return F.cross_entropy(logits_adv, y)


class Objective(Protocol):
    """A loss of the logits at adversarial and, where it needs them, at natural examples."""

    needs_natural: ClassVar[bool]
    """Whether the loss also looks at the logits of the unperturbed inputs."""

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class AT:
    """Adversarial training (Madry et al., 2018): cross-entropy of adversarial examples."""

    needs_natural: ClassVar[bool] = False

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor:
        return at(logits_adv, y)
