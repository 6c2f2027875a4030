"""Images and labels in files of numpy arrays, ``.npz`` and ``.npy``."""

from __future__ import annotations

import math
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from rich.progress import wrap_file
from torch import Tensor

from awp_optim._utils.io import atomic_write
from awp_optim.lab.data.images import ImageData
from awp_optim.lab.data.sources import channels_first

__all__ = ["ArrayFile", "StoredArray", "images_of", "is_channels_last", "labels_of", "load_npz"]


@dataclass(frozen=True)
class StoredArray:
    """Where an array lies in a file: its elements in C order, from ``offset`` on."""

    path: Path
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


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
            content = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except OSError:
            raise
        except Exception:  # numpy's own message advises to allow pickled objects
            raise ValueError(
                f"{self.path} is damaged, or not an .npz or .npy file; is it complete?"
            ) from None
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

    def stored(self, name: str) -> StoredArray:
        """Where an array lies, without reading it.

        ``np.savez`` stores arrays as they are. What ``np.savez_compressed`` writes is unpacked
        once, into an ``.npy`` file beside the archive. Its name has the array's checksum (CRC-32),
        so that it is not used for another archive of the same name, and it appears only when it is
        complete.

        Raises:
            OSError: The array cannot be unpacked there.
            ValueError: The array is absent, damaged, of Python objects or in Fortran order.
        """
        self.find("array", [name])
        if isinstance(self._arrays, dict):
            return self._locate(name, self.path, 0, self.path.stat().st_size)
        archive = self._arrays.zip
        info = archive.getinfo(name if name in archive.namelist() else f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            path = self.path.with_name(f"{self.path.stem}.{name}.{info.CRC:08x}.npy")
            if not path.exists() or path.stat().st_size != info.file_size:
                self._unpack(archive, info, path)
            return self._locate(name, path, 0, info.file_size)
        with open(self.path, "rb") as file:
            file.seek(info.header_offset + 26)  # the lengths of what follows the fixed 30 bytes
            lengths = struct.unpack("<HH", file.read(4))
        start = info.header_offset + 30 + sum(lengths)
        return self._locate(name, self.path, start, info.file_size)

    def _locate(self, name: str, path: Path, start: int, size: int) -> StoredArray:
        """An array from its header, where its ``size`` bytes begin with that."""
        headers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        with open(path, "rb") as file:
            try:
                file.seek(start)
                shape, fortran, dtype = headers[np.lib.format.read_magic(file)](file)
                offset = file.tell()
            except (KeyError, ValueError):
                raise ValueError(f"{path}: {name} is damaged") from None
        if dtype.hasobject or offset - start + math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"{path}: {name} is damaged, or holds Python objects")
        if fortran and len(shape) > 1:
            raise ValueError(f"{path}: {name} is in Fortran order; save it in C order")
        return StoredArray(path, name, offset, shape, dtype)

    def _unpack(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
        if (free := shutil.disk_usage(path.parent).free) < info.file_size:
            raise OSError(
                f"{self.path} is compressed; to unpack it into {path} takes "
                f"{info.file_size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there"
            )
        try:
            with archive.open(info) as packed, atomic_write(path) as file:
                stream, text = cast(BinaryIO, packed), f"unpacking {path.name}"
                with wrap_file(stream, info.file_size, description=text) as source:
                    shutil.copyfileobj(source, file, 1 << 20)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise ValueError(f"{self.path}: {info.filename} is damaged ({error})") from None

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
    """Images as uint8 (N, C, H, W).

    Raises:
        ValueError: As in :func:`is_channels_last`.
    """
    if is_channels_last(name, x.shape, x.dtype):
        return channels_first(x)
    return torch.from_numpy(np.require(x, requirements=["C", "W"]))


def is_channels_last(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether images are (N, H, W, C) or (N, C, H, W): the smaller of the two axes is the channels.

    Raises:
        ValueError: The array is not uint8, not of four axes, or those two are equal.
    """
    if dtype != np.uint8:
        raise ValueError(f"{name} is {dtype}; it must be uint8, with values of 0 to 255")
    if len(shape) != 4:
        hint = "; gray images need x[..., None]" if len(shape) == 3 else ""
        raise ValueError(f"{name} must be (N, H, W, C) or (N, C, H, W), not {shape}{hint}")
    if shape[1] == shape[3]:
        raise ValueError(f"{name} is {shape}: the channels may be the second or the last axis")
    return shape[1] > shape[3]


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
