"""Classifiers to evaluate: of a checkpoint, of a function of one's own, of RobustBench."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from awp_optim.lab.models import Normalize, build_model
from awp_optim.lab.weights import initialize, load_checkpoint, load_weights

__all__ = ["from_checkpoint", "from_function", "from_robustbench", "normalized", "settings_of"]

HALF = "--mean and --std: give both or none"


def settings_of(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint; empty if it does not say.

    Raises:
        OSError, ValueError: as :func:`~awp_optim.lab.weights.load_checkpoint`.
    """
    config = load_checkpoint(file).get("config")
    return config if isinstance(config, dict) else {}


def from_checkpoint(
    file: str | os.PathLike[str],
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    in_channels: int = 3,
    ema: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The network of a checkpoint. What is not given, its settings and its tensors say.

    Args:
        file: as of :func:`~awp_optim.lab.weights.load_weights`: this package's, or a state dict.
        arch: a name of :func:`~awp_optim.lab.models.build_model`, or one of those in papers,
            such as WideResNet-34-10, WRN-28-10 or PreActResNet-18.
        num_classes: as many as its head has.
        in_channels: of the images.
        ema: take the averaged weights.
        mean, std: of the normalisation, a number a channel, images in [0, 1]; for weights that
            hold none themselves. None for images as they are.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: it cannot be read, does not say of which network it is, or does not fit; or a
            normalisation was given for weights that hold one, or only half of one.
    """
    config = settings_of(file)
    arch = arch or config.get("arch")
    if arch is None:
        raise ValueError(f"{file} does not say of which network it is: give --arch")
    arch = _our_name(arch)
    weights = load_weights(file, ema=ema)
    settings: dict[str, Any] = {}
    if "activation" in config:
        settings["activation"] = config["activation"]
    settings |= _statistics(file, weights, mean, std)
    classes = _classes(file, weights) if num_classes is None else num_classes
    model = build_model(arch, num_classes=classes, in_channels=in_channels, **settings)
    try:
        fresh = initialize(model, weights)
    except ValueError as error:
        raise ValueError(f"{file}, as {arch}: {error}") from error
    if fresh:
        raise ValueError(
            f"{file} has a head for {len(weights[fresh[0]])} classes, not {classes}: "
            "leave --num-classes away"
        )
    return model.eval()


def _our_name(arch: str) -> str:
    """The name here of a network that papers write otherwise; others as they are.

    >>> _our_name("WideResNet-34-10"), _our_name("WRN-28-10"), _our_name("PreActResNet18")
    ('wide_resnet34_10', 'wide_resnet28_10', 'preact_resnet18')
    """
    if wide := re.fullmatch(r"(?:WideResNet|WRN)-?(\d+)[-_](\d+)", arch, re.IGNORECASE):
        return f"wide_resnet{wide[1]}_{wide[2]}"
    if preact := re.fullmatch(r"PreAct-?ResNet-?(\d+)", arch, re.IGNORECASE):
        return f"preact_resnet{preact[1]}"
    return arch


def _statistics(
    file: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> dict[str, list[float]]:
    own = {
        name: weights[f"normalize.{name}"].flatten().tolist()
        for name in ("mean", "std")
        if f"normalize.{name}" in weights
    }
    given = {k: list(v) for k, v in (("mean", mean), ("std", std)) if v is not None}
    if own and given:
        raise ValueError(
            f"{file} holds its own normalisation, mean {own.get('mean')} and std {own.get('std')}: "
            "leave --mean and --std away"
        )
    if len(given) == 1:
        raise ValueError(HALF)
    return own or given


def _classes(file: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> int:
    matrices = [tensor for tensor in weights.values() if tensor.ndim == 2]
    if not matrices:
        raise ValueError(f"{file} does not say how many classes there are: give --num-classes")
    return len(matrices[-1])


def from_function(name: str) -> nn.Module:
    """What ``module:function`` returns; modules of the folder that this is run in count, too.

    Raises:
        ImportError: there is no such module.
        ValueError: ``name`` is of another form, or there is no such function.
        TypeError: it returns something else than a torch module.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"--model must be module:function, not {name!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    make = getattr(importlib.import_module(module), function, None)
    if not callable(make):
        raise ValueError(f"{module} has no function {function!r}")
    model = make()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must return a torch module, not {type(model).__name__}")
    return model.eval()


def from_robustbench(name: str, dataset: str, norm: str, folder: str | os.PathLike[str]) -> Any:
    """A model of RobustBench (Croce et al., 2021), which downloads it to ``folder`` if need be.

    Args:
        name: of its model zoo, such as "Wu2020Adversarial", this paper's TRADES-AWP.
        dataset: "cifar10" or "cifar100".
        norm: "linf" or "l2".
        folder: where it keeps its models.

    Raises:
        ImportError: the package is not installed, or lacks a package that it needs.
        ValueError: it knows no such model.
        RuntimeError: it could not download or read the model.
    """
    try:
        from robustbench.utils import load_model
    except ImportError as error:
        absent = getattr(error, "name", None) in (None, "robustbench", "robustbench.utils")
        why = "" if absent else f", which is installed but cannot be imported ({error})"
        raise ImportError(
            f"--robustbench needs RobustBench{why}: pip install "
            "git+https://github.com/RobustBench/robustbench.git"
            + ("" if absent else ", and what is missing; pkg_resources comes with 'setuptools<81'")
        ) from error
    threat = {"linf": "Linf", "l2": "L2"}.get(norm, norm)
    try:
        model = load_model(
            model_name=name, dataset=dataset, threat_model=threat, model_dir=str(folder)
        )
    except KeyError as error:
        raise ValueError(f"RobustBench has no model {error} for {dataset}, {threat}") from error
    except ValueError:
        raise
    except Exception as error:  # of whichever package it downloads or reads with
        raise RuntimeError(
            f"RobustBench could not load {name} into {folder}: {type(error).__name__}: {error}"
        ) from error
    return model.eval()


def normalized(
    model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    """The model behind a normalisation of its own, if one is given.

    Raises:
        ValueError: only one of the two is given, or as for
            :class:`~awp_optim.lab.models.Normalize`; or the model has one.
    """
    if mean is None and std is None:
        return model
    if any(isinstance(m, Normalize) for m in model.modules()):
        raise ValueError("the model normalises its inputs itself: leave --mean and --std away")
    if mean is None or std is None:
        raise ValueError(HALF)
    return nn.Sequential(Normalize(mean, std), model).eval()
