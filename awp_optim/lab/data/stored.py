"""Images that stay in their files: those that a batch needs are read when it needs them.

Files of generated images hold up to 154 GB (50 million of 32x32). They are read, not mapped into
memory: a mapped page counts as memory of the process, an image that is not in the page cache stops
the thread that touches it with the interpreter's lock held, and a file that shrinks kills the
process. Reads that are announced to the kernel were several times as fast from a disk, see
``benchmarks/generated_data.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from awp_optim.lab.data.arrays import StoredArray, is_channels_last

__all__ = ["StoredImages"]


class StoredImages:
    """The images of one or several arrays in files, one after another, as if they were a tensor.

    Args:
        parts: uint8 arrays, all of them (N, H, W, C) or all (N, C, H, W).

    Attributes:
        shape: (N, C, H, W), with the images of all parts.
        dtype: uint8.
        ndim: 4.
        device: the CPU.
        memory_format: how a batch lies in memory, as in the files.

    Raises:
        ValueError: A part is not as above, or the parts have images of different shapes.
    """

    dtype, ndim, device = torch.uint8, 4, torch.device("cpu")

    def __init__(self, parts: Sequence[StoredArray]) -> None:
        first = parts[0]
        last = is_channels_last(f"{first.path}: {first.name}", first.shape, first.dtype)
        for part in parts[1:]:
            is_channels_last(f"{part.path}: {part.name}", part.shape, part.dtype)
            if part.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"{part.path} has images of {part.shape[1:]}, {first.path} of {first.shape[1:]}"
                )
        self._parts = parts
        self._ends = list(accumulate(part.shape[0] for part in parts))
        h, w, c = first.shape[1:] if last else (*first.shape[2:], first.shape[1])
        self.shape = torch.Size((self._ends[-1], c, h, w))
        self.memory_format = torch.channels_last if last else torch.contiguous_format

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Images, uint8 (n, C, H, W), by their indices or a slice of them."""
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)))
        shape = (len(index), *self.shape[1:])
        out = torch.empty(shape, dtype=self.dtype, memory_format=self.memory_format)
        return self.read(index, out)

    def file_of(self, index: int) -> Path:
        """The file that holds an image."""
        return self._parts[int(np.searchsorted(self._ends, index, "right"))].path

    def read(self, index: Tensor, out: Tensor) -> Tensor:
        """Read images into a tensor on the CPU, and return it.

        No random numbers and no work for a GPU, so that a thread may call it at any time.

        Args:
            index: which images, from 0, int64 of shape (n,).
            out: uint8 (n, C, H, W), in :attr:`memory_format`.

        Raises:
            IndexError: There is no such image.
            OSError: A file cannot be read, or is shorter than when it was opened.
        """
        rows = index.numpy()
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"{len(self)} images, but index {rows.min()} to {rows.max()}")
        channels_last = self.memory_format is torch.channels_last
        as_in_file = out.permute(0, 2, 3, 1) if channels_last else out
        memory = as_in_file.view(-1).numpy().data
        of_part = np.searchsorted(self._ends, rows, "right")
        for i, part in enumerate(self._parts):
            where = np.flatnonzero(of_part == i)
            if len(where):
                begin = self._ends[i] - part.shape[0]
                _read(part, (rows[where] - begin).tolist(), where.tolist(), memory)
        return out


def _read(part: StoredArray, rows: list[int], where: list[int], memory: memoryview) -> None:
    """Read rows of an array into the places ``where`` of a memory of such rows."""
    size = math.prod(part.shape[1:])
    offsets = [part.offset + row * size for row in rows]
    with open(part.path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # the disk works on all of them at once
            for offset in offsets:
                os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
        for offset, i in zip(offsets, where, strict=True):
            file.seek(offset)
            if file.readinto(memory[i * size : (i + 1) * size]) != size:
                raise OSError(f"{part.path} has become shorter since it was opened")
