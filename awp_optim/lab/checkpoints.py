"""What a checkpoint of a run holds, and how one is read and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awp_optim import AWP
from awp_optim.lab.class_means import ClassMeans
from awp_optim.lab.ema import MovingAverage
from awp_optim.lab.run_folder import Row
from awp_optim.lab.weights import load_checkpoint

__all__ = ["EpochProgress", "RunState", "bad_checkpoint", "load_last"]


@dataclass
class EpochProgress:
    """Progress within an epoch. Its sums stay on the device, so that no step waits for them.

    Attributes:
        order: indices of the epoch's images, shape (images,).
        loss_sum: over the images of the steps done, a scalar.
        correct: how many of these images were classified correctly, a scalar.
        bad_step: the first step whose loss was not finite, a scalar; inf if there was none.
        step: steps done.
        seconds: the time that these steps took.
    """

    order: Tensor
    loss_sum: Tensor
    correct: Tensor
    bad_step: Tensor
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def begin(cls, order: Tensor) -> EpochProgress:
        """An epoch before its first step."""
        zero = torch.zeros((), device=order.device)
        return cls(order, zero, zero.clone(), zero + math.inf)

    def add_step(self, loss_sum: Tensor, correct: Tensor) -> None:
        """Count a step: its loss summed over its images, and how many of them were correct."""
        self.loss_sum += loss_sum
        self.correct += correct
        bad_step = torch.where(loss_sum.isfinite(), math.inf, self.step)
        self.bad_step = torch.minimum(self.bad_step, bad_step)
        self.step += 1


@dataclass
class RunState:
    """Everything that changes during a run: what ``last.pt`` holds and resuming restores.

    Attributes:
        generators: the random generators of the order and of the augmentation.
        device: where the model is.
        average: the moving average of the model, if the run has one.
        class_means: the weights of GKL's classes, if that is the method.
        rows: the metrics of the finished epochs.
        epoch: progress within the current epoch; None between two.
    """

    model: nn.Module
    optimizer: AWP
    scheduler: torch.optim.lr_scheduler.LRScheduler
    generators: tuple[torch.Generator, ...]
    device: torch.device
    average: MovingAverage | None
    class_means: ClassMeans | None
    rows: list[Row]
    epoch: EpochProgress | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data. The tensors of the model and the optimizer are not copied."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rows": self.rows,
            "random": self._random_states(),
            "device": self.device.type,
        }
        if self.average:
            state["ema"] = self.average.state_dict()
        if self.class_means:
            state["class_means"] = self.class_means.state_dict()
        if self.epoch:
            state["epoch"] = dict(vars(self.epoch))
        return state

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            Exception: ``saved`` is not the state of this run; some of it may have been restored.
        """
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        if self.average:
            self.average.load_state_dict(saved["ema"])
        if self.class_means:
            self.class_means.load_state_dict(saved["class_means"])
        self.rows = list(saved["rows"])
        for row in self.rows:
            sum(row.values())  # raises unless they are numbers
        self.epoch = None
        if "epoch" in saved:
            progress = dict(saved["epoch"])
            step, seconds = int(progress.pop("step")), float(progress.pop("seconds"))
            tensors = {name: value.to(self.device) for name, value in progress.items()}
            self.epoch = EpochProgress(**tensors, step=step, seconds=seconds)
        self._set_random_states(saved["random"])

    def weights(self) -> dict[str, Any]:
        """What ``best.pt`` and ``epoch_0020.pt`` hold: the model, and the last epoch's metrics."""
        content: dict[str, Any] = {"model": self.model.state_dict(), "row": self.rows[-1]}
        if self.average:
            content["ema"] = self.average.module.state_dict()
        return content

    def _random_states(self) -> list[Tensor]:
        states = [torch.get_rng_state(), *(g.get_state() for g in self.generators)]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def _set_random_states(self, states: list[Tensor]) -> None:
        states = [state.cpu() for state in states]
        torch.set_rng_state(states[0])
        for generator, state in zip(self.generators, states[1:], strict=False):
            generator.set_state(state)
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[-1], self.device)


def load_last(file: Path, device: torch.device) -> dict[str, Any]:
    """The content of a ``last.pt``, with its tensors on the device.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or no checkpoint of a run.
    """
    try:
        saved = load_checkpoint(file, device)
    except ValueError as error:
        raise bad_checkpoint(file, str(error)) from error
    if any(saved.get(name) is None for name in ("model", "optimizer", "rows", "config")):
        raise bad_checkpoint(file, "it holds something else")
    return saved


def bad_checkpoint(file: Path, why: str) -> ValueError:
    """The error for a ``last.pt`` that a run cannot resume from."""
    return ValueError(
        f"{file} is not a checkpoint of this run, or damaged ({' '.join(why.split())[:200]}). "
        "Nothing was changed. Put a copy of it back, or remove it to start again in this folder"
    )
