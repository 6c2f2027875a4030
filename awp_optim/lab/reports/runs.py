"""Finished runs on disk: their settings, metrics, checkpoints and images; grouped by settings."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from awp_optim.lab.config import Config
from awp_optim.lab.data import DATASETS, ImageData, load
from awp_optim.lab.loading import settings_of
from awp_optim.lab.reports.summary import Runs
from awp_optim.lab.run_folder import Row, read_metrics
from awp_optim.lab.shipped import locate

__all__ = ["Groups", "NotEnough", "Run", "by_gamma", "comparable", "find_runs", "grouped", "select"]

# In the paper's order, then those that are not in it.
METHODS = {
    "at": "AT",
    "trades": "TRADES",
    "mart": "MART",
    "rst": "RST",
    "pretrain": "Pre-training",
    "gkl": "GKL",
    "score": "SCORE",
}
NOT_COMPARED = ("seed", "save_every", "eval_every", "train_eval")
"""Settings that may differ within a group: the seed, and what is measured of a run."""


class NotEnough(ValueError):
    """The runs do not allow what was asked for; the message says what is missing."""


@dataclass(frozen=True)
class Run:
    """A run folder, or a single checkpoint of a run.

    Attributes:
        path: the folder; or the checkpoint, and then there are no rows.
        config: the settings.
        about: what else ``config.json`` holds: the data set, the number of images.
        rows: the metrics of each epoch.
    """

    path: Path
    config: Config
    about: dict[str, Any] = field(repr=False)
    rows: list[Row] = field(repr=False)

    @property
    def method(self) -> str:
        """The method's name in the paper, such as "TRADES-AWP"."""
        if not self.config.gamma:
            return METHODS[self.config.method]
        return f"{METHODS[self.config.method]}-{'RWP' if self.is_random else 'AWP'}"

    @property
    def is_random(self) -> bool:
        """Whether it was trained with random weight perturbation, RWP."""
        return self.config.direction == "random" and self.config.gamma > 0

    @property
    def task(self) -> str:
        """The data set and the network."""
        return f"{self.about.get('dataset')}, {self.config.arch}"

    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints kept by ``save_every`` and the last, by epochs done, in order."""
        if self.path.is_file():
            return {self.config.epochs: self.path}
        found = {int(p.stem.removeprefix("epoch_")): p for p in self.path.glob("epoch_*.pt")}
        if (last := self.path / "last.pt").exists():
            found.setdefault(len(self.rows), last)
        return dict(sorted(found.items()))

    def last_checkpoint(self) -> Path:
        """The latest checkpoint.

        Raises:
            NotEnough: there is none.
        """
        checkpoints = list(self.checkpoints().values())
        if not checkpoints:
            raise NotEnough(f"{self.path} holds no checkpoint, neither last.pt nor epoch_*.pt")
        return checkpoints[-1]

    def images(self, data_dir: str | os.PathLike[str] | None = None) -> ImageData:
        """The images that it was trained and tested on.

        Args:
            data_dir: as for :func:`~awp_optim.lab.data.load`; the digits need none.

        Raises:
            ValueError: ``config.json`` does not say which images, or the data set has fewer.
            Exception: whatever the loader raises.
        """
        name = self.about.get("dataset")
        if not isinstance(name, str) or name not in DATASETS:
            raise ValueError(f"{self.path}: its data set, {name!r}, cannot be loaded by its name")
        data = load(name, data_dir)
        n_train = self._count("train_images", len(data.x_train))
        n_test = self._count("test_images", len(data.x_test))
        if self.about.get("balanced") and n_train is not None:
            return data.balanced(n_train).limit(None, n_test)
        return data.limit(n_train, n_test)

    def _count(self, key: str, total: int) -> int | None:
        """How many images the run had of a part; None for all of them, in their order."""
        count = self.about.get(key)
        if type(count) is not int or not 1 <= count <= total:
            file = self.path / "config.json"
            raise ValueError(f"{file}: {key} must be from 1 to {total}, got {count!r}")
        return None if count == total else count


Groups = Mapping[str, list[Run]]
"""Runs with the same settings but for the seed, by label."""


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """The run folders among these folders and below, each once, sorted by path within each.

    A path may also be that of a run's checkpoint, such as ``best.safetensors``, or the name of a
    network that ships with the package.

    Raises:
        FileNotFoundError: a folder holds no run, or there is no such file or name.
        ValueError: the files of a run are damaged; the message names it.
    """
    found: dict[Path, Run] = {}
    for path in map(locate, paths):
        if path.is_file():
            if not (settings := settings_of(path)):
                raise ValueError(f"{path} does not hold the settings of a run")
            found.setdefault(path.resolve(), _run(path, settings, []))
            continue
        # Not Path.rglob, which does not follow symbolic links before Python 3.13.
        below = os.walk(path, followlinks=True)
        folders = sorted(Path(folder) for folder, _, files in below if "metrics.csv" in files)
        if not folders:
            raise FileNotFoundError(f"{path} holds no run: no folder with a metrics.csv")
        for folder in folders:
            found.setdefault(folder.resolve(), _read(folder))
    return list(found.values())


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ only in the seed, by a label that tells them from the others.

    The label is the method, with AWP or RWP, and the settings in which groups of that method
    differ. Methods come in the paper's order, each first without AWP, then by gamma.
    """
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        by_settings.setdefault(_key(_settings(run)), []).append(run)
    groups = sorted(by_settings.values(), key=lambda group: _rank(group[0]))
    firsts = [group[0] for group in groups]
    return {_label(group[0], firsts): group for group in groups}


