"""Which images a training epoch shows, in which order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["epoch_order", "steps_per_epoch"]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches in an epoch of so many images.

    BatchNorm cannot train on a single example: one left over is dropped, each epoch another.
    """
    return max(1, math.ceil((images - 1) / batch_size))


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

    Without unlabelled images it is a permutation, or as many of them one after another as
    ``images`` asks for. With them every batch has ``round(share * batch_size)`` of them at its end,
    in the manner of Carmon et al. (2019); both kinds are gone through in permutations of their own.

    Args:
        labeled: how many labelled images there are: those of index 0 to ``labeled - 1``.
        images: how many images an epoch has; with unlabelled ones rounded up to whole batches.
        batch_size: images a step.
        generator: source of the random numbers, on the CPU.
        unlabeled: how many unlabelled images there are: those of index ``labeled`` on.
        share: of a batch, the share of the unlabelled.

    Returns:
        int64, on the CPU.

    Raises:
        ValueError: the share leaves a batch without images of one of the kinds.
    """
    if not unlabeled:
        return _permutations(labeled, images, generator)
    of_unlabeled = round(share * batch_size)
    if not 0 < of_unlabeled < batch_size:
        raise ValueError(
            f"a share of {share:g} of a batch of {batch_size} is {of_unlabeled} unlabelled images: "
            "a batch must have images of both kinds"
        )
    batches = steps_per_epoch(images, batch_size)
    of_labeled = batch_size - of_unlabeled
    first = _permutations(labeled, batches * of_labeled, generator)
    second = _permutations(unlabeled, batches * of_unlabeled, generator) + labeled
    return torch.cat([first.view(batches, -1), second.view(batches, -1)], 1).flatten()


def _permutations(n: int, count: int, generator: torch.Generator) -> Tensor:
    """The first ``count`` of permutations of n, one after another."""
    whole = [torch.randperm(n, generator=generator) for _ in range(math.ceil(count / n))]
    return torch.cat(whole)[:count]
