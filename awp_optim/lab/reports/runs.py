"""Runs that are over, found on disk: their settings, figures, checkpoints and images."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from awp_optim.lab.config import Config
from awp_optim.lab.data import DATASETS, ImageData, load
from awp_optim.lab.reports.summary import Runs
from awp_optim.lab.run_folder import Row, read_metrics

__all__ = ["Run", "by_size", "evaluated", "find_runs", "grouped"]

_NAMES = {"at": "AT", "trades": "TRADES", "mart": "MART", "rst": "RST", "pretrain": "Pre-training"}
# What does not make another setting: how often one looks, and where the randomness starts.
_SAME = ("seed", "save_every", "eval_every", "train_eval")


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        path: where.
        config: its settings.
        about: what else ``config.json`` says: the data set, how many images.
        rows: of its epochs.
    """

    path: Path
    config: Config
    about: dict[str, Any] = field(repr=False)
    rows: list[Row] = field(repr=False)

    def checkpoints(self) -> dict[int, Path]:
        """Those kept by ``save_every``, and the last: by the number of epochs done, in order."""
        found = {int(p.stem.removeprefix("epoch_")): p for p in self.path.glob("epoch_*.pt")}
        if (last := self.path / "last.pt").exists():
            found.setdefault(len(self.rows), last)
        return dict(sorted(found.items()))

    def images(self, data_dir: str | os.PathLike[str] | None = None) -> ImageData:
        """The images that it was trained and tested on.

        Args:
            data_dir: as of :func:`~awp_optim.lab.data.load`; the digits need none.

        Raises:
            ValueError: the data set is none that can be loaded by its name, or has fewer images.
            Exception: what the loader raises.
        """
        name = self.about.get("dataset")
        if name not in DATASETS:
            raise ValueError(f"{self.path}: its data set, {name!r}, cannot be loaded by its name")
        data = load(name, data_dir)
        wanted = [self.about["train_images"], self.about["test_images"]]
        parts = zip(wanted, (data.x_train, data.x_test), strict=True)
        # --limit took a random subset; the whole stays in its order.
        n_train, n_test = (None if n == len(x) else n for n, x in parts)
        return data.limit(n_train, n_test)


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """The run folders among these and below them, each once, sorted by path within each.

    Raises:
        FileNotFoundError: there is none in one of them.
        ValueError: the settings of one are damaged; the text names it.
    """
    found: dict[Path, Run] = {}
    for path in map(Path, paths):
        metrics = sorted(path.rglob("metrics.csv"))
        if not metrics:
            raise FileNotFoundError(f"{path} holds no run: no folder with a metrics.csv")
        for file in metrics:
            found.setdefault(file.parent.resolve(), _read(file.parent))
    return list(found.values())


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs with the same settings but for the seed, by a label that tells them from the others.

    The label is the method, with AWP or RWP; and, among those of one method, what differs. Methods
    come in the paper's order, each first without AWP, then by gamma.
    """
    settings: dict[str, list[Run]] = {}
    for run in runs:
        settings.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    groups = sorted(settings.values(), key=_rank)
    labels: dict[str, list[Run]] = {}
    for group in groups:
        ours = _settings(group[0])
        others = [_settings(other[0]) for other in groups if _name(other[0]) == _name(group[0])]
        differing = [k for k in ours if any(other.get(k) != ours[k] for other in others)]
        values = [f"{k} {ours[k]:g}" if type(ours[k]) is float else f"{k} {ours[k]}"
                  for k in differing]  # fmt: skip
        labels[", ".join([_name(group[0]), *values])] = group
    return labels


def by_size(groups: Mapping[str, list[Run]]) -> list[dict[str, dict[float, list[Run]]]]:
    """Which of these runs differ in the weight perturbation alone.

    Args:
        groups: as :func:`grouped` gives them.

    Returns:
        For each setting of everything else, those with AWP and those with RWP, by gamma; runs
        without either count as gamma 0 of both.
    """
    families: dict[str, dict[str, dict[float, list[Run]]]] = {}
    for runs in groups.values():
        config = runs[0].config
        others = {k: v for k, v in _settings(runs[0]).items() if k not in ("gamma", "direction")}
        family = families.setdefault(json.dumps(others, sort_keys=True), {"AWP": {}, "RWP": {}})
        kind = "RWP" if config.direction == "random" else "AWP"
        for name in (kind,) if config.gamma else family:
            family[name][config.gamma] = runs
    return list(families.values())


def evaluated(runs: Sequence[Run]) -> Runs:
    """The rows of runs up to the last epoch at which all of them were evaluated.

    Of the evaluations, those remain that all have.

    Raises:
        ValueError: there is no such epoch.
    """
    epochs = [{row["epoch"] for row in run.rows if "test_robust_acc" in row} for run in runs]
    common = set.intersection(*epochs)
    if not common:
        names = ", ".join(str(run.path) for run in runs)
        raise ValueError(f"no epoch after which all of these were evaluated: {names}")
    return [
        [
            row if row["epoch"] in common else {k: v for k, v in row.items() if "_acc" not in k}
            for row in run.rows
            if row["epoch"] <= max(common)
        ]
        for run in runs
    ]


def _read(path: Path) -> Run:
    try:
        about = json.loads((path / "config.json").read_text(encoding="utf-8"))
        known = {f.name for f in fields(Config)}
        # A folder may be older than a setting: it had what is now the default.
        config = Config(**{k: v for k, v in about.items() if k in known})
        rows = read_metrics(path)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no run folder, or damaged ({error})") from error
    if not rows:
        raise ValueError(f"{path} is a run without an epoch: go on with it by --resume")
    return Run(path, config, {k: v for k, v in about.items() if k not in known}, rows)


def _settings(run: Run) -> dict[str, Any]:
    config = {k: v for k, v in asdict(run.config).items() if k not in _SAME}
    return {**config, **{k: run.about.get(k) for k in ("dataset", "train_images")}}


def _rank(group: list[Run]) -> tuple[int, bool, float]:
    config = group[0].config
    return list(_NAMES).index(config.method), config.direction == "random", config.gamma


def _name(run: Run) -> str:
    config = run.config
    kind = "" if not config.gamma else "-RWP" if config.direction == "random" else "-AWP"
    return _NAMES[config.method] + kind
