"""Landscapes of checkpoints in run folders: measured once, and kept on disk point by point."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awp_optim.attacks import PGD
from awp_optim.attacks.captured import attack_id
from awp_optim.lab.data import ImageData
from awp_optim.lab.loading import from_checkpoint
from awp_optim.lab.reports.runs import Run
from awp_optim.lab.reports.tables import radius
from awp_optim.landscape import (
    LossCurve,
    LossSurface,
    awp_direction,
    filter_normalized_direction,
    loss_curve,
    loss_surface,
    rwp_direction,
)

__all__ = ["Landscapes", "Measuring", "NotEnough", "last_checkpoint", "slug", "where"]


class NotEnough(ValueError):
    """The runs do not allow a figure; the text says what is missing."""


@dataclass(frozen=True)
class Measuring:
    """How landscapes are measured.

    Attributes:
        alphas: distances along a direction.
        grid: distances along each direction of a surface.
        gammas: sizes of perturbations along AWP's and RWP's directions, above 0.
        directions: how many are drawn for a curve.
        at: the distance at which curves are compared in numbers.
        limit: training images at the most; None for all that the run had.
        steps: of the attack; None for as many as in the run's training.
        batch_size: images at a time.
        recompute_bn: as of :func:`~awp_optim.landscape.loss_curve`.
        seed: of directions and attacks.
        device: where the models are.
        data_dir: of the images, as of :func:`~awp_optim.lab.data.load`.
    """

    alphas: tuple[float, ...]
    grid: tuple[float, ...]
    gammas: tuple[float, ...]
    directions: int
    at: float
    limit: int | None = None
    steps: int | None = None
    batch_size: int = 128
    recompute_bn: bool = False
    seed: int = 0
    device: str = "cpu"
    data_dir: Path | None = None


class Landscapes:
    """Measures landscapes of checkpoints, each point once: what was measured is kept on disk.

    Args:
        how: the settings.
        states: a folder for the points measured, a file for each checkpoint and setting.
        announce: told what is measured next.
    """

    def __init__(
        self, how: Measuring, states: Path, announce: Callable[[str], None] = lambda text: None
    ) -> None:
        self.how = how
        self._states = states
        self._announce = announce
        self._data: dict[str, ImageData] = {}
        self._digests: dict[Path, str] = {}
        states.mkdir(parents=True, exist_ok=True)

    def curve(
        self,
        run: Run,
        checkpoint: Path | None = None,
        *,
        directions: int | None = None,
        pregenerated: bool = False,
    ) -> LossCurve:
        """The landscape of a checkpoint (the run's last) along filter-normalised directions."""
        file = checkpoint or last_checkpoint(run)
        model = self.model(run, file)
        several = self._draw(model, directions or self.how.directions)
        state = self._state(run, file, "pregenerated" if pregenerated else "")
        self._announce(f"{run.path.name}, {file.name}: {len(several)} x {len(self.how.alphas)}")
        return loss_curve(
            model, self.images(run), self.attack(run), self.how.alphas, several,
            pregenerated=pregenerated, **self._settings(state),
        )  # fmt: skip

    def surface(self, run: Run, checkpoint: Path | None = None) -> LossSurface:
        """The landscape of a checkpoint (the run's last) on a plane of two such directions."""
        file = checkpoint or last_checkpoint(run)
        model, grid = self.model(run, file), self.how.grid
        self._announce(f"{run.path.name}, {file.name}: surface, {len(grid)} x {len(grid)}")
        return loss_surface(
            model, self.images(run), self.attack(run), grid, grid, self._draw(model, 2),
            **self._settings(self._state(run, file, "")),
        )  # fmt: skip

    def perturbed(self, run: Run) -> dict[str, LossCurve]:
        """The last checkpoint's loss by gamma, along AWP's direction and along RWP's."""
        file = last_checkpoint(run)
        model, images, attack = self.model(run, file), self.images(run), self.attack(run)
        options: dict[str, Any] = {"batch_size": self.how.batch_size, "seed": self.how.seed}
        self._announce(f"{run.path.name}, {file.name}: AWP's and RWP's perturbations")
        directions: dict[str, list[dict[str, Tensor]]] = {
            "AWP": [awp_direction(model, images, attack, **options)],
            "RWP": self._draw(model, self.how.directions, rwp_direction),
        }
        settings = self._settings(self._state(run, file, ""))
        return {
            name: loss_curve(model, images, attack, self.how.gammas, several, **settings)
            for name, several in directions.items()
        }

    def model(self, run: Run, checkpoint: Path) -> nn.Module:
        """The network of a checkpoint, in eval mode on the device."""
        channels = self._images(run).in_channels
        return from_checkpoint(checkpoint, in_channels=channels).to(self.how.device)

    def images(self, run: Run) -> tuple[Tensor, Tensor]:
        """The run's training images in [0, 1], ``limit`` of them at the most, and labels."""
        data, how = self._images(run), self.how
        if how.limit is not None and how.limit < len(data.x_train):
            data = data.limit(how.limit)
        return data.x_train.to(how.device).float() / 255, data.y_train.to(how.device)

    def attack(self, run: Run) -> PGD:
        """PGD on the cross-entropy, of the run's threat, as in Section 3 whatever the method."""
        config = run.config
        steps = self.how.steps or config.train_steps
        return PGD(config.eps, config.step_size, steps, norm=config.norm)

    def attack_id(self, run: Run) -> str:
        """What is measured, for a caption."""
        config, data = run.config, self._images(run)
        total = len(data.x_train)
        n = total if self.how.limit is None else min(self.how.limit, total)
        share = f"{n} training images" if n == total else f"{n} of {total} training images"
        attack = self.attack(run)
        return (
            f"{where(run)}; {share}, PGD-{attack.steps} at {config.norm} eps {radius(config.eps)}"
            " made anew for every perturbed model"
        )

    def _images(self, run: Run) -> ImageData:
        key = repr([run.about.get(k) for k in ("dataset", "train_images", "test_images")])
        if key not in self._data:
            self._data[key] = run.images(self.how.data_dir)
        return self._data[key]

    def _draw(
        self,
        model: nn.Module,
        count: int,
        kind: Callable[..., dict[str, Tensor]] = filter_normalized_direction,
    ) -> list[dict[str, Tensor]]:
        """The same random numbers for every model."""
        seeds = range(self.how.seed, self.how.seed + count)
        return [kind(model, torch.Generator().manual_seed(seed)) for seed in seeds]

    def _settings(self, state: Path) -> dict[str, Any]:
        how = self.how
        return {
            "batch_size": how.batch_size,
            "recompute_bn": how.recompute_bn,
            "seed": how.seed,
            "state": state,
        }

    def _state(self, run: Run, checkpoint: Path, kind: str) -> Path:
        """A file for each checkpoint, as it is now, and each way to look at it."""
        how = self.how
        if checkpoint not in self._digests:
            digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
            self._digests[checkpoint] = digest
        ways = [attack_id(self.attack(run)), how.limit, how.batch_size, how.recompute_bn, how.seed]
        key = repr([self._digests[checkpoint], kind, *ways, torch.device(how.device).type])
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self._states / f"{slug(run.path.name)}-{checkpoint.stem}-{digest}.jsonl"


def last_checkpoint(run: Run) -> Path:
    """The latest there is.

    Raises:
        NotEnough: there is none.
    """
    checkpoints = run.checkpoints()
    if not checkpoints:
        raise NotEnough(f"{run.path} holds no checkpoint, neither last.pt nor epoch_*.pt")
    return list(checkpoints.values())[-1]


def where(run: Run) -> str:
    """What was trained on what."""
    return f"{run.about.get('dataset')}, {run.config.arch}"


def slug(text: str) -> str:
    """A file's name from a label.

    >>> slug("AT-RWP, gamma 0.3")
    'at-rwp-gamma-0.3'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "run"
