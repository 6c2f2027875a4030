"""What the loaders share: the data folder, torchvision's data sets, errors on one line."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["channels_first", "data_folder", "one_line", "read_torchvision"]

DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer after which a download is given up


def data_folder(data_dir: str | os.PathLike[str]) -> Path:
    """``data_dir`` as a path; NotADirectoryError if it is a file."""
    folder = Path(data_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"data_dir is not a folder: {folder}")
    return folder


def read_torchvision(name: str, folder: Path, *parts: dict[str, Any], download: bool) -> list[Any]:
    """Parts of the data set ``torchvision.datasets.<name>``, such as ``{"train": True}``.

    torchvision checks the MD5 of every file.

    Raises:
        ImportError: torchvision, or a package that it needs for these files, is not installed.
        RuntimeError: The files are absent or damaged, or could not be downloaded.
    """
    from torchvision import datasets

    try:
        with _download_timeout():
            return [
                getattr(datasets, name)(str(folder), download=download, **part) for part in parts
            ]
    except ImportError:
        raise
    except Exception as error:  # torchvision raises whatever the network or the damage leads to
        raise RuntimeError(
            f"{name} could not be loaded from {folder}: {one_line(error)}"
        ) from error


def channels_first(x: np.ndarray[Any, Any]) -> Tensor:
    """Images of shape (N, H, W, C) as a contiguous tensor of shape (N, C, H, W)."""
    return torch.from_numpy(np.require(x.transpose(0, 3, 1, 2), requirements=["C", "W"]))


def one_line(error: BaseException, width: int = 300) -> str:
    """The type and the message of an error on one line of limited length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= width else text[: width - 3] + "..."


@contextmanager
def _download_timeout() -> Iterator[None]:
    """Inside, a server that does not answer is an error; torchvision would wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
