"""Resumable journals: files that save the finished steps of a measurement."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from awp_optim._utils.io import atomic_write, naming

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Journal", "checksum"]


class Journal:
    """A file of JSON lines: a header with the settings of a measurement, then one entry per step.

    Entries are only appended, so a killed process loses at most the last one. As a context manager,
    it creates the file, or resumes it without an incomplete last line. If an exception ends the
    measurement before its first entry, no file remains.

    Args:
        path: the file; None saves nothing.
        kind: what is measured, such as "an evaluation". Its last word is the header's key.
        settings: everything that determines the results, in JSON types.

    Attributes:
        entries: the entries that the file already held.

    Raises:
        ValueError: the file is damaged, or has another kind or other settings. It is not changed.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, kind: str, settings: dict[str, Any]
    ) -> None:
        self.path = None if path is None else Path(path)
        self.entries: list[dict[str, Any]] = []
        self._kind, self._settings = kind, settings
        self._key = kind.split()[-1]
        self._file: BinaryIO | None = None
        self._is_empty = True
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")[:-1]  # drops an incomplete last line
        try:
            header, *self.entries = [json.loads(line) for line in lines]
            recorded = dict(header[self._key])
            if not all(isinstance(entry, dict) for entry in self.entries):
                raise ValueError("an entry is not an object")
        except (ValueError, KeyError, TypeError) as error:
            raise self.damaged(error) from error
        differing = [k for k, v in self._settings.items() if not self._is_same(k, v, recorded)]
        if differing:
            raise ValueError(
                f"{path} belongs to {self._kind} with other {', '.join(differing)}: resume with "
                "the same settings, or delete it to start again"
            )

    def _is_same(self, name: str, value: Any, recorded: dict[str, Any]) -> bool:
        """Whether a measurement with this value of a setting continues the recorded one."""
        return name in recorded and bool(recorded[name] == value)

    def damaged(self, error: Exception) -> ValueError:
        """The error to raise for a file that cannot be resumed."""
        return ValueError(
            f"{self.path} is damaged or not the state of {self._kind} ({error}): delete it, or "
            "choose another file"
        )

    def __enter__(self) -> Self:
        if self.path is not None:
            with atomic_write(self.path) as file:
                for line in ({self._key: self._settings}, *self.entries):
                    file.write(_as_line(line))
            self._file = open(self.path, "ab")
        self._is_empty = not self.entries
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None and self.path is not None:
            with naming(self.path):
                self._file.close()
            if self._is_empty:
                self.path.unlink(missing_ok=True)

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry, and write it to disk.

        Raises:
            OSError: it could not be written, for example on a full disk. Running the measurement
                again resumes after the last saved entry.
        """
        if self._file is not None and self.path is not None:
            with naming(self.path):
                self._file.write(_as_line(entry))
                self._file.flush()
                os.fsync(self._file.fileno())
            self._is_empty = False


def checksum(tensors: Iterable[Tensor], start: int = 0) -> int:
    """The CRC-32 of the tensors' bytes, concatenated, continuing from ``start``."""
    crc = start
    for t in tensors:
        flat = t.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc)
    return crc


def _as_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
