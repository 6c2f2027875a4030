"""Which images a training epoch shows, in which order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["epoch_order", "split_batch", "steps_per_epoch"]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches in an epoch of so many images.

    A last batch of a single image is dropped, each epoch another one: BatchNorm cannot train on it.
    """
    if batch_size == 1:
        return images
    return max(1, math.ceil((images - 1) / batch_size))


def split_batch(batch_size: int, unlabeled_share: float) -> tuple[int, int]:
    """How many labeled and how many unlabeled images a batch has.

    Raises:
        ValueError: there would be none of one kind.
    """
    unlabeled = round(unlabeled_share * batch_size)
    if not 0 < unlabeled < batch_size:
        raise ValueError(
            f"a share of {unlabeled_share:g} of a batch of {batch_size} is {unlabeled} unlabeled "
            "images: a batch must have images of both kinds"
        )
    return batch_size - unlabeled, unlabeled


def epoch_order(
    labeled: int,
    images: int,
    batch_size: int,
    generator: torch.Generator,
    *,
    unlabeled: int = 0,
    share: float = 0.5,
) -> Tensor:
    """Indices of an epoch's images, batch after batch.

    Without unlabeled images it is a permutation, or as many of them one after another as ``images``
    needs. With unlabeled images every batch ends with ``round(share * batch_size)`` of them, as in
    Carmon et al. (2019); each kind is drawn from permutations of its own.

    Args:
        labeled: number of labeled images, which have the indices 0 to ``labeled - 1``.
        images: images in an epoch; with unlabeled ones rounded up to full batches.
        batch_size: images in a step.
        generator: source of the random numbers, on the CPU.
        unlabeled: number of unlabeled images, which have the indices from ``labeled`` on.
        share: share of a batch that is unlabeled.

    Returns:
        int64, on the CPU.

    Raises:
        ValueError: a batch would have no image of one kind.
    """
    if not unlabeled:
        return _permutations(labeled, images, generator)
    batches = steps_per_epoch(images, batch_size)
    per_batch = split_batch(batch_size, share)
    first = _permutations(labeled, batches * per_batch[0], generator)
    second = _permutations(unlabeled, batches * per_batch[1], generator) + labeled
    return torch.cat([first.view(batches, -1), second.view(batches, -1)], 1).flatten()


def _permutations(n: int, count: int, generator: torch.Generator) -> Tensor:
    """The first ``count`` indices of random permutations of n, one after another."""
    permutations = [torch.randperm(n, generator=generator) for _ in range(math.ceil(count / n))]
    return torch.cat(permutations)[:count]
