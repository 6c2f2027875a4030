"""The files of a run: ``config.json``, ``metrics.csv``, ``best.pt``, ``last.pt``, ``tensorboard``.

With ``save_every`` also ``epoch_0020.pt`` and so on, which hold the same as ``best.pt``. Each file
is written beside its place and moved there when it is whole, so that at any moment a run folder can
be read, and gone on with.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from awp_optim._utils.io import atomic_write
from awp_optim.lab.config import REMOVED, Config

__all__ = ["Row", "RunFolder", "best", "foreign", "read_metrics", "refuse_run"]

Row = dict[str, float]
"""One line of ``metrics.csv``.

``train_*``, ``test_*`` and ``val_*`` (images held out, with ``select_on="val"``) are measured
alike, with the test attack in eval mode at the weights as they are saved, so that the difference of
the first two is the generalisation gap. ``step_*`` are averages over the training steps of the
epoch, at the weights that gave the updates (w + v with AWP): what the published logs call training
figures. ``step_robust_loss`` is the method's objective. ``ema_test_*`` and ``ema_val_*`` are of the
averaged weights, where there are any.
"""

RESULTS = ("last.pt", "best.pt", "metrics.csv")
COLUMNS = (
    "epoch",
    "lr",
    "train_seconds",
    "eval_seconds",
    "step_robust_loss",
    "step_robust_acc",
    *(
        f"{part}_{kind}_{what}"
        for part in ("train", "test", "val", "ema_test", "ema_val")
        for kind in ("natural", "robust")
        for what in ("loss", "acc")
    ),
)


def best(rows: list[Row]) -> Row:
    """The epoch with the highest robust accuracy, the first of equals.

    On the images held out, if the run had some; else on the test set, the paper's "best".
    """
    name = "val_robust_acc" if any("val_robust_acc" in row for row in rows) else "test_robust_acc"
    return max((row for row in rows if name in row), key=lambda row: row[name])


def read_metrics(folder: Path | str) -> list[Row]:
    """The rows of a run folder's ``metrics.csv``."""
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def refuse_run(path: Path) -> None:
    """Raise FileExistsError if there are files of a run in the folder."""
    if any((path / name).exists() for name in ("config.json", *RESULTS)):
        raise FileExistsError(
            f"{path} already holds a run: go on with --resume, or choose another folder"
        )


def foreign(path: Path, why: str) -> ValueError:
    """The error of a folder whose ``last.pt`` cannot be gone on with."""
    return ValueError(
        f"{path / 'last.pt'} is not a checkpoint of this run, or damaged "
        f"({' '.join(why.split())[:200]}). Nothing was changed. Put a copy of it back, or "
        "remove it to begin again in this folder"
    )


