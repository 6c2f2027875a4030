"""The weights of a network out of a file, to start another run from.

Hendrycks et al., "Using Pre-Training Can Improve Model Robustness and Uncertainty", 2019
(https://arxiv.org/abs/1901.09960): train adversarially on a large data set, put a new
classification head on, and fine-tune.

    model = build_model("wide_resnet28_10", num_classes=10, in_channels=3, mean=0.5, std=0.5)
    initialize(model, load_weights("imagenet_wrn_baseline_epoch_99.pt"))
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awp_optim.lab.data import _one_line
from awp_optim.lab.models import Normalize

__all__ = ["initialize", "load_checkpoint", "load_weights"]

ENTRIES = ("model", "state_dict", "model_state_dict", "net")
"""What a checkpoint may call its state dict."""


def load_checkpoint(file: str | os.PathLike[str]) -> dict[str, Any]:
    """All that a file of ``torch.save`` holds, tensors on the CPU.

    Only tensors and plain values are read, so that nothing in the file can run code.

    Raises:
        OSError: There is no such file, or it cannot be opened.
        ValueError: It is another kind of file, damaged, or holds other things.
    """
    path = Path(file).expanduser()
    with open(path, "rb") as stream:
        try:
            content = torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever the damage leads it to
            # Its own words advise to do without the protection.
            if found := re.search(r"GLOBAL (\S+)", str(error)):
                raise ValueError(
                    f"{path} holds {found[1]}, and only tensors and plain values are read: save "
                    "the network's state_dict() alone"
                ) from error
            raise ValueError(
                f"{path} is damaged, or not a file of torch.save: {_one_line(error)}"
            ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def load_weights(file: str | os.PathLike[str], *, ema: bool = False) -> dict[str, Tensor]:
    """A network's state dict: its tensors by name, on the CPU.

    The file is a checkpoint of this package (``best.pt``, ``last.pt``), a state dict by itself, or
    a dict that holds one as ``model``, ``state_dict``, ``model_state_dict`` or ``net``. What
    DataParallel, DistributedDataParallel, AveragedModel and torch.compile put before the names
    (``module.``, ``_orig_mod.``) is taken away.

    Args:
        file: Which.
        ema: Take the moving average of the weights, the entry ``ema`` of this package's
            checkpoints.

    Raises:
        OSError: There is no such file, or it cannot be opened.
        ValueError: It cannot be read, or holds no such state dict; the text names the file.
    """
    content = load_checkpoint(file)
    places = [content.get("ema")] if ema else [content, *(content.get(name) for name in ENTRIES)]
    weights = next((place for place in places if _is_state_dict(place)), None)
    if weights is None:
        there = ", ".join(map(str, list(content)[:8])) or "nothing"
        if ema:
            raise ValueError(
                f"{file} has no averaged weights, ema; it has {there}. Those come of a run with "
                "--ema"
            )
        raise ValueError(
            f"{file} has no state dict, by itself or as {', '.join(ENTRIES)}; it has {there}"
        )
    return _unwrapped(weights)


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names that the network itself gives them."""
    # torch.compile may have wrapped a part of the network only.
    plain = {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in weights.items()}
    while True:
        inner = {k: v for k, v in plain.items() if k != "n_averaged"}  # AveragedModel's counter
        if not inner or not all(name.startswith("module.") for name in inner):
            return plain
        plain = {name.removeprefix("module."): tensor for name, tensor in inner.items()}


@torch.no_grad()
def initialize(
    model: nn.Module, weights: Mapping[str, Tensor], *, new_head: bool = False
) -> list[str]:
    """Copy weights into a network, all but a head for another number of classes.

    The head is the network's last ``nn.Linear``. Where its weight and bias differ from the given
    ones in their first dimension, the number of classes, it stays as it was built.

    The statistics of :class:`~awp_optim.lab.models.Normalize` come with the weights, where one
    number may stand for all channels, and stay as they were built if the weights have none; so do
    BatchNorm's counters of batches. The published wide ResNets of TRADES and RST hold a second
    first block, ``sub_block1``, which never runs: it is passed over.

    Args:
        model: The network; its tensors are written to in place, wherever they are.
        weights: Tensors by name, such as :func:`load_weights` reads.
        new_head: Leave the head as it was built even if it fits.

    Returns:
        The names of the head's parameters if it stayed as it was built, else an empty list.

    Raises:
        ValueError: A tensor is missing, has no place in the network, is of another shape, or is
            not finite. Nothing was changed then.
    """
    own: dict[str, Tensor] = model.state_dict()
    weights = _without_copy(weights, own)
    head = _head(model)
    if new_head and not head:
        raise ValueError("the network has no nn.Linear, so no head to leave as it was built")
    fits_but_for_classes = all(
        name in weights and weights[name].shape[1:] == own[name].shape[1:] for name in head
    )
    other_classes = any(name in weights and weights[name].shape != own[name].shape for name in head)
    fresh = head if fits_but_for_classes and (new_head or other_classes) else []

    optional = _optional(model)
    shared = [name for name in own if name in weights]
    other_shape = [
        f"{name} ({tuple(weights[name].shape)} given, {tuple(own[name].shape)} in the network)"
        for name in shared
        if name not in fresh
        and weights[name].shape != own[name].shape
        and not (name in optional and weights[name].numel() == 1)
    ]
    problems = [
        _some("missing", [name for name in own if name not in weights and name not in optional]),
        _some("unexpected", [name for name in weights if name not in own]),
        _some("of another shape", other_shape),
    ]
    if any(problems):
        raise ValueError(
            "the weights do not fit the network: "
            + "; ".join(filter(None, problems))
            + ". Are they of the same architecture?"
        )
    infinite = [
        name
        for name, tensor in weights.items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if infinite:
        raise ValueError(f"the weights cannot be used: {_some('not finite', infinite)}")

    for name in shared:
        if name not in fresh:
            own[name].copy_(weights[name])
    return fresh


def _without_copy(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but the block of the published wide ResNets that their forward pass does not use."""

    def is_copy(name: str, tensor: Tensor) -> bool:
        original = own.get(name.removeprefix("sub_"))
        return (
            name.startswith("sub_block1.")
            and name not in own
            and original is not None
            and original.shape == tensor.shape
        )

    return {name: tensor for name, tensor in weights.items() if not is_copy(name, tensor)}


def _head(model: nn.Module) -> list[str]:
    """The names of the last linear layer's parameters."""
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        return []
    prefix, module = linear[-1]
    return [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]


def _optional(model: nn.Module) -> set[str]:
    """What weights may lack: networks were normalised outside, and counters are newer than some."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name, _ in module.named_buffers(recurse=False)
        if isinstance(module, Normalize) or name == "num_batches_tracked"
    }


def _some(what: str, names: Sequence[str], most: int = 4) -> str:
    """How many, and the first of them; nothing if there are none."""
    if not names:
        return ""
    shown = ", ".join([*names[:most], *(["..."] if len(names) > most else [])])
    return f"{len(names)} {what}: {shown}"
