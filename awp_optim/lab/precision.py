"""The precision of a run whose settings say "auto": bfloat16 where the machine computes in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from awp_optim.lab.config import Config, Precision

__all__ = ["resolve_precision"]

_TRANSFORMERS = ("torchvision/maxvit", "torchvision/swin", "torchvision/vit")
"""How the names of networks begin that are not convolutional."""


def resolve_precision(
    config: Config, device: torch.device, folder: Path | str | None = None
) -> Config:
    """The settings with "float32" or "bfloat16" in place of the precision "auto".

    On a GPU, bfloat16 from NVIDIA's Ampere generation on (compute capability 8.0), and on AMD's. On
    a CPU, bfloat16 if the network is convolutional and the CPU has matrix instructions for it (AMX,
    AVX512-BF16): others emulate it, which is slower than float32. Otherwise float32.

    Args:
        config: the settings.
        device: the device to train on.
        folder: a run folder that is to be continued. If it holds a run, its precision is kept, so
            that a run can move to another machine.
    """
    if config.precision != "auto":
        return config
    saved = None if folder is None else _saved_precision(Path(folder))
    if saved is not None:
        return replace(config, precision=saved)
    fast = _is_fast(device) and (device.type == "cuda" or _is_convolutional(config.arch))
    return replace(config, precision="bfloat16" if fast else "float32")


def _saved_precision(folder: Path) -> Precision | None:
    """The precision in a folder's ``config.json``; None if there is no file that can be read."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        precision: Precision = Config.complete(saved)["precision"]
        return precision
    except (OSError, ValueError, TypeError):  # opening the folder reports what is wrong with it
        return None


def _is_fast(device: torch.device) -> bool:
    """Whether the device has instructions that multiply in bfloat16."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and not _cpu_features().isdisjoint(("amx_bf16", "avx512_bf16"))


def _cpu_features() -> set[str]:
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    try:  # older versions of torch have no public name for it
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def _is_convolutional(arch: str) -> bool:
    return not arch.startswith(_TRANSFORMERS)
