"""Classifiers to evaluate: from a checkpoint, from a function, or from RobustBench."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from awp_optim.lab.models import Normalize, build_model
from awp_optim.lab.weights import initialize, load_checkpoint, sizes_of, state_dict_of

__all__ = [
    "from_checkpoint",
    "from_function",
    "from_robustbench",
    "load_model",
    "normalized",
    "settings_of",
]


def load_model(path_or_name: str | os.PathLike[str], *, ema: bool = False) -> nn.Module:
    """A trained network, ready to use: in eval mode, from images in [0, 1] to logits.

    Its normalization is inside.

    Args:
        path_or_name: A ``.safetensors`` file or a checkpoint of this package (``best.safetensors``,
            ``best.pt``, ``last.pt``); or the name of a network that ships with the package, one of
            :data:`awp_optim.lab.shipped.DIGESTS`.
        ema: Take the averaged weights of a checkpoint (a ``.safetensors`` file holds those, if its
            run had any).

    Raises:
        OSError: There is no such file (the message lists the names), or it cannot be opened.
        ValueError: The file cannot be read, or does not name its network.
    """
    return from_checkpoint(path_or_name, ema=ema)


def settings_of(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint; empty if the file does not hold them.

    The errors are those of :func:`~awp_optim.lab.weights.load_checkpoint`.
    """
    return _settings(load_checkpoint(file))


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    config = content.get("config")
    return config if isinstance(config, dict) else {}


