"""Robust self-training with part of the labels: a classifier gives the other images theirs.

Carmon et al., "Unlabeled data improves adversarial robustness" (NeurIPS 2019), stage one: train
naturally on the labeled images, then label the others; stage two is the method "rst".
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
    """The same run without an adversary: the cross-entropy of the clean images."""
    return replace(
        config,
        method="at",
        gamma=0.0,
        ascent="exact",
        eps=0.0,
        epoch_images=0,
        ema=0.0,
        ema_start=0,
        ema_warmup=False,
        mixup=0.0,
        cutmix=0.0,
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
    """Keep the labels of some training images, and let a classifier label the others.

    The classifier is the network of the run, trained naturally for the same number of epochs on
    the images that keep their labels. Its last weights are taken, so no test image selects them.

    Args:
        config: The run that needs the labels; images that it holds out are held out here, too.
        data: The full data set.
        labeled: Number of training images that keep their labels, those of ``data.limit(labeled)``.
        out: Folder of the classifier's run, as in :func:`~awp_optim.lab.trainer.fit`.
        init: The weights from which the run will start, which are checked before the classifier is
            trained.
        resume: As in :func:`~awp_optim.lab.trainer.fit`.
        on_step: As in :func:`~awp_optim.lab.trainer.fit`.
        stop: As in :func:`~awp_optim.lab.trainer.fit`.

    Returns:
        The data with the labeled images only; the other images with the labels they were given;
        the share of these labels that are right. None if ``stop`` ended the classifier's training.

    Raises:
        ValueError: No image would be left on one of the sides, or the run is not possible.
        Exception: Whatever ``fit`` raises.
    """
    rest, _ = data.split(labeled)
    kept = data.limit(labeled)  # the images that the split held out
    blank = PseudoLabeled(rest.x_train, torch.zeros_like(rest.y_train))
    check(config, kept, unlabeled=blank, init=init)
    model, rows = fit(natural(config), kept, out, resume=resume, on_step=on_step, stop=stop)
    if len(rows) < config.epochs:
        return None
    # The ranks have the same model, but rounding could give them different labels.
    y = TrainingRanks().first(lambda: pseudo_label(model, rest.x_train).y.cpu())
    pseudo = PseudoLabeled(rest.x_train, y.to(rest.x_train.device))
    return kept, pseudo, (pseudo.y == rest.y_train).double().mean().item()
