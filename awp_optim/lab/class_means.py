"""The weights of classes in GKL: what the model predicted for each class in the last epoch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ClassMeans"]

TEMPERATURE = 4.0
"""The authors'; it evens the weights out."""


class ClassMeans(nn.Module):
    """The mean over each class of softmax(z / 4), with z the natural logits of training.

    A module, for its state dict: a run that resumes in the middle of an epoch needs both tensors.
    They are written in place, so that captured steps read the current values.

    Cui et al., "Decoupled Kullback-Leibler divergence loss" (NeurIPS 2024),
    https://arxiv.org/abs/2305.13948.

    Attributes:
        means: shape (C, C), a row for each class: those of the last epoch, in the first 1 / C.
        sums: of the current epoch, shape (C, C).
    """

    means: Tensor
    sums: Tensor

    def __init__(self, num_classes: int, device: torch.device) -> None:
        super().__init__()
        shape = num_classes, num_classes
        self.register_buffer("means", torch.full(shape, 1 / num_classes, device=device))
        self.register_buffer("sums", torch.zeros(shape, device=device))

    @staticmethod
    def sums_of(logits: Tensor, y: Tensor) -> Tensor:
        """A batch's sums: of the predictions for each class, shape (C, C).

        Args:
            logits: at the natural examples, shape (N, C).
            y: class indices, shape (N,), or probabilities, shape (N, C), by which examples count.
        """
        p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE).softmax(1)
        return (y if y.is_floating_point() else F.one_hot(y, p.shape[1])).to(p.dtype).T @ p

    def end_epoch(self) -> None:
        """Let the means be those of the current epoch; a class without examples keeps its own."""
        totals = self.sums.sum(1, keepdim=True)
        self.means.copy_(torch.where(totals > 0, self.sums / totals, self.means))
        self.sums.zero_()
