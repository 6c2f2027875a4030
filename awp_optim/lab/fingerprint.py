"""A short text that tells the data and the initial weights of a run from others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from awp_optim.lab.data import ImageData
from awp_optim.lab.pseudo import PseudoLabeled

__all__ = ["describe_inputs"]


def describe_inputs(
    data: ImageData, unlabeled: PseudoLabeled | None, init: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """What a run starts from, as ``config.json`` records it beside the settings."""
    return {
        "dataset": data.name,
        "train_images": len(data.x_train),
        "test_images": len(data.x_test),
        "unlabeled_images": len(unlabeled) if unlabeled else 0,
        "init": None if init is None else _fingerprint(init),
        "data": _fingerprint(_samples(data, unlabeled)),
    }


def _samples(data: ImageData, unlabeled: PseudoLabeled | None) -> dict[str, Tensor]:
    """All labels, and a thousand images of each part: enough to tell data from other data."""
    parts = {"train": (data.x_train, data.y_train), "test": (data.x_test, data.y_test)}
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
