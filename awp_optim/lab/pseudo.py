"""Images with pseudo-labels, for robust self-training (RST).

Carmon et al., "Unlabeled data improves adversarial robustness", 2019
(https://arxiv.org/abs/1905.13736), Section 3: a classifier trained without an adversary labels
images that have no labels; these are then trained on beside the labeled ones.

    labeled = pseudo_label(classifier, images)
    labeled = load_pseudo_labeled("ti_500K.npz")

The file holds the 500,000 images of TinyImages that they published for CIFAR-10, converted once by
:mod:`awp_optim.lab.tinyimages`. Generated images come in the same kind of file, in one or several
parts. Images stay in their files until a batch needs them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from awp_optim._utils.batches import device_of
from awp_optim._utils.io import atomic_write
from awp_optim._utils.model_state import in_mode
from awp_optim.attacks.oracle import Model
from awp_optim.lab.data import ImageData
from awp_optim.lab.data.arrays import ArrayFile, StoredArray
from awp_optim.lab.data.images import check_images, check_labels
from awp_optim.lab.data.stored import StoredImages

__all__ = [
    "PseudoLabeled",
    "classify",
    "confident",
    "load_images",
    "load_pseudo_labeled",
    "pseudo_label",
    "save_pseudo_labeled",
]


@dataclass(frozen=True, eq=False)
class PseudoLabeled:
    """Images with labels that a classifier, or the generator of the images, gave them.

    Attributes:
        x: Images, uint8 in [0, 255], shape (N, C, H, W), in memory or in files.
        y: Labels, int64 from 0, shape (N,).

    Raises:
        ValueError: The dtype or shape of a tensor, or a label, is not as above.
    """

    x: Tensor | StoredImages
    y: Tensor

    def __post_init__(self) -> None:
        check_images("x", self.x)
        check_labels("y", self.y, len(self.x))

    def __len__(self) -> int:
        return len(self.x)

    def cpu(self) -> PseudoLabeled:
        """The same images, in the memory of the host if they were on a GPU."""
        x = self.x.cpu() if isinstance(self.x, Tensor) else self.x
        return replace(self, x=x, y=self.y.cpu())

    def empty(self, n: int, *, pin_memory: bool = False) -> Tensor:
        """Memory for n images, to :meth:`read` into."""
        memory_format = getattr(self.x, "memory_format", torch.contiguous_format)
        return torch.empty(
            (n, *self.x.shape[1:]),
            dtype=torch.uint8,
            memory_format=memory_format,
            pin_memory=pin_memory,
        )

    def read(self, index: Tensor, out: Tensor) -> Tensor:
        """Copy images on the CPU into a tensor, and return it; a thread may call this at any time.

        Args:
            index: Which images, int64 of shape (n,).
            out: What :meth:`empty` returned.

        Raises:
            OSError: A file cannot be read, or is shorter than when it was opened.
        """
        if isinstance(self.x, StoredImages):
            return self.x.read(index, out)
        # numpy, since torch would start more threads.
        np.take(self.x.numpy(), index.numpy(), axis=0, out=out.numpy(), mode="clip")
        return out

    def check_fits(self, data: ImageData) -> None:
        """Check that one can train on these images beside ``data``.

        Raises:
            ValueError: The images differ in shape, or a label is not among the classes of the data.
        """
        shape, expected = tuple(self.x.shape[1:]), tuple(data.x_train.shape[1:])
        if shape != expected:
            raise ValueError(
                f"the images with pseudo-labels{self._source(0)} have shape {shape} (channels, "
                f"height, width), those of {data.name} have {expected}"
            )
        if len(self) and int(self.y.max()) >= data.num_classes:
            raise ValueError(
                f"the pseudo-labels{self._source(int(self.y.argmax()))} go up to "
                f"{int(self.y.max())}, but {data.name} has {data.num_classes} classes, numbered "
                "from 0"
            )

    def _source(self, index: int) -> str:
        """Where an image comes from, for a message."""
        return f" in {self.x.file_of(index)}" if isinstance(self.x, StoredImages) else ""


# --- From a classifier --------------------------------------------------------------------------


def pseudo_label(model: Model, x: Tensor | StoredImages, batch_size: int = 512) -> PseudoLabeled:
    """Label images with a classifier; arguments and errors are those of :func:`classify`."""
    return PseudoLabeled(x, classify(model, x, batch_size)[0])


@torch.no_grad()
def classify(
    model: Model,
    x: Tensor | StoredImages,
    batch_size: int = 512,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The class that a classifier gives each image, and the probability it gives the class.

    Args:
        model: Maps float32 images in [0, 1] to logits of shape (N, classes). A module is put in
            eval mode for the duration of the call, and gets the images on its own device.
        x: Images, uint8, shape (N, C, H, W), in memory or in files.
        batch_size: Number of images in a batch.
        on_step: Called after each batch with the number of batches done and their total.

    Returns:
        The classes, int64, and their probabilities (softmax), float32 in (0, 1], both of shape
        (N,) and on the device of ``x``. Among equal logits the first wins.

    Raises:
        ValueError: ``x`` is not as above or empty, ``batch_size`` is below 1, or the model returns
            something other than finite logits for at least 2 classes.
    """
    check_images("x", x)
    if not len(x):
        raise ValueError("there are no images to label")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    device = device_of(model, None) or x.device
    starts = range(0, len(x), batch_size)
    y, confidence = [], []
    with in_mode(model, "eval"):
        for i, start in enumerate(starts):
            batch = x[start : start + batch_size]
            logits = model(batch.to(device).float() / 255)
            _check_logits(logits, len(batch), first=start)
            y.append(logits.argmax(1).to(x.device))
            confidence.append(logits.float().softmax(1).amax(1).to(x.device))
            if on_step:
                on_step(i + 1, len(starts))
    return torch.cat(y), torch.cat(confidence)


