"""CIFAR-100 and SVHN, read by torchvision, which checks the MD5 of their files."""

from __future__ import annotations

import os

import numpy as np
import torch

from awp_optim.lab.data.images import ImageData
from awp_optim.lab.data.sources import channels_first, data_folder, read_torchvision

__all__ = ["load_cifar100", "load_svhn"]

# Over the training parts: the figures in common use.
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
SVHN_MEAN = (0.4377, 0.4438, 0.4728)
SVHN_STD = (0.1980, 0.2010, 0.1970)


def load_cifar100(data_dir: str | os.PathLike[str], *, download: bool = True) -> ImageData:
    """CIFAR-100: 50,000 training and 10,000 test RGB images of 32x32 in 100 fine classes.

    Args:
        data_dir: The folder that holds ``cifar-100-python``.
        download: Fetch what is absent into ``data_dir``.

    Raises:
        ImportError: torchvision is not installed.
        NotADirectoryError: ``data_dir`` is a file.
        RuntimeError: The files are absent or damaged, or could not be fetched.
    """
    parts = ({"train": True}, {"train": False})
    train, test = read_torchvision("CIFAR100", data_folder(data_dir), *parts, download=download)
    return ImageData(
        channels_first(train.data),
        torch.tensor(train.targets),
        channels_first(test.data),
        torch.tensor(test.targets),
        classes=tuple(train.classes),
        name="cifar100",
        mean=CIFAR100_MEAN,
        std=CIFAR100_STD,
    )


def load_svhn(data_dir: str | os.PathLike[str], *, download: bool = True) -> ImageData:
    """SVHN, cropped digits: 73,257 training and 26,032 test RGB images of 32x32 in 10 classes.

    The digit 0 has the label 0. The 531,131 "extra" images are not used.

    Args:
        data_dir: The folder that holds ``train_32x32.mat`` and ``test_32x32.mat``.
        download: Fetch what is absent into ``data_dir``.

    Raises:
        ImportError: torchvision is not installed, or scipy, with which it reads these files.
        NotADirectoryError: ``data_dir`` is a file.
        RuntimeError: The files are absent or damaged, or could not be fetched.
    """
    parts = ({"split": "train"}, {"split": "test"})
    train, test = read_torchvision("SVHN", data_folder(data_dir), *parts, download=download)
    return ImageData(
        torch.from_numpy(np.ascontiguousarray(train.data)),
        torch.from_numpy(train.labels),
        torch.from_numpy(np.ascontiguousarray(test.data)),
        torch.from_numpy(test.labels),
        classes=tuple("0123456789"),
        name="svhn",
        mean=SVHN_MEAN,
        std=SVHN_STD,
    )
