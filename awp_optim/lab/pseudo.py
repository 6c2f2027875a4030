"""Images with pseudo-labels, for robust self-training (RST).

Carmon et al., "Unlabeled data improves adversarial robustness", 2019
(https://arxiv.org/abs/1905.13736), Section 3: a classifier trained without an adversary labels
images that have no labels, and these are trained on beside the labelled ones.

    labeled = pseudo_label(classifier, images)
    labeled = load_pseudo_labeled("ti_500K_pseudo_labeled.pickle")

The second is their published file, 500,000 images of TinyImages for CIFAR-10. A pickle can run
code when it is read; here it cannot.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from awp_optim._utils.io import atomic_write
from awp_optim.attacks.base import Model, in_mode
from awp_optim.lab.data import ImageData, _images, _labels, _one_line

__all__ = [
    "PseudoLabeled",
    "classify",
    "confident",
    "load_images",
    "load_labels",
    "load_pseudo_labeled",
    "pseudo_label",
    "save_pseudo_labeled",
]


@dataclass(frozen=True, eq=False)
class PseudoLabeled:
    """Images with labels that a classifier gave them.

    Attributes:
        x: Images, uint8 in [0, 255], shape (N, C, H, W).
        y: Labels, int64 from 0, shape (N,).

    Raises:
        ValueError: A tensor's dtype or shape, or a label, is not as above.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        _check_images(self.x)
        if self.y.dtype != torch.int64 or self.y.shape != self.x.shape[:1]:
            got = f"{self.y.dtype} of {tuple(self.y.shape)}"
            raise ValueError(f"y must be int64 of shape ({len(self.x)},), not {got}")
        if len(self.y) and int(self.y.min()) < 0:
            raise ValueError(f"y must hold labels from 0 on, not {int(self.y.min())}")

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device | str) -> PseudoLabeled:
        """The same with both tensors on ``device``."""
        return PseudoLabeled(self.x.to(device), self.y.to(device))

    def limit(self, n: int, seed: int = 0) -> PseudoLabeled:
        """A random subset: the first n of a seeded permutation, in that order.

        Of one seed, a smaller subset is the beginning of a larger one, on any device.

        Raises:
            ValueError: n is below 1 or above what there is.
        """
        if not 1 <= n <= len(self):
            raise ValueError(f"n must be between 1 and {len(self)}, not {n}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        index = order[:n].to(self.x.device)
        return PseudoLabeled(self.x[index], self.y[index])

    def check_fits(self, data: ImageData) -> None:
        """Check that they can be trained on beside ``data``.

        Raises:
            ValueError: The images differ in shape, or a label is not among the data's classes.
        """
        shape, expected = tuple(self.x.shape[1:]), tuple(data.x_train.shape[1:])
        if shape != expected:
            raise ValueError(
                f"the images with pseudo-labels are of shape {shape} (channels, height, width), "
                f"those of {data.name} of {expected}"
            )
        if len(self) and int(self.y.max()) >= data.num_classes:
            raise ValueError(
                f"the pseudo-labels go up to {int(self.y.max())}, but {data.name} has "
                f"{data.num_classes} classes, numbered from 0"
            )


# --- By a classifier --------------------------------------------------------------------------


def pseudo_label(
    model: Model, x: Tensor, batch_size: int = 512, *, min_confidence: float = 0.0
) -> PseudoLabeled:
    """Label images with a classifier, and keep those of which it is confident.

    Args:
        model: As in :func:`classify`.
        x: Images, uint8, shape (N, C, H, W).
        batch_size: Images at a time.
        min_confidence: The least probability, in [0, 1], that the classifier must give its label;
            0 keeps all images.

    Returns:
        The images kept, in their order, on the device of ``x``.

    Raises:
        ValueError: As in :func:`classify`; or ``min_confidence`` is out of its range, or higher
            than the confidence in every image.
    """
    _check_probability(min_confidence)
    y, confidence = classify(model, x, batch_size)
    kept = confident(confidence, min_confidence)
    return PseudoLabeled(x[kept], y[kept])


@torch.no_grad()
def classify(
    model: Model,
    x: Tensor,
    batch_size: int = 512,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The class that a classifier gives each image, and how sure it is.

    Args:
        model: Maps float32 images in [0, 1] to logits of shape (N, classes). A module is put in
            eval mode for the duration of the call, and gets the images on its own device.
        x: Images, uint8, shape (N, C, H, W).
        batch_size: Images at a time.
        on_step: Called after each batch with the number of batches done and to do.

    Returns:
        The classes, int64, and their probabilities (softmax), float32 in (0, 1], both of shape
        (N,) and on the device of ``x``. Of equal logits the first is taken.

    Raises:
        ValueError: ``x`` is not as above or empty, ``batch_size`` is below 1, or the model gives
            something other than finite logits of at least 2 classes.
    """
    _check_images(x)
    if not len(x):
        raise ValueError("there are no images to label")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    device = x.device
    if isinstance(model, nn.Module):
        own = next(chain(model.parameters(), model.buffers()), None)
        device = x.device if own is None else own.device
    batches = torch.split(x, batch_size)
    y, confidence = [], []
    with in_mode(model, "eval"):
        for i, batch in enumerate(batches):
            logits = model(batch.to(device).float() / 255)
            if not isinstance(logits, Tensor) or not logits.is_floating_point():
                got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"the classifier must return a tensor of logits, not {got}")
            if logits.ndim != 2 or len(logits) != len(batch) or logits.shape[1] < 2:
                raise ValueError(
                    "the classifier must return logits of shape (N, classes), of 2 classes or "
                    f"more, not {tuple(logits.shape)} for {len(batch)} images"
                )
            if not logits.isfinite().all():
                raise ValueError(
                    f"the classifier gives logits that are not finite, from image {i * batch_size} "
                    "on: are its weights those of a training that diverged?"
                )
            y.append(logits.argmax(1).to(x.device))
            confidence.append(logits.float().softmax(1).amax(1).to(x.device))
            if on_step:
                on_step(i + 1, len(batches))
    return torch.cat(y), torch.cat(confidence)


def confident(confidence: Tensor, least: float) -> Tensor:
    """Which confidences are ``least`` or more, as booleans.

    Raises:
        ValueError: ``least`` is not in [0, 1], or none is as high.
    """
    _check_probability(least)
    kept = confidence >= least
    if not kept.any():
        raise ValueError(
            f"the classifier's confidence is below {least:g} for all {len(confidence)} images, at "
            f"most {float(confidence.max()):.4g}; lower the least one"
        )
    return kept


def _check_images(x: Tensor) -> None:
    if x.dtype != torch.uint8 or x.ndim != 4:
        got = f"{x.dtype} of {tuple(x.shape)}"
        raise ValueError(f"x must be uint8 of shape (N, C, H, W), not {got}")


def _check_probability(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"the least confidence must be in [0, 1], not {value}")


# --- In files ---------------------------------------------------------------------------------

IMAGES = ("x", "data")
LABELS = ("y", "extrapolated_targets")


def load_pseudo_labeled(file: str | os.PathLike[str]) -> PseudoLabeled:
    """Images and their pseudo-labels out of a file.

    Either a pickle in the layout of Carmon et al. (``ti_500K_pseudo_labeled.pickle``): a dict with
    ``data``, uint8 (N, H, W, C), and ``extrapolated_targets``, integers (N,). Or an ``.npz`` file
    with ``x`` and ``y``, as :func:`save_pseudo_labeled` writes. Images may be (N, H, W, C) or
    (N, C, H, W): the smaller of the second and the last axis is taken for the channels. What else
    is in the file is left alone.

    Nothing in a file can run code: of a pickle, only numbers, texts, plain containers and arrays of
    numbers are read, and anything else is refused.

    Raises:
        OSError: There is no such file, or it cannot be opened.
        ValueError: It is of another kind, damaged or refused, or has no images or no labels, or
            they are not as above; the text names the file and what is wrong.
    """
    path = Path(file).expanduser()
    with _opened(path) as content:
        y_name = _name(content, LABELS)
        if y_name is None:
            raise ValueError(
                f"{path} has no labels, {' or '.join(LABELS)}; it has {_listed(content)}. Have a "
                f"classifier label its images: python examples/pseudo_label.py --images {path} ..."
            )
        x_name = _images_name(path, content)
        with _naming(path):
            y = _labels(y_name, _array(y_name, content))
            return PseudoLabeled(_images(x_name, _array(x_name, content)), y)


def load_images(file: str | os.PathLike[str]) -> Tensor:
    """Images out of a file, with or without labels: uint8, shape (N, C, H, W).

    The file is an ``.npy`` file, an ``.npz`` file with ``x`` or ``data`` (or with a single array),
    or a pickle of a dict with ``data``. Axes, safety and errors are as in
    :func:`load_pseudo_labeled`.
    """
    path = Path(file).expanduser()
    with _opened(path) as content:
        name = _images_name(path, content)
        with _naming(path):
            return _images(name, _array(name, content))


def load_labels(file: str | os.PathLike[str]) -> Tensor | None:
    """The labels in a file of images, int64 of shape (N,); None if there are none.

    Errors are as in :func:`load_pseudo_labeled`.
    """
    path = Path(file).expanduser()
    with _opened(path) as content:
        name = _name(content, LABELS)
        if name is None:
            return None
        with _naming(path):
            return _labels(name, _array(name, content))


def save_pseudo_labeled(labeled: PseudoLabeled, file: str | os.PathLike[str]) -> None:
    """Write an ``.npz`` file with ``x``, uint8 (N, C, H, W), and ``y``, int64 (N,).

    It is written beside its place and moved there when it is whole, in place of what was there.
    Folders are made if needed.

    Raises:
        OSError: It cannot be written.
        ValueError: There are no images, or as many channels as columns, so that the file could not
            be read back.
    """
    shape = tuple(labeled.x.shape)
    if not len(labeled):
        raise ValueError("there are no images to save")
    if not shape[1] < shape[3]:
        raise ValueError(f"images of {shape} cannot be saved: fewer channels than columns, please")
    path = Path(file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        np.savez(stream, x=labeled.x.cpu().numpy(), y=labeled.y.cpu().numpy())


@contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, Any]]:
    """What a file holds, by name. Which kind it is, its first bytes say."""
    with open(path, "rb") as stream:
        numpy_file = stream.read(6).startswith((b"PK", b"\x93NUMPY"))
        stream.seek(0)
        try:
            # Pickles of Python 2 hold their bytes as texts in this encoding.
            content = (
                np.load(stream, allow_pickle=False)
                if numpy_file
                else _ArraysOnly(stream, encoding="latin1").load()
            )
        except Exception as error:  # readers raise whatever the damage leads them to
            raise ValueError(
                f"{path} cannot be read as an .npz, .npy or pickle file of arrays: "
                f"{_one_line(error)}"
            ) from error
        if isinstance(content, np.ndarray):
            content = {"x": content}
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} is a pickle of {type(content).__name__}; it must be a dict")
        yield content


def _name(content: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in content), None)


def _images_name(path: Path, content: Mapping[str, Any]) -> str:
    name = _name(content, IMAGES)
    if name is None and len(content) == 1 and not _name(content, LABELS):
        name = next(iter(content))
    if name is None:
        raise ValueError(f"{path} has no images, {' or '.join(IMAGES)}; it has {_listed(content)}")
    return name


def _listed(content: Mapping[str, Any]) -> str:
    return ", ".join(map(str, islice(content, 8))) or "nothing"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _array(name: str, content: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """An array of its own, which can be written to."""
    try:
        return np.require(_plain(content[name]), requirements="W")
    except Exception as error:  # an archive is only read here; lists may be ragged
        raise ValueError(f"{name} cannot be read: {_one_line(error)}") from error


# --- Pickles ----------------------------------------------------------------------------------
# numpy's own functions would trust what they are given: an array of objects whose flags are forged
# to say "numbers" takes the file's bytes for addresses. So these classes stand in for them. Every
# one has a __setstate__, or else a pickle could set attributes of the class itself.


class _Bytes(bytes):
    """``_codecs.encode``: bytes, which protocols before 3 write as a text."""

    def __new__(cls, text: str, encoding: str) -> _Bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
        return super().__new__(cls, text, encoding)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("bytes have no state")


class _DType:
    """``numpy.dtype``, of numbers alone."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biuf][1248]", code):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}; they must be of numbers")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """``numpy.ndarray``, as ``_reconstruct`` makes it: empty, until it gets its state."""

    value: np.ndarray[Any, Any]

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self._fill(data, dtype, shape, "F" if fortran else "C")

    def _fill(self, data: Any, dtype: _DType, shape: Any, order: Any) -> None:
        data = data.encode("latin1") if isinstance(data, str) else data
        self.value = np.frombuffer(data, dtype.value).reshape(shape, order=order)


class _Scalar(_Array):
    """``scalar``: one number."""

    def __init__(self, dtype: _DType, data: Any) -> None:
        self._fill(data, dtype, (), "C")


class _Buffer(_Array):
    """``_frombuffer``: an array in protocol 5."""

    def __init__(self, data: Any, dtype: _DType, shape: Any, order: str, axes: Any = None) -> None:
        if axes is None:
            self._fill(data, dtype, shape, order)
        else:
            self._fill(data, dtype, shape, "C")
            self.value = self.value.transpose(axes)


_STAND_INS: dict[tuple[str, str], type] = {
    ("_codecs", "encode"): _Bytes,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")  # before numpy 2, and since
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _Scalar),
            ("numeric", "_frombuffer", _Buffer),
        )
    },
}


class _ArraysOnly(pickle.Unpickler):
    """Reads numbers, texts, plain containers and arrays of numbers, and refuses all else."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only arrays and plain values are read"
            )
        return _STAND_INS[module, name]


def _plain(value: Any) -> Any:
    """A pickle's value without stand-ins."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, _Array) else value
