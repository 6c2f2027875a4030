"""What the commands share: types of options, parsing, the terminal, images, classifiers."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryFile
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args

import torch
import tyro
from rich.console import Console
from rich.table import Table
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from awp_optim.lab.data import DATASETS, ImageData, load

__all__ = [
    "CLASSIFIER",
    "ClassifierOptions",
    "DataOptions",
    "Dataset",
    "Device",
    "Flag",
    "Number",
    "Positive",
    "check_writable",
    "default_device",
    "number",
    "one_of",
    "parse",
    "peek",
    "print_table",
    "terminal",
]

T = TypeVar("T")


def number(text: str) -> float:
    """A number or a fraction.

    >>> number("51/255"), number("1e-3")
    (0.2, 0.001)
    """
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{text!r} is not a number or a fraction such as 8/255") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"must be an integer above 0, not {text}")
    return int(text)


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"{text!r} is not a device such as cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"this machine has {torch.cuda.device_count()} CUDA devices, not {text}")
    return text


def _spec(
    metavar: str, read: Callable[[str], Any], show: str = ""
) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [format(value, show)],
    )


def one_of(names: Iterable[str], metavar: str | None = None) -> PrimitiveConstructorSpec[str]:
    """One of several words. With ``metavar``, neither the help nor an error lists all of them."""
    names = tuple(names)

    def read(words: Sequence[str]) -> str:
        if words[0] not in names:
            near = get_close_matches(words[0], names)
            raise ValueError(
                f"there is no {words[0]!r}" + f"; the closest are {', '.join(near)}" * bool(near)
            )
        return words[0]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar or "{" + ",".join(names) + "}",
        instance_from_str=read,
        is_instance=lambda value: value in names,
        str_from_instance=lambda value: [value],
        choices=None if metavar else names,
    )


_NUMBER = _spec("NUMBER", number, "g")
Number = Annotated[float, _NUMBER]
Positive = Annotated[int, _spec("N", _positive)]
Device = Annotated[str, _spec("DEVICE", _device)]
Dataset = Annotated[str, one_of(DATASETS)]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]

_registry = ConstructorRegistry()


@_registry.primitive_rule
def _fractions(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[float] | None:
    """Every float can be given as a fraction."""
    return _NUMBER if info.type is float else None


@_registry.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """An option that may be None is None unless it is given; the word None is not accepted."""
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    if info.type_origin not in (Union, UnionType) or len(kinds) != 1:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: (
            ["None"] if value is None else spec.str_from_instance(value)
        ),
    )


def parse(
    options: Callable[..., T],
    arguments: Sequence[str],
    prog: str,
    help: str,
    default: T | None = None,
) -> T:
    """Read a command line; a mistake in it ends the program with exit status 2.

    Args:
        options: a dataclass, whose fields are the options.
        arguments: the words of the command line.
        prog: the program's name, for the help.
        help: what ``--help`` says above the options.
        default: the options that are not given; None for the defaults of the fields.
    """
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    read: T = tyro.cli(
        options, args=arguments, prog=prog, description=help, registry=_registry, **defaults
    )
    return read


def peek(function: Callable[..., T], arguments: Sequence[str], prog: str) -> T:
    """Call a function with the options that it takes, and ignore the others."""
    result: T
    result, _ = tyro.cli(
        function,
        args=arguments,
        prog=prog,
        registry=_registry,
        add_help=False,
        return_unknown_args=True,
    )
    return result


def default_device() -> str:
    """ "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def terminal() -> Console:
    """The standard output, without markup: a path may contain brackets."""
    width = None if sys.stdout.isatty() else 130
    return Console(width=width, markup=False, highlight=False, emoji=False)


def print_table(
    console: Console, cells: Sequence[Sequence[str]], title: str | None = None, bold: str = ""
) -> None:
    """Print a table of names and numbers.

    Args:
        console: where to print it.
        cells: row by row; the first row is the head.
        title: printed above it.
        bold: the name of the row to emphasize.
    """
    head, *rows = cells
    table = Table(title=title)
    for i, column in enumerate(head):
        # On a narrow terminal only the head is wrapped.
        widest = max((len(row[i]) for row in rows), default=0)
        table.add_column(column, justify="right" if i else "left", min_width=widest)
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == bold else None)
    console.print(table)


def check_writable(path: Path) -> None:
    """Raise an OSError for a file that could not be written; nothing is left on the disk."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror})") from error


CLASSIFIER = tyro.conf.create_mutex_group(required=True, title="classifier")


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """Which classifier is used, and where."""

    checkpoint: Annotated[Path | None, CLASSIFIER] = None
    """A checkpoint of awp train, a state dict, or the name of a network that ships with awp."""
    model: Annotated[str | None, CLASSIFIER, tyro.conf.arg(metavar="MODULE:FUNCTION")] = None
    """A function to import and call, which returns a torch module of images in [0, 1]."""
    arch: str | None = None
    """The checkpoint's network, also as in papers (WideResNet-34-10); else the one it names."""
    num_classes: Positive | None = None
    """The checkpoint's classes; else as many as its head has."""
    device: Device = field(default_factory=default_device)
    """Device of the classifier."""

    def __post_init__(self) -> None:
        if self.checkpoint is None and (self.arch or self.num_classes):
            raise ValueError("--arch and --num-classes go with --checkpoint")


@dataclass(frozen=True)
class DataOptions:
    """The images to use."""

    dataset: Dataset | None = None
    """Name of the data set."""
    data_dir: Path = Path("data")
    """Folder of the data sets; with --dataset folder or npz, the images themselves."""
    image_size: Positive | None = None
    """Side to which the images of a folder are resized."""
    limit: Positive | None = None
    """Use at most this many training and test images."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.dataset != "folder":
            raise ValueError("--image-size is for --dataset folder")

    def load(self) -> ImageData:
        """The images of the data set, within the limit."""
        assert self.dataset is not None
        size = {} if self.image_size is None else {"size": self.image_size}
        data = load(self.dataset, self.data_dir, **size)
        if self.limit is None:
            return data
        return data.limit(min(self.limit, len(data.x_train)), min(self.limit, len(data.x_test)))
