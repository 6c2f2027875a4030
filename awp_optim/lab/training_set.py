"""The training images of a run: their order in each epoch, batches, augmentation, fingerprint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from awp_optim.lab.augment import cutmix, cutout, mixup, random_crop_flip
from awp_optim.lab.config import Config
from awp_optim.lab.data import ImageData
from awp_optim.lab.data.stored import StoredImages
from awp_optim.lab.distributed import TrainingRanks
from awp_optim.lab.idbh import SMALLEST, idbh_weak
from awp_optim.lab.prefetch import prefetched
from awp_optim.lab.pseudo import PseudoLabeled

__all__ = [
    "TrainingSet",
    "as_inputs",
    "describe_inputs",
    "epoch_order",
    "split_batch",
    "steps_per_epoch",
]


MANY = 1 << 20
"""Indices of which an epoch draws those it needs, instead of a permutation."""


class TrainingSet:
    """Labeled and pseudo-labeled images, and how they become batches.

    The labeled images are on the device to train on. The others stay on the host, in memory or in
    files, and a thread reads those of the next batches.

    Args:
        config: the run's settings.
        data: the labeled images.
        unlabeled: more images with labels that a classifier gave them, or None.
        ranks: the processes that train; each reads its share of the unlabeled images of a batch.

    Attributes:
        steps: batches in an epoch.
        last_batch: images in the last batch of an epoch.
        device: where the batches are.
        epoch_images: images in the batches of an epoch, all together.
        generators: the random generators of the order and of the augmentation.

    Raises:
        ValueError: the pseudo-labeled images do not fit the data or the batch, or the images are
            too small for the augmentation.
    """

    def __init__(
        self,
        config: Config,
        data: ImageData,
        unlabeled: PseudoLabeled | None,
        ranks: TrainingRanks,
    ) -> None:
        if config.idbh and min(data.x_train.shape[2:]) < SMALLEST:
            raise ValueError(f"idbh needs images at least {SMALLEST} pixels wide and high")
        self._config, self._ranks = config, ranks
        self._num_classes = data.num_classes
        self._images = config.epoch_images or len(data.x_train)
        self._x, self._y = data.x_train, data.y_train
        self._unlabeled = unlabeled.cpu() if unlabeled else None
        self.device = data.x_train.device
        self.steps = steps_per_epoch(self._images, config.batch_size)
        self.epoch_images = min(self._images, self.steps * config.batch_size)
        if unlabeled:
            unlabeled.check_fits(data)
            split_batch(config.batch_size, config.unlabeled_share)
            self.epoch_images = self.steps * config.batch_size
        self.last_batch = self.epoch_images - (self.steps - 1) * config.batch_size
        self._shuffler = torch.Generator().manual_seed(config.seed)
        self._augmenter = torch.Generator(self.device).manual_seed(config.seed)
        self.generators = (self._shuffler, self._augmenter)

    def shuffle(self) -> Tensor:
        """The order of an epoch: indices for :meth:`batches`, on the device."""
        return epoch_order(
            len(self._x),
            self._images,
            self._config.batch_size,
            self._shuffler,
            unlabeled=len(self._unlabeled) if self._unlabeled else 0,
            share=self._config.unlabeled_share,
        ).to(self.device)

    def batches(self, order: Tensor, first: int) -> Generator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of an epoch from the step ``first`` on; close it to end the thread.

        Random numbers are drawn when a batch is asked for, so that a run can stop after any of
        them and be continued.

        Yields:
            Inputs in [0, 1]; their targets, which are labels, or probabilities with mixup or
            CutMix; and their labels, with these the likelier ones.
        """
        batches = torch.split(order, self._config.batch_size)[first : self.steps]
        if not self._unlabeled:
            for index in batches:
                yield self._augmented(self._x[index], self._y[index])
        elif batches:
            labeled, unlabeled = split_batch(self._config.batch_size, self._config.unlabeled_share)
            ours, others = torch.split(torch.stack(batches), [labeled, unlabeled], 1)
            with closing(self._read(self._unlabeled, others.cpu() - len(self._x))) as read:
                for index, (images, labels) in zip(ours, read, strict=True):
                    x, y = self._x[index], self._y[index]
                    yield self._augmented(torch.cat([x, images]), torch.cat([y, labels]))

    def _read(self, source: PseudoLabeled, batches: Tensor) -> Generator[tuple[Tensor, Tensor]]:
        """Images and labels for each row of indices, on the device."""
        n = batches.shape[1]
        own = batches[:, self._ranks.share(n)]
        labels = source.y[batches].to(self.device)
        on_gpu = self.device.type == "cuda"
        # Memory is pinned here, not in the thread: a CUDA graph may be captured meanwhile.
        jobs = (
            partial(source.read, index, source.empty(len(index), pin_memory=on_gpu))
            for index in own
        )
        with closing(prefetched(jobs)) as read:
            for images, y in zip(read, labels, strict=True):
                images = images.to(self.device, non_blocking=True)
                yield self._ranks.assemble(images, n), y

    def _augmented(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of images and labels as :meth:`batches` yields it."""
        config = self._config
        if config.idbh:
            images = idbh_weak(images, self._augmenter)
        elif config.augment:
            images = random_crop_flip(images, generator=self._augmenter)
        if config.cutout:
            images = cutout(images, config.cutout, generator=self._augmenter)
        x = as_inputs(images)
        if config.cutmix:
            x, y = cutmix(x, labels, self._num_classes, config.cutmix, self._augmenter)
        elif config.mixup:
            x, y = mixup(x, labels, self._num_classes, config.mixup, self._augmenter)
        else:
            return x, labels, labels
        return x, y, y.argmax(1)


def as_inputs(images: Tensor) -> Tensor:
    """uint8 images as inputs of a model: in [0, 1], in torch's default dtype as its weights are.

    They are channels_last, in which convolutions are fastest.
    """
    return images.to(torch.get_default_dtype(), memory_format=torch.channels_last) / 255


# --- The order of an epoch --------------------------------------------------------------------


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
    """The first ``count`` indices of random permutations of n, one after another.

    A part of a permutation of millions is drawn without the rest, which would take seconds.
    """
    if n > max(MANY, 4 * count):
        return _distinct(n, count, generator)
    permutations = [torch.randperm(n, generator=generator) for _ in range(math.ceil(count / n))]
    return torch.cat(permutations)[:count]


def _distinct(n: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different indices below n in random order, for a count far below n."""
    indices = torch.randint(n, (count,), generator=generator)
    while True:
        values, position = indices.sort(stable=True)
        again = position[1:][values[1:] == values[:-1]]  # where a value is not for the first time
        if not len(again):
            return indices
        indices[again] = torch.randint(n, (len(again),), generator=generator)


# --- What a run starts from -------------------------------------------------------------------


def describe_inputs(
    data: ImageData, unlabeled: PseudoLabeled | None, init: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """What a run starts from, as ``config.json`` records it beside the settings.

    The digest "data" covers all labels and a thousand images of each part, so that it takes seconds
    for 154 GB of images; another image alone among these would not be noticed. Where the files are,
    and what they are called, does not matter.
    """
    return {
        "dataset": data.name,
        "train_images": len(data.x_train),
        "balanced": data.is_balanced_subset,
        "test_images": len(data.x_test),
        "unlabeled_images": len(unlabeled) if unlabeled else 0,
        "init": None if init is None else _fingerprint(init),
        "data": _fingerprint(_samples(data, unlabeled)),
    }


def _samples(data: ImageData, unlabeled: PseudoLabeled | None) -> dict[str, Tensor]:
    """All labels, and a thousand images of each part: enough to tell two data sets apart."""
    parts: dict[str, tuple[Tensor | StoredImages, Tensor]] = {
        "train": (data.x_train, data.y_train),
        "test": (data.x_test, data.y_test),
    }
    if unlabeled:
        parts["unlabeled"] = unlabeled.x, unlabeled.y
    samples = {f"y_{name}": y for name, (_, y) in parts.items()}
    return samples | {f"x_{name}": x[:: -(-len(x) // 1000)] for name, (x, _) in parts.items()}


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
