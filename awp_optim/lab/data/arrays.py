"""Images and labels in files of numpy arrays, ``.npz`` and ``.npy``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from awp_optim.lab.data.images import ImageData
from awp_optim.lab.data.sources import channels_first

__all__ = ["ArrayFile", "images_of", "labels_of", "load_npz"]


class ArrayFile:
    """The images and labels in an ``.npz`` file, each array read when it is asked for.

    The single array of an ``.npy`` file has the name ``x``. Pickled objects are refused, so nothing
    in a file can run code.

    Raises:
        OSError: There is no such file, or it cannot be opened.
        ValueError: It is a file of another kind, or damaged.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.path = Path(file).expanduser()
        try:
            content = np.load(self.path, allow_pickle=False)
        except OSError:
            raise
        except Exception:  # numpy's own message advises to allow pickled objects
            raise ValueError(f"{self.path} is damaged, or not an .npz or .npy file") from None
        self._arrays = {"x": content} if isinstance(content, np.ndarray) else content
        self.names = tuple(self._arrays)

    def find(self, what: str, names: Sequence[str]) -> str:
        """The first of these names that the file has.

        Raises:
            ValueError: It has none of them; the message says it has no ``what``.
        """
        for name in names:
            if name in self.names:
                return name
        there = ", ".join(self.names[:8]) or "nothing"
        raise ValueError(f"{self.path} has no {what}, {' or '.join(names)}; it has {there}")

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """An array by its name.

        Raises:
            ValueError: The array is absent or damaged, or holds Python objects.
        """
        self.find("array", [name])
        try:
            array: np.ndarray[Any, Any] = self._arrays[name]
        except Exception:  # as above
            raise ValueError(
                f"{self.path}: {name} is damaged, or holds Python objects; it must hold numbers"
            ) from None
        return array

    def images(self, name: str) -> Tensor:
        """An array of images, uint8 (N, H, W, C) or (N, C, H, W), as uint8 (N, C, H, W).

        Raises:
            ValueError: The array is absent, damaged or not as above.
        """
        return images_of(f"{self.path}: {name}", self.array(name))

    def labels(self, name: str) -> Tensor:
        """An array of labels, integers from 0 of shape (N,), as int64.

        Raises:
            ValueError: The array is absent, damaged or not as above.
        """
        return labels_of(f"{self.path}: {name}", self.array(name))


def images_of(name: str, x: np.ndarray[Any, Any]) -> Tensor:
    """Images as uint8 (N, C, H, W): the smaller of the second and the last axis is the channels.

    Raises:
        ValueError: The array is not uint8, not of four axes, or those two are equal.
    """
    if x.dtype != np.uint8:
        raise ValueError(f"{name} is {x.dtype}; it must be uint8, with values of 0 to 255")
    if x.ndim != 4:
        hint = "; gray images need x[..., None]" if x.ndim == 3 else ""
        raise ValueError(f"{name} must be (N, H, W, C) or (N, C, H, W), not {x.shape}{hint}")
    if x.shape[1] == x.shape[3]:
        raise ValueError(f"{name} is {x.shape}: the channels may be the second or the last axis")
    if x.shape[1] > x.shape[3]:
        return channels_first(x)
    return torch.from_numpy(np.require(x, requirements=["C", "W"]))


def labels_of(name: str, y: np.ndarray[Any, Any]) -> Tensor:
    """Labels as int64 of shape (N,).

    Raises:
        ValueError: The array is empty, of another shape, or does not hold integers from 0.
    """
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{name} must be integers of shape (N,), not {y.dtype} of {y.shape}")
    if not len(y):
        raise ValueError(f"{name} is empty")
    if not 0 <= y.min() <= y.max() < 2**16:  # more is a mistake, and would make as many classes
        raise ValueError(f"{name} must hold labels from 0, not {y.min()} to {y.max()}")
    return torch.from_numpy(y.astype(np.int64))


def load_npz(path: str | os.PathLike[str]) -> ImageData:
    """The arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test`` of an ``.npz`` file.

    Images are uint8 of shape (N, H, W, C) or (N, C, H, W): the smaller of the second and the last
    axis is taken for the channels. Labels are integers from 0, shape (N,); the largest one gives
    the number of classes, whose names are their numbers. ``mean`` and ``std`` are measured on the
    training part. Pickled objects are refused.

    Raises:
        OSError: There is no such file, or it cannot be opened.
        ValueError: The file is not an ``.npz`` file, or an array is missing or of the wrong dtype
            or shape; the message names it.
    """
    file = ArrayFile(path)
    x_train, x_test = file.images("x_train"), file.images("x_test")
    y_train, y_test = file.labels("y_train"), file.labels("y_test")
    classes = 1 + max(int(y_train.max()), int(y_test.max()))
    try:
        return ImageData(
            x_train,
            y_train,
            x_test,
            y_test,
            classes=tuple(map(str, range(classes))),
            name=file.path.stem,
        ).with_statistics()
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
