"""Atomic writes: a reader finds either the previous or the new content, never a part of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_write", "naming", "write_text"]


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, and move it to ``path`` once its content is on disk.

    The temporary file is hidden and in the same folder, ``.NAME.HOST.PID.part``, so that each
    process has its own. It is removed after an exception.

    Raises:
        OSError: the file cannot be written or moved; ``path`` is unchanged. The error names
            ``path``, not the temporary file.
    """
    part = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}.part"
    try:
        with naming(path, instead_of=part):
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as :func:`atomic_write` does."""
    with atomic_write(path) as file:
        file.write(text.encode())


@contextmanager
def naming(path: Path, instead_of: Path | None = None) -> Iterator[None]:
    """Make OSErrors that name no file, or ``instead_of``, name ``path``."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or str(error.filename) == str(instead_of)
        if error.errno is None or not unnamed:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