class RunFolder:
    """A run's folder, not touched before :meth:`begin`.

    Args:
        path: where.
        config: the run's settings.
        about: what else decides the run (the data set, the initial weights), to be kept in
            ``config.json`` and compared when the run is gone on with.
        resume: whether a run that is there may be gone on with.

    Raises:
        FileExistsError: there is a run, and ``resume`` is False.
        ValueError: the run that is there had other settings, or its ``config.json`` is damaged.
    """

    def __init__(self, path: Path, config: Config, about: Mapping[str, Any], resume: bool) -> None:
        self.path = path
        self.about = {**asdict(config), "attack_mode": config.training_mode, **about}
        self._board: Any = None
        if not resume:
            refuse_run(path)
        elif any((path / name).exists() for name in RESULTS):  # else there is nothing to lose
            self._compare(self._read_config())

    def begin(self) -> None:
        """Make the folder if needed, and write ``config.json``.

        Raises:
            OSError: it cannot be written to.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(".*.part"):  # by a run that was killed while it wrote
            left.unlink(missing_ok=True)
        self._write("config.json", json.dumps(self.about, indent=2).encode())

    def _read_config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        try:
            return dict(json.loads(file.read_text()))
        except FileNotFoundError as error:
            raise ValueError(
                f"{file} is not there, beside files of a run: put it back, or choose another folder"
            ) from error
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}): put the run's own back, or choose another folder"
            ) from error

    def _compare(self, before: Mapping[str, Any]) -> None:
        # A folder may be older than a setting: it had what is now the default.
        older = {"unlabeled_images": 0, "data": self.about.get("data"), **asdict(Config())}
        before = {**older, **before}
        changed = [k for k, now in self.about.items() if before.get(k) != now]
        if used := [k for k, default in REMOVED.items() if before.get(k, default) != default]:
            raise ValueError(
                f"the run in {self.path} cannot be resumed: it used {', '.join(used)}, which has "
                "been removed"
            )
        if changed:
            raise ValueError(
                f"the run in {self.path} cannot be resumed with other settings: "
                + ", ".join(f"{k} was {before.get(k)}, is {self.about[k]}" for k in changed)
            )

    def load_last(self, device: torch.device) -> dict[str, Any] | None:
        """The content of ``last.pt``, or None if there is none yet.

        Raises:
            OSError: it is there, but cannot be opened.
            ValueError: it is damaged, or no checkpoint of this run.
        """
        file = self.path / "last.pt"
        if not file.exists():
            return None
        try:
            saved = torch.load(file, map_location=device, weights_only=True)
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the damage made of it
            raise foreign(self.path, f"{type(error).__name__}: {error}") from error
        needed = {"model", "optimizer", "rows", "config"}
        if not isinstance(saved, dict) or not needed <= saved.keys():
            raise foreign(self.path, "it holds something else")
        self._compare(saved["config"])  # it may be of another run
        return saved

    def save_best(self, content: Mapping[str, Any]) -> None:
        """Write ``best.pt``: ``content`` and the settings."""
        self._save("best.pt", content)

    def save_epoch(self, epoch: int, content: Mapping[str, Any]) -> None:
        """Write ``epoch_0020.pt`` after 20 epochs: ``content`` and the settings."""
        self._save(f"epoch_{epoch:04d}.pt", content)

    def save_last(self, content: Mapping[str, Any]) -> None:
        """Write ``last.pt``: ``content`` and the settings."""
        self._save("last.pt", content)

    def save_metrics(self, rows: list[Row]) -> None:
        """Write ``metrics.csv``."""
        lines = [",".join(COLUMNS)]
        lines += [",".join(_cell(row.get(name)) for name in COLUMNS) for row in rows]
        self._write("metrics.csv", "\n".join([*lines, ""]).encode())

    def log(self, row: Row) -> None:
        """Add a row to TensorBoard's logs, if that is installed.

        They are an extra: if they cannot be written there is a warning, and no more logs.
        """
        try:
            if self._board is None:
                # What a run that was killed had logged from this epoch on is dropped.
                logs, epoch = str(self.path / "tensorboard"), int(row["epoch"])
                self._board = _summary_writer()(logs, purge_step=epoch)
            for name, value in row.items():
                part, _, what = name.rpartition("_")
                self._board.add_scalar(f"{what}/{part}" if part else name, value, int(row["epoch"]))
            self._board.flush()
        except OSError as error:
            warnings.warn(f"no more logs for TensorBoard: {error}", RuntimeWarning, stacklevel=2)
            self.close()
            self._board = _Silent()

    def close(self) -> None:
        """Close TensorBoard's logs."""
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
            self._board = None

    def _save(self, name: str, content: Mapping[str, Any]) -> None:
        # Not straight to the file: of a full disk, torch.save would say "unexpected pos".
        buffer = io.BytesIO()
        torch.save({**content, "config": self.about}, buffer)
        self._write(name, buffer.getbuffer())

    def _write(self, name: str, content: bytes | memoryview) -> None:
        try:
            with atomic_write(self.path / name) as file:
                file.write(content)
        except OSError as error:
            raise OSError(
                f"{self.path / name} could not be written ({error.strerror}). The files of the run "
                "are as they were: make room, and go on with --resume"
            ) from error


class _Silent:
    """A writer of logs that writes none."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def add_scalar(self, *_: Any) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def _summary_writer() -> Callable[..., Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return _Silent
    return SummaryWriter


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