def select(groups: Groups, pattern: str) -> dict[str, list[Run]]:
    """The groups whose label matches a regular expression.

    Raises:
        ValueError: it is not a regular expression, or matches no label.
    """
    try:
        found = {label: runs for label, runs in groups.items() if re.search(pattern, label)}
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    if not found:
        raise ValueError(f"{pattern!r} matches none of {'; '.join(groups)}")
    return found


def by_gamma(groups: Groups) -> list[dict[str, dict[float, list[Run]]]]:
    """Groups that differ in the weight perturbation alone.

    Returns:
        For each setting of everything else, the runs by "AWP" or "RWP" and by gamma. Runs without
        either are gamma 0 of both.
    """
    families: dict[str, dict[str, dict[float, list[Run]]]] = {}
    for runs in groups.values():
        config, settings = runs[0].config, _settings(runs[0])
        del settings["gamma"], settings["direction"]
        family = families.setdefault(_key(settings), {"AWP": {}, "RWP": {}})
        for kind in family:
            if not config.gamma or (kind == "RWP") == runs[0].is_random:
                family[kind][config.gamma] = runs
    return list(families.values())


def comparable(runs: Sequence[Run]) -> Runs:
    """The rows of runs, with the evaluations that all of them have, up to the last of these.

    Raises:
        NotEnough: there are no such evaluations.
    """
    evaluated = [{row["epoch"] for row in run.rows if "test_robust_acc" in row} for run in runs]
    common = set.intersection(*evaluated)
    if not common:
        names = ", ".join(str(run.path) for run in runs)
        raise NotEnough(f"there is no epoch at which all of these were evaluated: {names}")
    last = max(common)
    return [
        [
            row if row["epoch"] in common else _without_accuracies(row)
            for row in run.rows
            if row["epoch"] <= last
        ]
        for run in runs
    ]


def _without_accuracies(row: Row) -> Row:
    return {name: value for name, value in row.items() if "_acc" not in name}


def _read(path: Path) -> Run:
    try:
        about = json.loads((path / "config.json").read_text(encoding="utf-8"))
        run = _run(path, about, read_metrics(path))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a run folder, or damaged ({error})") from error
    if not run.rows:
        raise ValueError(f"the run in {path} has no finished epoch: continue it with --resume")
    return run


def _run(path: Path, about: Mapping[str, Any], rows: list[Row]) -> Run:
    known = {f.name for f in fields(Config)}
    config = Config.from_saved(about)
    return Run(path, config, {k: v for k, v in about.items() if k not in known}, rows)


def _settings(run: Run) -> dict[str, Any]:
    """What makes runs comparable."""
    config = {k: v for k, v in asdict(run.config).items() if k not in NOT_COMPARED}
    return {**config, **{k: run.about.get(k) for k in ("dataset", "train_images")}}


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _rank(run: Run) -> tuple[int, bool, float]:
    return list(METHODS).index(run.config.method), run.is_random, run.config.gamma


def _label(run: Run, firsts: Sequence[Run]) -> str:
    settings = _settings(run)
    others = [_settings(other) for other in firsts if other.method == run.method]
    differing = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in settings.items()
        if any(other[name] != value for other in others)
    ]
    return ", ".join([run.method, *differing])
