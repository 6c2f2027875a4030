"""The files of a run: ``config.json``, ``metrics.csv``, ``best.pt``, ``last.pt``, ``tensorboard``.

``best.safetensors`` holds the weights of ``best.pt`` alone, averaged if the run averages them. With
``save_every`` there are also ``epoch_0020.pt`` and so on, which hold the same as ``best.pt``. Each
file is written under another name and renamed when it is complete, so a run folder can be read, and
its run resumed, at any moment.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from awp_optim._utils.io import atomic_write, write_text
from awp_optim.lab.config import Config
from awp_optim.lab.lock import FolderLock
from awp_optim.lab.tensorboard import TensorBoardLog
from awp_optim.lab.weights_file import write_weights

__all__ = ["Row", "RunFolder", "best", "read_metrics", "refuse_run", "reported"]

Row = dict[str, float]
"""The metrics of an epoch, a line of ``metrics.csv``.

``train_*``, ``test_*`` and ``val_*`` (held-out images, with ``select_on="val"``) are measured
alike: with the test attack in eval mode at the weights that are saved, so that the difference
between the first two is the generalization gap. ``step_*`` are averages over the training steps of
the epoch, at the weights that gave the updates (w + v with AWP), which the published logs call
training accuracy. ``step_robust_loss`` is the method's objective. ``ema_train_*`` and so on belong
to the averaged weights, if the run has any. ``seconds`` is the time of the training steps,
``eval_seconds`` that of the measurements after them.
"""

RESULTS = ("last.pt", "best.pt", "metrics.csv")
COLUMNS = (
    "epoch",
    "lr",
    "seconds",
    "eval_seconds",
    "step_robust_loss",
    "step_robust_acc",
    *(
        f"{part}_{kind}_{what}"
        for part in ("train", "test", "val", "ema_train", "ema_test", "ema_val")
        for kind in ("natural", "robust")
        for what in ("loss", "acc")
    ),
)


def best(rows: list[Row]) -> Row:
    """The epoch with the highest robust accuracy, the first one if several have it.

    It is that of the averaged weights if the run has some, and measured on held-out images if the
    run has some, else on the test set as in the paper.
    """
    name = "val_robust_acc" if any("val_robust_acc" in row for row in rows) else "test_robust_acc"
    return max((row for row in rows if name in row), key=lambda row: reported(row)[name])


def reported(row: Row) -> Row:
    """The row with the metrics of the averaged weights in place of the model's, if it has them."""
    average = {k.removeprefix("ema_"): v for k, v in row.items() if k.startswith("ema_")}
    return {**row, **average}


def read_metrics(folder: Path | str) -> list[Row]:
    """The rows of a run folder's ``metrics.csv``."""
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def refuse_run(path: Path) -> None:
    """Raise FileExistsError if the folder holds files of a run."""
    if any((path / name).exists() for name in ("config.json", *RESULTS)):
        raise FileExistsError(
            f"{path} already holds a run: continue it with --resume, or choose another folder"
        )


class RunFolder:
    """A run's folder, locked against other processes until it is closed.

    No file of a run is written before :meth:`begin`.

    Attributes:
        last: the path of ``last.pt``.

    Args:
        path: the folder; it is created if needed.
        config: the run's settings.
        about: what else determines the run (the data set, the initial weights); ``config.json``
            keeps it, and a run is resumed only with the same.
        resume: whether a run in the folder may be continued.

    Raises:
        BlockingIOError: another process is running in the folder.
        FileExistsError: the folder holds a run, and ``resume`` is False.
        OSError: the folder cannot be written to.
        ValueError: the run in the folder had other settings, or its ``config.json`` is damaged or
            belongs to something else.
    """

    def __init__(
        self, path: Path, config: Config, about: Mapping[str, Any], *, resume: bool
    ) -> None:
        self.path, self.last = path, path / "last.pt"
        self._settings = {**asdict(config), "attack_mode": config.training_mode, **about}
        self._log = TensorBoardLog(path / "tensorboard")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(path)
        try:
            if resume:
                self._check_config()
            else:
                refuse_run(path)
        except BaseException:
            self.close()
            raise

    def begin(self, rows: list[Row]) -> None:
        """Write ``config.json``, and remove what a killed run left half-written.

        Args:
            rows: those of the finished epochs; a kill may have come before ``metrics.csv``.
        """
        for part in self.path.glob(".*.part"):
            part.unlink(missing_ok=True)
        write_text(self.path / "config.json", json.dumps(self._settings, indent=2))
        if rows:
            self.save_metrics(rows)

    def close(self) -> None:
        """Close TensorBoard's logs and unlock the folder."""
        self._log.close()
        self._lock.release()

    def check_settings(self, before: Mapping[str, Any]) -> None:
        """Raise ValueError unless a run with the settings ``before`` can be resumed with these."""
        newer = {"unlabeled_images": 0, "balanced": False, "data": self._settings.get("data")}
        before = Config.complete({**newer, **before})
        changes = [
            f"{name} was {before.get(name)}, is {now}"
            for name, now in Config.complete(self._settings).items()
            if before.get(name) != now
        ]
        if changes:
            raise ValueError(
                f"the run in {self.path} cannot be resumed with other settings: "
                f"{', '.join(changes)}"
            )

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a checkpoint: ``content`` and the settings."""
        # Through memory: on a full disk torch.save would say "unexpected pos".
        buffer = io.BytesIO()
        torch.save({**content, "config": self._settings}, buffer)
        with atomic_write(self.path / name) as file:
            file.write(buffer.getbuffer())

    def save_best(self, content: Mapping[str, Any]) -> None:
        """Write ``best.pt``, and its weights as ``best.safetensors``.

        Args:
            content: ``model``, a state dict, and ``ema``, its average, if the run has one.
        """
        self.save("best.pt", content)
        weights, averaged = content.get("ema", content["model"]), "ema" in content
        write_weights(self.path / "best.safetensors", weights, self._settings, averaged=averaged)

    def save_metrics(self, rows: list[Row]) -> None:
        """Write ``metrics.csv``."""
        table = [COLUMNS, *([f"{row[c]:.6g}" if c in row else "" for c in COLUMNS] for row in rows)]
        write_text(self.path / "metrics.csv", "".join(",".join(line) + "\n" for line in table))

    def log(self, row: Row) -> None:
        """Add a row to TensorBoard's logs, if TensorBoard is installed."""
        self._log.add(row)

    def _check_config(self) -> None:
        """Raise ValueError if the folder holds another run, or a ``config.json`` of another kind.

        A run that has saved nothing but its settings may still change them.
        """
        file = self.path / "config.json"
        has_results = any((self.path / name).exists() for name in RESULTS)
        if not file.exists():
            if has_results:
                raise ValueError(
                    f"{file} is missing beside files of a run: put it back, or choose another "
                    "folder"
                )
            return
        try:
            before = dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}): put the run's own back, or choose another folder"
            ) from error
        if not {"method", "arch", "dataset"} <= before.keys():
            raise ValueError(f"{file} does not belong to a run: choose another folder")
        if has_results:
            self.check_settings(before)
