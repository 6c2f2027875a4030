"""A lock on a folder, which the kernel releases however its holder ends."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderLock"]


class FolderLock:
    """An exclusive lock on a folder, held until :meth:`release` or the end of the process.

    The lock is on the open file ``.lock``, so a killed process may leave the file behind but never
    the lock. On a file system without locks nothing is locked.

    Raises:
        BlockingIOError: another process holds the lock; the message says which.
        OSError: no file can be made in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._descriptor = self._acquire()
        while not self._is_in_place():  # the last holder removed the file in between
            os.close(self._descriptor)
            self._descriptor = self._acquire()
        with suppress(OSError):  # on a full disk the lock holds without a name
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        """Remove the file and release the lock."""
        with suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)

    def _acquire(self) -> int:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise BlockingIOError(
                f"{holder} is running in {self._path.parent}: wait for it or stop it, or choose "
                "another folder"
            ) from error
        except OSError:  # a file system without locks
            pass
        return descriptor

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except FileNotFoundError:
            return False
