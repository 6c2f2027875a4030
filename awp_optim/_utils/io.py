"""Files that are either as they were or whole."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_write"]


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write to beside ``path``, moved there when it is whole and on the disk.

    It is a hidden one, ``.NAME.HOST.PID.part``, so that writers do not meet; after an exception it
    is gone.

    Raises:
        OSError: it cannot be written or moved; what was there before is intact.
    """
    part = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
