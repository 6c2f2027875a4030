"""A JSON file of the finished runs of a sweep, which are not trained again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from awp_optim._utils.io import write_text
from awp_optim.lab.config import Config
from awp_optim.lab.run_folder import Row

__all__ = ["ResultsFile"]


class ResultsFile:
    """``{"runs": [{"name": ..., "config": {...}, "rows": [...]}, ...]}``.

    Args:
        path: the file, made if needed; None keeps nothing.
        about: what else determines the runs (the data), kept with each and compared.

    Raises:
        OSError: it cannot be read, or its folder not be made.
        ValueError: it is damaged, or not such a file.
    """

    def __init__(self, path: Path | str | None, about: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._about = about
        self._runs: list[dict[str, Any]] = []
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)  # an error now, not after an hour
            if self._path.exists():
                self._runs = _read(self._path)

    def find(self, config: Config) -> list[Row] | None:
        """The rows of the run with these settings, if there is one."""
        wanted = Config.complete(self._settings(config))
        for run in self._runs:
            if Config.complete(run["config"]) == wanted:
                return [dict(row) for row in run["rows"]]
        return None

    def add(self, name: str, config: Config, rows: list[Row]) -> None:
        """Add a run to the file, which is written completely or not at all.

        Raises:
            OSError: it cannot be written; it is unchanged.
        """
        if self._path is None:
            return
        self._runs.append({"name": name, "config": self._settings(config), "rows": rows})
        # A line for each run, which a diff can tell apart.
        write_text(self._path, '{"runs": [\n' + ",\n".join(map(json.dumps, self._runs)) + "\n]}\n")

    def _settings(self, config: Config) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(json.dumps({**asdict(config), **self._about}))
        return settings


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return [
            {
                "name": run["name"],
                "config": dict(run["config"]),
                "rows": [dict(row) for row in run["rows"]],
            }
            for run in json.loads(path.read_text(encoding="utf-8"))["runs"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged, or not the file of a sweep ({type(error).__name__}: {error}): put "
            "a copy of it back, or remove it to begin again"
        ) from error
