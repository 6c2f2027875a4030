"""A run's metrics as TensorBoard logs."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["TensorBoardLog"]


class TensorBoardLog:
    """Logs rows of metrics in a folder, if TensorBoard is installed.

    The logs are an extra: if they cannot be written there is one warning, and no more logs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._enabled = True

    def add(self, row: dict[str, float]) -> None:
        """Log a row. What an earlier run logged for this epoch and later ones is dropped."""
        if not self._enabled:
            return
        epoch = int(row["epoch"])
        try:
            if self._writer is None:
                self._writer = _open_writer(self._folder, epoch)
            if self._writer is None:
                self._enabled = False
                return
            for name, value in row.items():
                part, _, what = name.rpartition("_")
                self._writer.add_scalar(f"{what}/{part}" if part else name, value, epoch)
            self._writer.flush()
        except OSError as error:
            warnings.warn(f"no more logs for TensorBoard: {error}", RuntimeWarning, stacklevel=2)
            self._enabled = False
            self.close()

    def close(self) -> None:
        """Close the logs."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
            self._writer = None


def _open_writer(folder: Path, epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=epoch)