def confident(confidence: Tensor, least: float) -> Tensor:
    """Which confidences are at least ``least``, as booleans.

    Raises:
        ValueError: all confidences are lower.
    """
    kept = confidence >= least
    if not kept.any():
        raise ValueError(
            f"the confidence is below {least:g} for all {len(confidence)} images, at most "
            f"{float(confidence.max()):.4g}; choose a lower one"
        )
    return kept


def _check_logits(logits: object, n: int, first: int) -> None:
    """Check the output for a batch of n images, the first of which has the index ``first``."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the classifier must return a tensor of logits, not {got}")
    if logits.ndim != 2 or len(logits) != n or logits.shape[1] < 2:
        raise ValueError(
            "the classifier must return logits of shape (N, classes) for 2 classes or more, not "
            f"{tuple(logits.shape)} for {n} images"
        )
    if not logits.isfinite().all():
        raise ValueError(
            f"the classifier returns logits that are not finite, from image {first} on: did its "
            "training diverge?"
        )


# --- In files ---------------------------------------------------------------------------------

# The second names are those of the data that papers on generated images publish.
IMAGES = ("x", "image", "data")
LABELS = ("y", "label")


def load_pseudo_labeled(*files: str | os.PathLike[str]) -> PseudoLabeled:
    """Images and their labels from one or several files, each as :func:`load_images` reads it.

    Raises:
        OSError: There is no such file, or it cannot be opened.
        ValueError: As in :func:`load_images`, a file has no labels, or the images of two files
            differ in shape.
    """
    parts = []
    for file in files:
        x, y = _find(file)
        if y is None:
            raise ValueError(
                f"{file} has no labels, {' or '.join(LABELS)}; awp pseudo-label makes them with "
                "a classifier"
            )
        parts.append((x, y))
    xs, ys = zip(*parts, strict=True)
    return PseudoLabeled(StoredImages(xs), torch.cat(ys))


def load_images(file: str | os.PathLike[str]) -> tuple[StoredImages, Tensor | None]:
    """Images from a file, where they stay, and their labels if it has any.

    The file is an ``.npz`` file with ``x``, ``image``, ``data`` or a single array, and with ``y``
    or ``label`` for the labels; or an ``.npy`` file. Images are uint8, (N, H, W, C) or
    (N, C, H, W): the smaller of the second and the last axis is taken for the channels. Labels are
    integers from 0, shape (N,). Other arrays are ignored. Compressed images are unpacked once, into
    a file beside this one.

    Returns:
        The images, uint8, shape (N, C, H, W); the labels, int64, shape (N,), or None.

    Raises:
        OSError: There is no such file, it cannot be opened, or its images cannot be unpacked.
        ValueError: It is a file of another kind, damaged, or its arrays are not as above; the
            message names the file.
    """
    x, y = _find(file)
    return StoredImages([x]), y


def _find(file: str | os.PathLike[str]) -> tuple[StoredArray, Tensor | None]:
    """Where the images of a file are, and its labels."""
    try:
        arrays = ArrayFile(file)
    except ValueError as error:
        raise ValueError(
            f"{error} (python -m awp_optim.lab.tinyimages converts the published pickle)"
        ) from None
    label = next((name for name in LABELS if name in arrays.names), None)
    single = label is None and len(arrays.names) == 1
    y = None if label is None else arrays.labels(label)
    x = arrays.stored(arrays.names[0] if single else arrays.find("images", IMAGES))
    if y is not None and x.shape[:1] != y.shape:
        raise ValueError(f"{file} has {x.shape[0]} images and {len(y)} labels")
    return x, y


def save_pseudo_labeled(labeled: PseudoLabeled, file: str | os.PathLike[str]) -> None:
    """Write an ``.npz`` file with ``x``, uint8 (N, C, H, W), and ``y``, int64 (N,).

    The file replaces an older one only when it is complete. Folders are created if needed.

    Raises:
        OSError: It cannot be written.
        ValueError: There are no images, or at least as many channels as columns, so that the file
            could not be read back.
    """
    shape = tuple(labeled.x.shape)
    if not len(labeled):
        raise ValueError("there are no images to save")
    if not shape[1] < shape[3]:
        raise ValueError(
            f"images of {shape} cannot be saved: they need fewer channels than columns"
        )
    path = Path(file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        np.savez(stream, x=labeled.x[:].cpu().numpy(), y=labeled.y.cpu().numpy())
