"""Comparison of adversarial examples of the same clean example."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from awp_optim.attacks.losses import Loss


class Outcome(NamedTuple):
    """The result for each example, in two tensors of shape (N,)."""

    fooled: Tensor
    """Whether it is misclassified."""
    loss: Tensor

    def worse_than(self, other: Outcome) -> Tensor:
        """Where this outcome is worse for the defender: misclassified, or else a higher loss."""
        higher = self.loss > other.loss
        return (self.fooled & ~other.fooled) | ((self.fooled == other.fooled) & higher)

    def replace(self, where: Tensor, by: Outcome) -> Outcome:
        """This outcome, replaced by ``by`` where the condition, shape (N,), holds."""
        return Outcome(
            torch.where(where, by.fooled, self.fooled), torch.where(where, by.loss, self.loss)
        )


def judge(logits: Tensor, y: Tensor, loss: Loss) -> Outcome:
    """The outcome at adversarial examples with these logits.

    Args:
        logits: shape (N, C).
        y: class indices; or probabilities, in which case the most probable class counts.
        loss: a function of the logits and ``y``.
    """
    classes = y.argmax(1) if y.is_floating_point() else y
    return Outcome(logits.argmax(1) != classes, comparable(loss(logits, y)))


def comparable(losses: Tensor) -> Tensor:
    """The losses with NaN as -inf, so that NaN loses every comparison."""
    return losses.nan_to_num(nan=-torch.inf)


def select(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Each example from ``a`` where the condition, shape (N,), holds, otherwise from ``b``."""
    return torch.where(condition.view(-1, *[1] * (a.ndim - 1)), a, b)
