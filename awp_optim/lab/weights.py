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
from typing import Any

import torch
from torch import Tensor, nn

from awp_optim.lab.models import Normalize
from awp_optim.lab.shipped import locate

__all__ = ["initialize", "load_checkpoint", "load_weights", "sizes_of", "state_dict_of"]

ENTRIES = ("model", "state_dict", "model_state_dict", "net")
"""Names under which a checkpoint may hold its state dict."""
WRAPPERS = ("module.", "0.")
"""Prefixes of DataParallel and its like, and of a Sequential that holds the network alone."""


# --- From a file ------------------------------------------------------------------------------


def load_checkpoint(
    file: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The content of a file of ``torch.save``, with its tensors on a device.

    Only tensors and plain values are read, so nothing in the file can run code. A ``.safetensors``
    file, or a network that ships with the package, has the content that
    :func:`~awp_optim.lab.weights_file.read_weights` returns, on the CPU.

    Raises:
        OSError: There is no such file, or it cannot be opened.
        ValueError: It is a file of another kind, damaged, or holds other objects.
    """
    path = locate(file)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it, as {path / 'best.pt'}")
    if path.suffix == ".safetensors":
        from awp_optim.lab.weights_file import read_weights

        return read_weights(path)
    with open(path, "rb") as stream:
        try:
            content = torch.load(stream, map_location=device, weights_only=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # torch raises whatever the damage leads it to
            found = re.search(r"GLOBAL (\S+)", str(error))
            problem = (
                f"{path} holds {found[1]}, and only tensors and plain values are read: save the "
                "network's state_dict() alone"
                if found
                else f"{path} is damaged, or not a file of torch.save"
            )
            # torch's own message advises to read the file without the protection.
            raise ValueError(problem) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def load_weights(file: str | os.PathLike[str], *, ema: bool = False) -> dict[str, Tensor]:
    """The state dict of a network: its tensors by name, on the CPU.

    The file is a checkpoint of this package (``best.pt``, ``last.pt``), a state dict, a dict that
    holds one as ``model``, ``state_dict``, ``model_state_dict`` or ``net``, or a ``.safetensors``
    file. The prefixes of DataParallel, DistributedDataParallel, AveragedModel, torch.compile and a
    Sequential of one (``module.``, ``_orig_mod.``, ``0.``) are removed from the names.

    Args:
        file: The file, or the name of a network that ships with the package.
        ema: Take the moving average of the weights, the entry ``ema`` of this package's
            checkpoints.

    Raises:
        OSError: There is no such file, or it cannot be opened.
        ValueError: It cannot be read, or holds no such state dict; the message names the file.
    """
    return state_dict_of(load_checkpoint(file), file, ema=ema)


def state_dict_of(
    content: Mapping[str, Any], file: str | os.PathLike[str], *, ema: bool = False
) -> dict[str, Tensor]:
    """What :func:`load_weights` returns, from the content of the file."""
    places = [content.get("ema")] if ema else [content, *(content.get(name) for name in ENTRIES)]
    weights = next((place for place in places if _is_state_dict(place)), None)
    if weights is None:
        there = ", ".join(map(str, list(content)[:8])) or "nothing"
        if ema:
            raise ValueError(
                f"{file} has no averaged weights, ema; it has {there}. Runs with --ema save them"
            )
        raise ValueError(
            f"{file} is no state dict and has none as {', '.join(ENTRIES)}; it has {there}"
        )
    return _without_prefixes(weights)


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The ``in_channels`` of the first convolution and the ``num_classes`` of the head, if any."""
    filters = [tensor for tensor in weights.values() if tensor.ndim == 4]
    matrices = [tensor for tensor in weights.values() if tensor.ndim == 2]
    sizes = {"in_channels": filters[0].shape[1]} if filters else {}
    return {**sizes, "num_classes": len(matrices[-1])} if matrices else sizes


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _without_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that the network itself gives them."""
    # torch.compile may have wrapped only a part of the network.
    plain = {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in weights.items()}
    while True:
        inner = {k: v for k, v in plain.items() if k != "n_averaged"}  # AveragedModel's counter
        wrapper = next((w for w in WRAPPERS if all(n.startswith(w) for n in inner)), None)
        if not inner or wrapper is None:
            return plain
        plain = {name.removeprefix(wrapper): tensor for name, tensor in inner.items()}


# --- Into a network ---------------------------------------------------------------------------


@torch.no_grad()
def initialize(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Copy weights into a network, except a head for another number of classes.

    The head is the last ``nn.Linear`` of the network. If its weight and bias differ from the given
    ones only in their first dimension, the number of classes, it stays as it was built.

    Weights may lack the statistics of :class:`~awp_optim.lab.models.Normalize` and the batch
    counters of BatchNorm; those of the network are then kept. Given statistics may be one number
    for all channels. The published wide ResNets of TRADES and RST hold an unused copy of their
    first block, ``sub_block1``, which is ignored.

    Args:
        model: The network; its tensors are written to in place, on any device.
        weights: Tensors by name, such as :func:`load_weights` reads.

    Returns:
        The names of the head's parameters if it stayed as it was built, else an empty list.

    Raises:
        ValueError: A tensor is missing, has no place in the network, has another shape, or is not
            finite. Then nothing was changed.
    """
    own: dict[str, Tensor] = model.state_dict()
    given = {name: t for name, t in weights.items() if not _is_unused(name, t, own)}
    fresh = _head_for_other_classes(model, own, given)
    _check_fit(own, given, fresh, _optional(model))
    _check_finite(given)
    for name, tensor in own.items():
        if name in given and name not in fresh:
            tensor.copy_(given[name])
    return fresh


def _is_unused(name: str, tensor: Tensor, own: Mapping[str, Tensor]) -> bool:
    """Whether a tensor belongs to the unused copy of a published wide ResNet's first block."""
    original = own.get(name.removeprefix("sub_"))
    return (
        name.startswith("sub_block1.")
        and name not in own
        and original is not None
        and original.shape == tensor.shape
    )


def _head_for_other_classes(
    model: nn.Module, own: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> list[str]:
    """The names of the head's parameters if they fit except for the number of classes."""
    head = _head(model)
    shapes = [(given[name].shape, own[name].shape) for name in head if name in given]
    same_features = len(shapes) == len(head) and all(a[1:] == b[1:] for a, b in shapes)
    other_classes = any(a != b for a, b in shapes)
    return head if same_features and other_classes else []


def _head(model: nn.Module) -> list[str]:
    """The names of the last linear layer's parameters."""
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in linear[-1:]
        for name, _ in module.named_parameters(recurse=False)
    ]


def _optional(model: nn.Module) -> set[str]:
    """The buffers that weights may lack."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name, _ in module.named_buffers(recurse=False)
        if isinstance(module, Normalize) or name == "num_batches_tracked"
    }


def _check_fit(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], fresh: Sequence[str], optional: set[str]
) -> None:
    """Check that names and shapes are those of the network."""

    def fits(name: str) -> bool:
        one_for_all = name in optional and given[name].numel() == 1
        return name in fresh or given[name].shape == own[name].shape or one_for_all

    problems = [
        _some("missing", [name for name in own if name not in given and name not in optional]),
        _some("unexpected", [name for name in given if name not in own]),
        _some(
            "of another shape",
            [
                f"{name} ({tuple(given[name].shape)} given, {tuple(own[name].shape)} needed)"
                for name in own
                if name in given and not fits(name)
            ],
        ),
    ]
    if any(problems):
        raise ValueError(
            f"the weights do not fit the network: {'; '.join(filter(None, problems))}. Do they "
            "belong to the same architecture?"
        )


def _check_finite(given: Mapping[str, Tensor]) -> None:
    infinite = [n for n, t in given.items() if t.is_floating_point() and not t.isfinite().all()]
    if infinite:
        raise ValueError(f"the weights cannot be used: {_some('not finite', infinite)}")


def _some(what: str, names: Sequence[str], most: int = 4) -> str:
    """The number of names and the first of them; an empty string if there are none."""
    if not names:
        return ""
    shown = ", ".join([*names[:most], *(["..."] if len(names) > most else [])])
    return f"{len(names)} {what}: {shown}"