def from_checkpoint(
    file: str | os.PathLike[str],
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    ema: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The network of a checkpoint, in eval mode.

    Arguments that are not given come from the settings and the tensors in the file.

    Args:
        file: A checkpoint of this package, a state dict, or a name, as in
            :func:`~awp_optim.lab.weights.load_weights`.
        arch: A name for :func:`~awp_optim.lab.models.build_model`, or one from papers, such as
            WideResNet-34-10, WRN-28-10 or PreActResNet-18.
        num_classes: Number of logits; the size of the head unless given.
        in_channels: Channels of the images; those of the first convolution unless given.
        ema: Take the averaged weights.
        mean: Mean of each channel for images in [0, 1], for weights without a normalization. None
            means no normalization; in DeepMind's layout, CIFAR's.
        std: Standard deviation of each channel, likewise.

    Raises:
        OSError: There is no such file, or it cannot be opened.
        ValueError: The file cannot be read, does not name its network or does not fit it; or a
            normalization was given for weights that have one, or only half of one.
    """
    content = load_checkpoint(file)
    config = _settings(content)
    arch = arch or config.get("arch")
    if arch is None:
        raise ValueError(f"{file} does not name its network: give --arch")
    arch = _our_name(arch)
    weights = state_dict_of(content, file, ema=ema)
    if arch.startswith("wide_resnet") and "init_conv.weight" in weights:
        arch = f"dm_{arch}"  # papers give the two layouts one name
    settings = _given(config, "activation") | _statistics(file, weights, mean, std)
    sizes = {"in_channels": 3, **sizes_of(weights), **_given(config, "in_channels", "num_classes")}
    given = {"in_channels": in_channels, "num_classes": num_classes}
    sizes |= {name: size for name, size in given.items() if size is not None}
    if "num_classes" not in sizes:
        raise ValueError(f"{file} does not show the number of classes: give --num-classes")
    model = build_model(arch, **sizes, **settings)
    try:
        fresh = initialize(model, weights)
    except ValueError as error:
        raise ValueError(f"{file}, as {arch}: {error}") from error
    if fresh:
        raise ValueError(
            f"{file} has a head for {len(weights[fresh[0]])} classes, not {num_classes}: "
            "leave out --num-classes"
        )
    return model.eval()


def _our_name(arch: str) -> str:
    """Our name of a network for the spelling in papers; other names are returned unchanged.

    >>> _our_name("WideResNet-34-10"), _our_name("WRN-28-10")
    ('wide_resnet34_10', 'wide_resnet28_10')
    >>> _our_name("PreActResNet18"), _our_name("PreActResNet-10-32")
    ('preact_resnet18', 'preact_resnet10_32')
    """
    if wide := re.fullmatch(r"(?:WideResNet|WRN)-?(\d+)[-_](\d+)", arch, re.IGNORECASE):
        return f"wide_resnet{wide[1]}_{wide[2]}"
    if preact := re.fullmatch(r"PreAct-?ResNet-?(\d+)(?:[-_](\d+))?", arch, re.IGNORECASE):
        return "_".join(filter(None, (f"preact_resnet{preact[1]}", preact[2])))
    return arch


def _statistics(
    file: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> dict[str, Any]:
    """The mean and std for the network: those in the file or those given."""
    _check_both(mean, std)
    own = {
        key.removeprefix("normalize."): weights[key].flatten().tolist()
        for key in ("normalize.mean", "normalize.std", "mean", "std")
        if key in weights
    }
    if mean is None:
        return own
    if own:
        raise ValueError(
            f"{file} has its own normalization, mean {own.get('mean')} and std {own.get('std')}: "
            "leave out --mean and --std"
        )
    return {"mean": mean, "std": std}


def _check_both(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    if (mean is None) != (std is None):
        raise ValueError("--mean and --std: give both or none")


def _given(config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: config[name] for name in names if name in config}


def from_function(name: str) -> nn.Module:
    """The module that ``MODULE:FUNCTION`` returns, in eval mode.

    MODULE may also be a file in the current folder.

    Raises:
        ImportError: There is no such module.
        ValueError: ``name`` has another form, or there is no such function.
        TypeError: The function returns something other than a torch module.
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


def from_robustbench(
    name: str, dataset: str, norm: str, folder: str | os.PathLike[str]
) -> nn.Module:
    """A model of RobustBench (Croce et al., 2021) in eval mode, downloaded to ``folder`` if needed.

    Args:
        name: Its name in the model zoo, such as "Wu2020Adversarial", this paper's TRADES-AWP.
        dataset: "cifar10" or "cifar100".
        norm: "linf" or "l2".
        folder: The folder in which RobustBench keeps its models.

    Raises:
        ImportError: RobustBench, or a package that it needs, is not installed.
        ValueError: It has no such model.
        RuntimeError: It could not download or read the model.
    """
    load = _robustbench_loader()
    threat = {"linf": "Linf", "l2": "L2"}.get(norm, norm)
    try:
        model: nn.Module = load(
            model_name=name, dataset=dataset, threat_model=threat, model_dir=str(folder)
        )
    except KeyError as error:
        raise ValueError(f"RobustBench has no model {error} for {dataset}, {threat}") from error
    except ValueError:
        raise
    except pickle.UnpicklingError:  # torch's own message advises to do without the protection
        raise RuntimeError(
            f"the file of {name} in {folder} is damaged, or holds more than tensors"
        ) from None
    except Exception as error:  # from any of the packages that it downloads or reads with
        raise RuntimeError(
            f"RobustBench could not load {name} into {folder}: {type(error).__name__}: {error}"
        ) from error
    finally:
        for path in (f"{folder}/{dataset}/{threat}", f"{folder}/{dataset}", folder):
            with suppress(OSError):  # RobustBench makes them before it downloads
                os.rmdir(path)
    return model.eval()


def _robustbench_loader() -> Callable[..., nn.Module]:
    """RobustBench's ``load_model``.

    Version 1.1.1 requires the package that PyPI calls ``pyautoattack``, but imports it by the name
    that it has elsewhere, ``autoattack``.
    """
    here, elsewhere = map(importlib.util.find_spec, ("pyautoattack", "autoattack"))
    if here and not elsewhere:
        for part in ("", ".state"):
            sys.modules[f"autoattack{part}"] = importlib.import_module(f"pyautoattack{part}")
    try:
        return importlib.import_module("robustbench.utils").load_model  # type: ignore[no-any-return]
    except ImportError as error:
        raise ImportError(
            f"RobustBench cannot be imported ({error}): pip install robustbench, with the packages "
            "that it requires; it needs a certain version of timm, so perhaps in an environment "
            "of its own"
        ) from error


def normalized(
    model: nn.Module,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    channels: int | None = None,
) -> nn.Module:
    """The model behind a :class:`~awp_optim.lab.models.Normalize`, if statistics are given.

    Raises:
        ValueError: Only one of the two is given, they do not fit each other or the ``channels`` of
            the images, or the model has a normalization itself.
    """
    _check_both(mean, std)
    if mean is None or std is None:
        return model
    if any(isinstance(m, Normalize) for m in model.modules()):
        raise ValueError("the model normalizes its inputs itself: leave out --mean and --std")
    return nn.Sequential(Normalize(mean, std, channels), model).eval()
