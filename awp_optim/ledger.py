"""What an evaluation has done so far, so that one of hours goes on after a kill."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .files import replacing

__all__ = ["Ledger", "checksum"]


def checksum(tensors: Iterable[object]) -> int:
    """Of the tensors among them, one after the other."""
    crc = 0
    for t in tensors:
        if isinstance(t, Tensor):
            flat = t.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc)
    return crc


class Ledger:
    """What is done so far: for each batch an entry for each attack; on disk a line for each.

    Lines are only ever added, so a kill can cost the last one alone.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: dict[str, Any]) -> None:
        self.batches: list[dict[str, Any]] = []
        self._data: list[int] = []
        self._path = None if path is None else Path(path)
        self._settings = settings
        self._file: BinaryIO | None = None
        self._old: list[dict[str, Any]] = []
        if self._path is not None and self._path.exists():
            self._old = self._read(self._path)

    def _read(self, path: Path) -> list[dict[str, Any]]:
        lines = path.read_bytes().split(b"\n")[:-1]  # what no line end closes was cut off
        try:
            header, *entries = [json.loads(line) for line in lines]
            there = header["evaluation"]
            differing = [k for k, v in self._settings.items() if there.get(k, v) != v]
            batches: dict[int, dict[str, Any]] = {}
            for entry in entries:
                batch = batches.setdefault(entry.pop("batch"), {})
                batch["data"] = entry.pop("data")
                batch[entry.pop("name")] = entry
            if sorted(batches) != list(range(len(batches))):
                raise ValueError("batches are missing")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not the state of an evaluation, or damaged ({error}): delete it, or "
                "choose another file"
            ) from error
        if differing:
            raise ValueError(
                f"{path} is the state of an evaluation with other {', '.join(differing)}: go on "
                "with the same, or delete it to start again"
            )
        return [batches[i] for i in range(len(batches))]

    def __enter__(self) -> Ledger:
        if self._path is None:
            return self
        with replacing(self._path) as file:
            file.write(self._line({"evaluation": self._settings}))
            for i, batch in enumerate(self._old):
                for name, entry in batch.items():
                    if name != "data":
                        file.write(
                            self._line({"batch": i, "data": batch["data"], "name": name, **entry})
                        )
        self._file = open(self._path, "ab")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def open_batch(self, i: int, x: Tensor, y: Tensor) -> None:
        """Begin with a batch, or go on with what is known of it."""
        data = checksum([x, y.to(torch.int64)]) if self._path is not None else 0
        known = dict(self._old[i]) if i < len(self._old) else {"data": data}
        if known.pop("data") != data:
            raise ValueError(
                f"{self._path} is the state of an evaluation on other data: batch {i} differs. Go "
                "on with the same images in the same batches, or delete it to start again"
            )
        self.batches.append(known)
        self._data.append(data)

    def add(self, i: int, name: str, entry: dict[str, Any]) -> None:
        """Note what came of an attack; it is on the disk when this returns."""
        self.batches[i][name] = entry
        if self._file is not None:
            line = {"batch": i, "data": self._data[i], "name": name, **entry}
            self._file.write(self._line(line))
            self._file.flush()
            os.fsync(self._file.fileno())

    @staticmethod
    def _line(value: dict[str, Any]) -> bytes:
        return json.dumps(value, separators=(",", ":")).encode() + b"\n"
