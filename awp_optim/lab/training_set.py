"""The training images of a run: the order of each epoch, and batches, augmented."""

from __future__ import annotations

import torch
from torch import Tensor

from awp_optim.lab.augment import cutout, mixup, random_crop_flip
from awp_optim.lab.config import Config
from awp_optim.lab.data import ImageData
from awp_optim.lab.order import epoch_order, split_batch, steps_per_epoch
from awp_optim.lab.pseudo import PseudoLabeled

__all__ = ["TrainingSet", "as_inputs"]


class TrainingSet:
    """Labeled and pseudo-labeled images on the device to train on, and how they become batches.

    Args:
        config: the run's settings.
        data: the labeled images.
        unlabeled: more images with labels that a classifier gave them, or None.

    Attributes:
        steps: batches in an epoch.
        last_batch: images in the last batch of an epoch.
        device: where the images are.
        epoch_images: images in the batches of an epoch, all together.
        generators: the random generators of the order and of the augmentation.

    Raises:
        ValueError: the pseudo-labeled images do not fit the data or the batch.
    """

    def __init__(self, config: Config, data: ImageData, unlabeled: PseudoLabeled | None) -> None:
        self._config = config
        self._num_classes = data.num_classes
        self._labeled = len(data.x_train)
        self._images = config.epoch_images or self._labeled
        self._x, self._y = data.x_train, data.y_train
        self.device = data.x_train.device
        self.steps = steps_per_epoch(self._images, config.batch_size)
        self.epoch_images = min(self._images, self.steps * config.batch_size)
        if unlabeled:
            unlabeled.check_fits(data)
            split_batch(config.batch_size, config.unlabeled_share)
            self._x = torch.cat([self._x, unlabeled.x.to(self.device)])
            self._y = torch.cat([self._y, unlabeled.y.to(self.device)])
            self.epoch_images = self.steps * config.batch_size
        self.last_batch = self.epoch_images - (self.steps - 1) * config.batch_size
        self._shuffler = torch.Generator().manual_seed(config.seed)
        self._augmenter = torch.Generator(self.device).manual_seed(config.seed)
        self.generators = (self._shuffler, self._augmenter)

    def shuffle(self) -> Tensor:
        """The order of an epoch: indices for :meth:`batch`, on the device."""
        return epoch_order(
            self._labeled,
            self._images,
            self._config.batch_size,
            self._shuffler,
            unlabeled=len(self._x) - self._labeled,
            share=self._config.unlabeled_share,
        ).to(self.device)

    def batch(self, order: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The batch of a step.

        Returns:
            Inputs in [0, 1]; their targets, which are labels, or probabilities with mixup; and
            their labels, with mixup the likelier ones.
        """
        config = self._config
        index = order[step * config.batch_size :][: config.batch_size]
        images, labels = self._x[index], self._y[index]
        if config.augment:
            images = random_crop_flip(images, generator=self._augmenter)
        if config.cutout:
            images = cutout(images, config.cutout, generator=self._augmenter)
        x = as_inputs(images)
        if not config.mixup:
            return x, labels, labels
        x, y = mixup(x, labels, self._num_classes, config.mixup, self._augmenter)
        return x, y, y.argmax(1)


def as_inputs(images: Tensor) -> Tensor:
    """uint8 images as inputs of a model: in [0, 1], in torch's default dtype as its weights are."""
    return images.to(torch.get_default_dtype(), memory_format=torch.channels_last) / 255
