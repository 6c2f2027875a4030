"""What a measurement has done so far, so that one of hours goes on after a kill."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from awp_optim._utils.io import atomic_write

__all__ = ["Journal", "EvaluationJournal", "checksum"]


def checksum(tensors: Iterable[object]) -> int:
    """Of the tensors among them, one after the other."""
    crc = 0
    for t in tensors:
        if isinstance(t, Tensor):
            flat = t.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc)
    return crc


class Journal:
    """A file of JSON lines: a header that says of what it is, then an entry each, only ever added.

    So a kill can cost the last one alone. Entering it begins the file, or goes on with it.

    Args:
        path: of the file; None keeps nothing.
        kind: of what it is the state, such as "an evaluation".
        settings: what decides the results, of JSON's types.

    Attributes:
        entries: what the file holds already.

    Raises:
        ValueError: the file is damaged, of another kind or of other settings; it is left as it is.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, kind: str, settings: dict[str, Any]
    ) -> None:
        self.path = None if path is None else Path(path)
        self.entries: list[dict[str, Any]] = []
        self._kind, self._settings = kind, settings
        self._file: BinaryIO | None = None
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")[:-1]  # what no line end closes was cut off
        try:
            header, *self.entries = [json.loads(line) for line in lines]
            there = header[self._key]
            differing = [k for k, v in self._settings.items() if there.get(k, v) != v]
            if not all(isinstance(entry, dict) for entry in self.entries):
                raise ValueError("an entry is none")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.damaged(error) from error
        if differing:
            raise ValueError(
                f"{path} is the state of {self._kind} with other {', '.join(differing)}: go on "
                "with the same, or delete it to start again"
            )

    def damaged(self, error: Exception) -> ValueError:
        """The error of a file that cannot be gone on with."""
        return ValueError(
            f"{self.path} is not the state of {self._kind}, or damaged ({error}): delete it, or "
            "choose another file"
        )

    def __enter__(self) -> Journal:
        if self.path is not None:
            with atomic_write(self.path) as file:
                for line in ({self._key: self._settings}, *self.entries):
                    file.write(_line(line))
            self._file = open(self.path, "ab")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, entry: dict[str, Any]) -> None:
        """It is on the disk when this returns."""
        if self._file is not None:
            self._file.write(_line(entry))
            self._file.flush()
            os.fsync(self._file.fileno())

    @property
    def _key(self) -> str:
        return self._kind.split()[-1]


class EvaluationJournal:
    """What an evaluation has done so far: for each batch an entry for each attack."""

    def __init__(self, path: str | os.PathLike[str] | None, settings: dict[str, Any]) -> None:
        self.batches: list[dict[str, Any]] = []
        self._data: list[int] = []
        self._journal = Journal(path, "an evaluation", settings)
        old: dict[int, dict[str, Any]] = {}
        try:
            for line in self._journal.entries:
                entry = dict(line)
                batch = old.setdefault(entry.pop("batch"), {})
                batch["data"] = entry.pop("data")
                batch[entry.pop("name")] = entry
            if sorted(old) != list(range(len(old))):
                raise ValueError("batches are missing")
        except (ValueError, KeyError, TypeError) as error:
            raise self._journal.damaged(error) from error
        self._old = [old[i] for i in range(len(old))]

    def __enter__(self) -> EvaluationJournal:
        self._journal.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._journal.__exit__(*exception)

    def open_batch(self, i: int, x: Tensor, y: Tensor) -> None:
        """Begin with a batch, or go on with what is known of it."""
        data = checksum([x, y.to(torch.int64)]) if self._journal.path is not None else 0
        known = dict(self._old[i]) if i < len(self._old) else {"data": data}
        if known.pop("data") != data:
            raise ValueError(
                f"{self._journal.path} is the state of an evaluation on other data: batch {i} "
                "differs. Go on with the same images in the same batches, or delete it to start "
                "again"
            )
        self.batches.append(known)
        self._data.append(data)

    def add(self, i: int, name: str, entry: dict[str, Any]) -> None:
        """Note what came of an attack; it is on the disk when this returns."""
        self.batches[i][name] = entry
        self._journal.add({"batch": i, "data": self._data[i], "name": name, **entry})


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
