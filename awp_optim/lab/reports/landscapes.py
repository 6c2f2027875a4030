"""Loss landscapes of checkpoints in run folders, measured once and kept on disk point by point."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from awp_optim.attacks import PGD
from awp_optim.attacks.captured import attack_id
from awp_optim.lab.data import ImageData
from awp_optim.lab.loading import from_checkpoint
from awp_optim.lab.reports.runs import Run
from awp_optim.lab.reports.tables import radius
from awp_optim.lab.training_set import as_inputs
from awp_optim.landscape import (
    LossCurve,
    LossSurface,
    awp_direction,
    filter_normalized_direction,
    loss_curve,
    loss_surface,
    rwp_direction,
)

__all__ = ["Landscapes", "Measuring", "file_name"]

Direction = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How landscapes are measured; also options of ``awp landscape``.

    Raises:
        ValueError: a setting is out of its range.
    """

    reach: float = 1.0
    """Alphas go from -REACH to REACH."""
    points: int = 21
    """Alphas on a curve, an odd number."""
    grid: int = 11
    """Alphas on a side of a surface, an odd number."""
    directions: int = 3
    """Random directions of a curve."""
    at: float | None = None
    """Alpha at which curves are compared in numbers; else REACH / 2."""
    gammas: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 0.6, 1.0)
    """Sizes of the perturbations of --figure perturbed."""
    limit: int | None = None
    """Use at most this many training images; their sampling error is shown."""
    steps: int | None = None
    """Steps of the attack; else as many as in training."""
    recompute_bn: bool = False
    """Recompute BatchNorm's statistics at each point."""
    batch_size: int = 128
    """Images at a time."""
    seed: int = 0
    """Seed of directions and attacks."""
    data_dir: Path = Path("data")
    """Folder of the data sets."""

    def __post_init__(self) -> None:
        for name in ("directions", "batch_size", "limit", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("points", "grid"):
            if getattr(self, name) < 3 or getattr(self, name) % 2 == 0:
                raise ValueError(f"{name} must be an odd number, 3 or more, so that 0 is one")
        if not 0 < self.reach < math.inf:
            raise ValueError(f"reach must be above 0, got {self.reach:g}")
        if not 0 < self.distance <= self.reach:
            raise ValueError(f"at must be above 0 and within reach, got {self.distance:g}")
        if not self.gammas or not all(0 < gamma < math.inf for gamma in self.gammas):
            raise ValueError("gammas must be above 0")

    @property
    def distance(self) -> float:
        """The alpha at which curves are compared."""
        return self.reach / 2 if self.at is None else self.at

    def alphas(self, count: int) -> tuple[float, ...]:
        """So many alphas from -reach to reach."""
        return tuple(np.linspace(-self.reach, self.reach, count).round(12).tolist())


class Landscapes:
    """Measures landscapes of checkpoints. A point that is on disk is not measured again.

    Args:
        how: the settings.
        states: a folder for the points, a file for each checkpoint and way of measuring.
        device: where the models are.
        announce: called with a line about each measurement before it begins.
    """

    def __init__(
        self,
        how: Measuring,
        states: Path,
        device: str = "cpu",
        announce: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.how, self.device = how, device
        self._states = states
        self._announce = announce
        self._images: dict[str, ImageData] = {}
        states.mkdir(parents=True, exist_ok=True)

    def curve(
        self,
        run: Run,
        checkpoint: Path | None = None,
        *,
        directions: int | None = None,
        pregenerated: bool = False,
    ) -> LossCurve:
        """The landscape along random filter-normalized directions.

        Args:
            run: whose images and threat are used.
            checkpoint: of the run; None for its last.
            directions: how many; None for as many as the settings say.
            pregenerated: as for :func:`~awp_optim.landscape.loss_curve`.
        """
        file = checkpoint or run.last_checkpoint()
        model = self.model(run, file)
        random = self._random_directions(model, directions or self.how.directions)
        alphas = self.how.alphas(self.how.points)
        self._announce(f"{run.path.name}, {file.name}: {len(random)} x {len(alphas)}")
        settings = self._settings(run, file, "pregenerated" if pregenerated else "")
        data, attack = self.images(run), self.attack(run)
        return loss_curve(
            model, data, attack, alphas, random, pregenerated=pregenerated, **settings
        )

    def surface(self, run: Run, checkpoint: Path | None = None) -> LossSurface:
        """The landscape on a plane of two such directions."""
        file = checkpoint or run.last_checkpoint()
        model, grid = self.model(run, file), self.how.alphas(self.how.grid)
        plane = self._random_directions(model, 2)
        self._announce(f"{run.path.name}, {file.name}: surface, {len(grid)} x {len(grid)}")
        settings = self._settings(run, file)
        return loss_surface(
            model, self.images(run), self.attack(run), grid, grid, plane, **settings
        )

    def perturbed(self, run: Run) -> dict[str, LossCurve]:
        """The last checkpoint's loss by gamma, along AWP's direction and along random ones."""
        file = run.last_checkpoint()
        model, data, attack = self.model(run, file), self.images(run), self.attack(run)
        self._announce(f"{run.path.name}, {file.name}: AWP's and RWP's perturbations")
        batch_size, seed = self.how.batch_size, self.how.seed
        directions = {
            "AWP": [awp_direction(model, data, attack, batch_size=batch_size, seed=seed)],
            "RWP": self._random_directions(model, self.how.directions, rwp_direction),
        }
        settings = self._settings(run, file)
        return {
            kind: loss_curve(model, data, attack, self.how.gammas, of_kind, **settings)
            for kind, of_kind in directions.items()
        }

    def model(self, run: Run, checkpoint: Path) -> nn.Module:
        """The network of a checkpoint, in eval mode on the device, in the images' layout.

        Of a run with averaged weights it is their network, as in the run's accuracies.
        """
        model = from_checkpoint(checkpoint, ema=run.config.ema > 0)
        return model.to(self.device).to(memory_format=torch.channels_last)

    def images(self, run: Run) -> tuple[Tensor, Tensor]:
        """The run's training images, at most ``limit`` of them, in [0, 1], and their labels."""
        data, limit = self._all_images(run), self.how.limit
        if limit is not None and limit < len(data.x_train):
            data = data.limit(limit)
        return as_inputs(data.x_train.to(self.device)), data.y_train.to(self.device)

    def attack(self, run: Run) -> PGD:
        """PGD on the cross-entropy under the run's threat, whatever the method, as in Section 3."""
        config = run.config
        steps = self.how.steps or config.train_steps
        return PGD(config.eps, config.step_size, steps, norm=config.norm)

    def describe(self, run: Run) -> str:
        """What is measured and how, for a caption."""
        total = len(self._all_images(run).x_train)
        n = total if self.how.limit is None else min(self.how.limit, total)
        share = f"{n} training images" if n == total else f"{n} of {total} training images"
        threat = f"{run.config.norm} eps {radius(run.config.eps)}"
        return (
            f"{run.task}; {share}, PGD-{self.attack(run).steps} at {threat}, run again for every"
            " perturbed model"
        )

    def _all_images(self, run: Run) -> ImageData:
        key = repr([run.about.get(k) for k in ("dataset", "train_images", "test_images")])
        if key not in self._images:
            self._images[key] = run.images(self.how.data_dir)
        return self._images[key]

    def _random_directions(
        self,
        model: nn.Module,
        count: int,
        draw: Callable[..., Direction] = filter_normalized_direction,
    ) -> list[Direction]:
        """Directions made of the same random numbers for every model."""
        seeds = range(self.how.seed, self.how.seed + count)
        return [draw(model, torch.Generator().manual_seed(seed)) for seed in seeds]

    def _settings(self, run: Run, checkpoint: Path, kind: str = "") -> dict[str, Any]:
        """The options of a measurement, among them the file for its points."""
        how = self.how
        digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        options = {"batch_size": how.batch_size, "recompute_bn": how.recompute_bn, "seed": how.seed}
        # Named after all that is measured: a checkpoint that has changed gets another file.
        what = [digest, kind, attack_id(self.attack(run)), how.limit, run.config.ema > 0]
        device = torch.device(self.device).type
        key = hashlib.sha256(repr([*what, options, device]).encode()).hexdigest()[:12]
        name = f"{file_name(run.path.name)}-{checkpoint.stem}-{key}.jsonl"
        return {**options, "state": self._states / name}


def file_name(text: str) -> str:
    """A label as (part of) a file's name.

    >>> file_name("AT-RWP, gamma 0.3")
    'at-rwp-gamma-0.3'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "run"
