"""Robust self-training with part of the labels: the rest are given by a classifier of its own.

Carmon et al., "Unlabeled data improves adversarial robustness" (NeurIPS 2019), stage one: train
naturally on the labelled images, label the others; stage two is the method "rst".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from awp_optim.lab.config import Config
from awp_optim.lab.data import ImageData
from awp_optim.lab.distributed import TrainingRanks
from awp_optim.lab.pseudo import PseudoLabeled, pseudo_label
from awp_optim.lab.trainer import check, fit

__all__ = ["natural", "pseudo_label_rest"]


def natural(config: Config) -> Config:
    """The same run without an adversary: cross-entropy on the images as they are."""
    return replace(
        config,
        method="at",
        gamma=0.0,
        ascent="exact",
        eps=0.0,
        epoch_images=0,
        ema=0.0,
        mixup=0.0,
        eval_every=config.epochs,
        patience=0,
    )


def pseudo_label_rest(
    config: Config,
    data: ImageData,
    labeled: int,
    out: Path | str | None = None,
    *,
    init: Mapping[str, Tensor] | None = None,
    resume: bool = False,
    on_step: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[ImageData, PseudoLabeled, float] | None:
    """Keep the labels of some training images, and have the others labelled by a classifier.

    The classifier is the run's network, trained naturally for as many epochs on the images that
    keep their labels; the weights at the end are taken, so no test image has a say.

    Args:
        config: the run that the labels are for; images that it holds out are held out here, too.
        data: all of the data.
        labeled: training images that keep their labels, those of ``data.limit(labeled)``.
        out, resume, on_step, stop: as in :func:`~awp_optim.lab.trainer.fit`, of the classifier.
        init: what the run will start from; looked at before hours are spent.

    Returns:
        The data with the labelled images alone; the others with the labels they were given; the
        share of those that are right. None if ``stop`` ended the training of the classifier.

    Raises:
        ValueError: no image would be left on one of the sides; or the run could not be done.
        Exception: what ``fit`` raises.
    """
    rest, _ = data.split(labeled)
    kept = data.limit(labeled)  # the very images that the split held out
    blank = PseudoLabeled(rest.x_train, torch.zeros_like(rest.y_train))
    check(config, kept, unlabeled=blank, init=init)
    model, rows = fit(natural(config), kept, out, resume=resume, on_step=on_step, stop=stop)
    if len(rows) < config.epochs:
        return None
    # All ranks have the same model, but the labels must be the same to the last.
    y = TrainingRanks().first(lambda: pseudo_label(model, rest.x_train).y.cpu())
    pseudo = PseudoLabeled(rest.x_train, y.to(rest.x_train.device))
    return kept, pseudo, (pseudo.y == rest.y_train).double().mean().item()
