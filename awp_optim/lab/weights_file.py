"""Weights as a safetensors file, with the settings of the run that trained them.

The format (https://github.com/huggingface/safetensors) holds tensors and text alone, so that
reading a file cannot run code. The text ``awp_optim`` is JSON: the ``version`` that wrote the file;
``averaged``, whether the weights are the moving average of a run; and ``config``: ``num_classes``,
``in_channels`` and all that ``config.json`` holds, such as ``arch``, ``activation``, ``dataset``,
``norm`` and ``eps``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import awp_optim
from awp_optim._utils.io import atomic_write
from awp_optim.lab.weights import sizes_of

__all__ = ["read_weights", "write_weights"]


def write_weights(
    file: Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    averaged: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a file of weights; a reader never finds a part of it.

    Args:
        file: The file, ``NAME.safetensors``.
        weights: The state dict of a network.
        config: The settings of its run, as its checkpoints hold them.
        averaged: Whether the weights are a moving average.
        dtype: Store matrices and filters as this, such as ``torch.bfloat16``, which halves the
            file; biases and the parameters and statistics of norm layers stay as they are.

    Raises:
        OSError: The file cannot be written.
    """
    tensors = {
        name: tensor.detach().to(
            "cpu",
            dtype if tensor.ndim in (2, 4) and tensor.is_floating_point() else None,
            copy=True,  # what shares memory could not be saved
            memory_format=torch.contiguous_format,
        )
        for name, tensor in weights.items()
    }
    about = {
        "version": awp_optim.__version__,
        "averaged": averaged,
        "config": {**config, **sizes_of(weights)},
    }
    # A single entry: several are written in any order, and equal weights would differ in bytes.
    content = save(tensors, {"awp_optim": json.dumps(about)})
    with atomic_write(file) as stream:
        stream.write(content)


def read_weights(file: Path) -> dict[str, Any]:
    """The content of a safetensors file as that of a checkpoint: ``model``, ``config``, ``ema``.

    Floating-point tensors are read as float32. In a file of another program, ``config``
    is None.

    Raises:
        ValueError: The file is damaged, or not a safetensors file.
    """
    try:
        with safe_open(file, "pt") as content:
            weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            metadata = content.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or not a safetensors file ({error})") from None
    weights = {k: t.float() if t.is_floating_point() else t for k, t in weights.items()}
    about = json.loads(metadata.get("awp_optim", "{}"))
    checkpoint = {"model": weights, "config": about.get("config")}
    return {**checkpoint, "ema": weights} if about.get("averaged") else checkpoint
