"""Image data sets as uint8 tensors, small enough to stay on the training device.

A data set is an :class:`ImageData`: no data loader and no worker process. The trainer keeps it on
the device, indexes batches out of it and converts each one to float in [0, 1].

    data = load("cifar10", "data").to("cuda")
    x = data.x_train[index].float() / 255
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from awp_optim.lab.data.arrays import load_npz
from awp_optim.lab.data.cifar10 import load_cifar10
from awp_optim.lab.data.digits import load_digits
from awp_optim.lab.data.folders import load_folder
from awp_optim.lab.data.images import ImageData
from awp_optim.lab.data.torchvision_sets import load_cifar100, load_svhn

__all__ = [
    "DATASETS",
    "ImageData",
    "load",
    "load_cifar10",
    "load_cifar100",
    "load_digits",
    "load_folder",
    "load_npz",
    "load_svhn",
]

DATASETS: dict[str, Callable[..., ImageData]] = {
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "svhn": load_svhn,
    "digits": load_digits,
    "folder": load_folder,
    "npz": load_npz,
}
"""The loaders by name. All but ``load_digits`` take a path first."""


def load(name: str, path: str | os.PathLike[str] | None = None, **options: Any) -> ImageData:
    """Load a data set by its name in :data:`DATASETS`.

    Args:
        name: The data set.
        path: The loader's first argument: a folder, or the ``.npz`` file. The digits need none.
        options: The loader's other arguments.

    Raises:
        ValueError: The name is unknown, or the data set needs a path.
        Exception: Whatever the loader raises.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(DATASETS)}")
    if name == "digits":
        return load_digits(**options)
    if path is None:
        raise ValueError(f"the data set {name!r} needs a path")
    return DATASETS[name](path, **options)
