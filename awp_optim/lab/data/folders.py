"""A tree of image files with one folder for each class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from awp_optim.lab.data.images import ImageData
from awp_optim.lab.data.sources import one_line

if TYPE_CHECKING:
    from PIL import Image
    from torchvision.datasets import ImageFolder

__all__ = ["load_folder"]

TEST_FRACTION = 0.2
LAYOUT = "path/train/<class>/ and path/test/<class>/, or path/<class>/"


def load_folder(path: str | os.PathLike[str], size: int | None = None) -> ImageData:
    """Images in a folder for each class: ``path/train/<class>/*`` and ``path/test/<class>/*``.

    Or a single tree, ``path/<class>/*``, of which a random fifth of every class (the same in every
    call) becomes the test part. :class:`torchvision.datasets.ImageFolder` finds the files and the
    classes, both in alphabetical order. The data have one channel if every image is gray, else
    three. ``mean`` and ``std`` are measured on the training part. The images must fit into memory.

    Args:
        path: The root of the tree; its name becomes the name of the data set.
        size: Height and width in pixels to which every image is resized (bilinear, antialiased,
            proportions are not kept). None leaves the sizes, which must then be equal.

    Raises:
        ImportError: torchvision is not installed.
        NotADirectoryError: ``path`` is not a folder.
        ValueError: The layout is another one, train and test have different classes, sizes differ
            and ``size`` is None, or a file is not an image with 8 bits a channel; the message
            names the file or folder.
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be 1 or more, not {size}")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise NotADirectoryError(f"not a folder of images: {root}")

    if (root / "train").is_dir() and (root / "test").is_dir():
        trees = [_tree(root / "train", size), _tree(root / "test", size)]
        _check_same_classes(root, *trees)
        in_test = torch.arange(sum(map(len, trees))) >= len(trees[0])
    else:
        trees = [_tree(root, size)]
        in_test = _draw_test(torch.tensor(trees[0].targets))
        if not in_test.any():
            raise ValueError(f"{root} has too few images for a test part of {TEST_FRACTION:g}")

    x = _read(trees)
    y = torch.tensor([label for tree in trees for label in tree.targets])
    return ImageData(
        x[~in_test],
        y[~in_test],
        x[in_test],
        y[in_test],
        classes=tuple(trees[0].classes),
        name=root.resolve().name,
    ).with_statistics()


def _tree(root: Path, size: int | None) -> ImageFolder:
    """The tree below ``root`` as a data set of uint8 tensors of shape (3, H, W)."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    resize = [] if size is None else [v2.Resize((size, size))]
    transform = v2.Compose([*resize, v2.PILToTensor()])
    try:
        tree = ImageFolder(str(root), transform=transform, loader=_open)
    except FileNotFoundError as error:
        raise ValueError(f"{root}: {error} (the layout is {LAYOUT})") from error
    for file, _ in tree.samples:  # else path/train/<class>/ alone would be one class, train
        if Path(file).parent.parent != root:
            raise ValueError(f"{file} is too deep in {root} (the layout is {LAYOUT})")
    return tree


def _check_same_classes(root: Path, train: ImageFolder, test: ImageFolder) -> None:
    if train.classes != test.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
        raise ValueError(f"{root}: train and test must have the same classes; one lacks {odd}")


def _open(file: str) -> Image.Image:
    from PIL import Image

    with Image.open(file) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"more than 8 bits a channel (Pillow's mode {image.mode})")
        rgb: Image.Image = image.convert("RGB")
        return rgb


def _draw_test(y: Tensor) -> Tensor:
    """Which images become the test part, as booleans: the same share of every class."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.zeros(len(y), dtype=torch.bool)
    for label in range(int(y.max()) + 1):
        own = (y == label).nonzero()[:, 0]
        n = min(round(TEST_FRACTION * len(own)), len(own) - 1)  # one image stays to train on
        drawn[own[torch.randperm(len(own), generator=generator)[:n]]] = True
    return drawn


def _read(trees: list[ImageFolder]) -> Tensor:
    """All images as uint8 (N, C, H, W), with C = 1 if every one is gray."""
    images = {tree.samples[i][0]: _image(tree, i) for tree in trees for i in range(len(tree))}
    sizes = {f"{x.shape[2]}x{x.shape[1]}": file for file, x in images.items()}
    if len(sizes) > 1:
        examples = ", ".join(f"{file} is {size}" for size, file in list(sizes.items())[:2])
        raise ValueError(f"images differ in size: {examples}; give the size to resize them to")
    x = torch.stack(list(images.values()))
    return x[:, :1].contiguous() if (x == x[:, :1]).all() else x


def _image(tree: ImageFolder, i: int) -> Tensor:
    try:
        image: Tensor = tree[i][0]
    except Exception as error:  # Pillow raises whatever the reader of a format stumbles over
        raise ValueError(f"{tree.samples[i][0]} cannot be read: {one_line(error)}") from error
    return image
