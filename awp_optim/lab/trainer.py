"""Adversarial training of an image classifier, with or without AWP.

``fit`` trains, evaluates and writes a run folder: ``config.json``, ``metrics.csv``, ``best.pt`` and
``last.pt``. The settings are those of Rice et al. (2020) and of Section 4.4 of the AWP paper.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from awp_optim import AWP, AdversarialStep
from awp_optim.attacks import PGD, Captured
from awp_optim.attacks.base import in_mode
from awp_optim.lab.augment import cutout, random_crop_flip
from awp_optim.lab.data import ImageData
from awp_optim.lab.models import build_model
from awp_optim.lab.schedules import SCHEDULES
from awp_optim.objectives import AT, MART, TRADES, Objective

__all__ = [
    "METHODS",
    "PRECISIONS",
    "THREATS",
    "Config",
    "Row",
    "Threat",
    "best",
    "fit",
    "measure",
    "read_metrics",
]

METHODS: dict[str, Callable[[float], Objective]] = {
    "at": lambda beta: AT(),
    "trades": TRADES,
    "mart": MART,
}
"""The objective of each method, by its trade-off (beta of TRADES, lambda of MART)."""
PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
"""Autocast's dtype by name; the weights and the optimizer are in float32 either way."""

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]

Row = dict[str, float]
"""One line of ``metrics.csv``.

``train_*`` and ``test_*`` are measured alike, with the test attack in eval mode at the weights as
they are saved, so that their difference is the generalisation gap. ``step_*`` are averages over the
training steps of the epoch, at the weights that gave the updates (w + v with AWP): what the
published logs call training figures. ``step_robust_loss`` is the method's objective.
``ema_test_*`` are of the averaged weights, where there are any.
"""


@dataclass(frozen=True)
class Threat:
    """What the attacker may do, in the units of images in [0, 1]."""

    norm: str
    eps: float
    step_size: float


THREATS = {
    "linf": Threat("linf", 8 / 255, 2 / 255),
    "l2": Threat("l2", 128 / 255, 15 / 255),
}
"""The paper's threat models for CIFAR-10 (Section 4.4)."""


@dataclass(frozen=True)
class Config:
    """All there is to say about a run but its data and its folder.

    Args:
        method: "at", "trades" or "mart".
        beta: the trade-off of "trades" (beta) and "mart" (lambda).
        gamma: AWP's; 0 trains without it. The paper uses 1e-2 with "at", 5e-3 with the others.
        direction: AWP's; "random" is the paper's RWP.
        awp_start: epochs without AWP at the beginning. The published runs of TRADES-AWP have 10.
        ascent, interval: of :class:`~awp_optim.AdversarialStep`; the paper's are "exact" and 1.
        arch: a name in :data:`awp_optim.lab.models.MODELS`, or torchvision/NAME.
        norm, eps, step_size: the threat, for training and testing.
        train_steps, test_steps: PGD steps.
        attack_mode: the mode in which the training attack runs. None is the published scripts':
            "train" with "at", "eval" with the others.
        epochs, batch_size: as they say.
        lr, momentum, weight_decay: of SGD.
        l1, l2: lambda of the weight regularisation in Section 5.3, a multiple of the L1 norm added
            to the loss or a weight decay of their own; not on biases and norm layers, which with
            ``l2`` have no decay at all. The paper uses 5e-6 and 5e-3. 0 for none.
        ema: decay of an exponential moving average of the weights and of BatchNorm's statistics,
            one step after another, for example 0.995; it is tested and saved beside the weights
            themselves. 0 for none.
        precision: "float32", or "bfloat16" for autocast in training and testing.
        schedule: a name in :data:`awp_optim.lab.schedules.SCHEDULES`, stepped after every batch.
        augment: random crop (4 pixels of padding) and horizontal flip.
        cutout: side of a square blackened in every training image; the paper's is 14. 0 for none.
        train_eval: how many training images the ``train_*`` figures are measured on.
        eval_every: epochs between evaluations; the last is always evaluated.
        seed: of the weights, the order, the augmentation and the attacks.

    Raises:
        ValueError: a setting is out of its range.
    """

    method: str = "at"
    beta: float = 6.0
    gamma: float = 0.0
    direction: str = "gradient"
    awp_start: int = 0
    ascent: str = "exact"
    interval: int = 1
    arch: str = "preact_resnet18"
    norm: str = "linf"
    eps: float = 8 / 255
    step_size: float = 2 / 255
    train_steps: int = 10
    test_steps: int = 20
    attack_mode: str | None = None
    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    l1: float = 0.0
    l2: float = 0.0
    ema: float = 0.0
    precision: str = "float32"
    schedule: str = "piecewise"
    augment: bool = True
    cutout: int = 0
    train_eval: int = 1000
    eval_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {tuple(METHODS)}, got {self.method!r}")
        for name in ("l1", "l2", "cutout"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.awp_start < 0:
            raise ValueError(f"awp_start must not be negative, got {self.awp_start}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {tuple(PRECISIONS)}, got {self.precision!r}"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {tuple(SCHEDULES)}, got {self.schedule!r}")
        for name in ("epochs", "batch_size", "train_eval", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def objective(self) -> Objective:
        """What training minimises."""
        return METHODS[self.method](self.beta)

    @property
    def training_mode(self) -> str:
        """The mode in which the training attack runs."""
        return self.attack_mode or ("train" if self.method == "at" else "eval")

    @property
    def training_attack(self) -> PGD:
        """The attack that the method trains with: TRADES' and MART's start beside the image."""
        return PGD(
            self.eps,
            self.step_size,
            self.train_steps,
            norm=self.norm,
            loss="kl" if self.method == "trades" else "ce",
            model_mode=self.training_mode,
            start_std=None if self.method == "at" else 0.001,
        )

    @property
    def test_attack(self) -> PGD:
        """PGD under the same threat, on the cross-entropy, in eval mode."""
        return PGD(self.eps, self.step_size, self.test_steps, norm=self.norm)


def fit(
    config: Config,
    data: ImageData,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[Row], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[nn.Module, list[Row]]:
    """Train, and evaluate as it goes.

    Args:
        config: the run.
        data: images and labels, on the device to train on.
        out: the run folder; None writes nothing.
        resume: go on from ``last.pt`` in ``out`` if it is there. The result is the one that a run
            without a break would have had.
        on_step: called after each step with the number of steps done and to do, in all.
        on_epoch: called after each epoch with its row.
        stop: asked after each epoch; True ends the run there, to go on later with ``resume``.

    Returns:
        The model at the end, and a row for every epoch so far (see :data:`Row`).

    Raises:
        FileExistsError: ``out`` holds a run already and ``resume`` is False.
        FloatingPointError: the loss is no longer finite.
        ValueError: the run to go on with had other settings.
    """
    device = data.x_train.device
    torch.manual_seed(config.seed)
    shuffler = torch.Generator().manual_seed(config.seed)
    augmenter = torch.Generator(device).manual_seed(config.seed)
    model = build_model(
        config.arch,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        mean=data.mean,
        std=data.std,
    ).to(device)
    model.to(memory_format=torch.channels_last)  # faster convolutions, on CPUs too
    optimizer = AWP(
        _groups(model, config),
        torch.optim.SGD,
        gamma=config.gamma,
        direction=config.direction,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    if config.l1:
        # At the centre, where the base optimizer steps; the ascent is of the loss alone.
        optimizer.base_optimizer.register_step_pre_hook(
            lambda base, *_: _add_l1_gradient(model, config.l1)
        )
    # BatchNorm cannot train on a single example: one left over is dropped, each epoch another.
    batches = max(1, math.ceil((len(data.x_train) - 1) / config.batch_size))
    schedule, steps = SCHEDULES[config.schedule], config.epochs * batches
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: schedule(i / steps))
    autocast = PRECISIONS[config.precision]
    step = AdversarialStep(
        model,
        optimizer,
        config.training_attack,
        config.objective,
        ascent=config.ascent,
        interval=config.interval,
        autocast=autocast,
    )
    average = None
    if config.ema:
        decay = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
        average = AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
    test_attack = Captured(config.test_attack)
    test_batch = 1000 if device.type == "cuda" else 128
    shown = data.limit(min(config.train_eval, len(data.x_train)))

    rows: list[Row] = []
    folder = None if out is None else _RunFolder(Path(out), config, data, resume)
    if folder and (saved := folder.load_last(device)):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        if average:
            average.load_state_dict(saved["ema"])
        step.load_state_dict(saved.get("step", step.state_dict()))  # files of before have none
        rows = saved["rows"]
        _set_random_states(saved["random"], device, shuffler, augmenter)
    for epoch in range(len(rows), config.epochs):
        row: Row = {"epoch": epoch, "lr": float(scheduler.get_last_lr()[0])}
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["gamma"] = 0.0 if epoch < config.awp_start else config.gamma
        model.train()
        order = torch.randperm(len(data.x_train), generator=shuffler).to(device)
        loss_sum = torch.zeros((), device=device)
        correct = torch.zeros((), device=device)
        seen = 0
        for i in range(batches):
            index = order[i * config.batch_size : (i + 1) * config.batch_size]
            x, y = data.x_train[index], data.y_train[index]
            if config.augment:
                x = random_crop_flip(x, generator=augmenter)
            if config.cutout:
                x = cutout(x, config.cutout, generator=augmenter)
            result = step(_to_float(x), y)
            scheduler.step()
            if average:
                average.update_parameters(model)
            loss_sum += result.loss * len(y)
            seen += len(y)
            correct += (result.logits.argmax(1) == y).sum()
            if on_step:
                on_step(epoch * batches + i + 1, steps)
        row["step_robust_loss"] = loss_sum.item() / seen  # waits for the device
        row["step_robust_acc"] = correct.item() / seen
        row["train_seconds"] = time.perf_counter() - start
        if not math.isfinite(row["step_robust_loss"]):
            raise FloatingPointError(
                f"the training loss is {row['step_robust_loss']} in epoch {epoch} at a learning "
                f"rate of {row['lr']:g}: try a lower --lr or --gamma; the checkpoints are of the "
                "epochs before"
            )
        if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            start = time.perf_counter()
            train, test = (shown.x_train, shown.y_train), (data.x_test, data.y_test)
            tested = [("train_", model, train), ("test_", model, test)]
            if average:
                tested.append(("ema_test_", average.module, test))
            for part, net, xy in tested:
                row |= measure(net, *xy, test_attack, part, test_batch, autocast)
            row["eval_seconds"] = time.perf_counter() - start
        rows.append(row)
        if folder:
            random = _random_states(device, shuffler, augmenter)
            folder.save(model, optimizer, scheduler, step, average, rows, random)
        if on_epoch:
            on_epoch(row)
        if stop and stop():
            break
    return model, rows


def _groups(model: nn.Module, config: Config) -> Any:
    """The parameters, in two groups if weights have a decay of their own."""
    if not config.l2:
        return model.parameters()
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": config.l2},
        {"params": others, "weight_decay": 0.0},
    ]


@torch.no_grad()
def _add_l1_gradient(model: nn.Module, factor: float) -> None:
    for p in model.parameters():
        if p.ndim > 1 and p.grad is not None:
            p.grad.add_(p.sign(), alpha=factor)


def measure(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    prefix: str = "",
    batch_size: int = 128,
    autocast: torch.dtype | None = None,
) -> Row:
    """Natural and robust loss and accuracy of ``model`` in eval mode.

    Args:
        model: maps images in [0, 1] to logits; its modules are left in the modes they were in.
        x: uint8 images, shape (N, C, H, W).
        y: labels, shape (N,).
        attack: makes the robust figures.
        prefix: put before the names.
        batch_size: images at a time.
        autocast: run the forward passes in this dtype; None in the model's own.

    Returns:
        ``natural_loss``, ``natural_acc``, ``robust_loss``, ``robust_acc``; accuracies in [0, 1].
    """
    sums = torch.zeros(4, device=x.device, dtype=torch.float64)
    # Without autocast's cache of cast weights, which a captured attack would go on reading.
    precision = torch.autocast(
        x.device.type, autocast, enabled=autocast is not None, cache_enabled=False
    )
    with in_mode(model, "eval"), precision:
        for xs, ys in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
            images = _to_float(xs)
            adversarial = attack(model, images, ys)
            with torch.no_grad():
                for i, inputs in enumerate((images, adversarial)):
                    logits = model(inputs)
                    sums[2 * i] += F.cross_entropy(logits, ys, reduction="sum")
                    sums[2 * i + 1] += (logits.argmax(1) == ys).sum()
    names = ("natural_loss", "natural_acc", "robust_loss", "robust_acc")
    return {prefix + n: v for n, v in zip(names, (sums / len(x)).tolist(), strict=True)}


def best(rows: list[Row]) -> Row:
    """The epoch with the highest test robustness, the paper's "best"; the first of equals."""
    return max((r for r in rows if "test_robust_acc" in r), key=lambda r: r["test_robust_acc"])


class _RunFolder:
    """The files of a run. Each is written beside its place and moved there when it is whole."""

    COLUMNS = (
        "epoch",
        "lr",
        "train_seconds",
        "eval_seconds",
        "step_robust_loss",
        "step_robust_acc",
        *(
            f"{part}_{kind}_{what}"
            for part in ("train", "test", "ema_test")
            for kind in ("natural", "robust")
            for what in ("loss", "acc")
        ),
    )

    def __init__(self, path: Path, config: Config, data: ImageData, resume: bool) -> None:
        self.path = path
        self.about = {
            **asdict(config),
            "attack_mode": config.training_mode,
            "dataset": data.name,
            "train_images": len(data.x_train),
            "test_images": len(data.x_test),
        }
        if (path / "config.json").exists():
            if not resume:
                raise FileExistsError(
                    f"{path} already holds a run: go on with --resume, or choose another folder"
                )
            # A folder may be older than a setting: it had what is now the default.
            before = {**asdict(Config()), **json.loads((path / "config.json").read_text())}
            changed = [k for k in self.about if self.about[k] != before.get(k)]
            if changed:
                raise ValueError(
                    f"the run in {path} cannot be resumed with other settings: "
                    + ", ".join(f"{k} was {before.get(k)}, is {self.about[k]}" for k in changed)
                )
        path.mkdir(parents=True, exist_ok=True)
        self._write(
            "config.json", lambda file: file.write(json.dumps(self.about, indent=2).encode())
        )

    def load_last(self, device: torch.device) -> dict[str, Any] | None:
        file = self.path / "last.pt"
        if not file.exists():
            return None
        saved: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
        return saved

    def save(
        self,
        model: nn.Module,
        optimizer: AWP,
        scheduler: Any,
        step: AdversarialStep,
        average: AveragedModel | None,
        rows: list[Row],
        random: Any,
    ) -> None:
        if "test_robust_acc" in rows[-1] and best(rows) is rows[-1]:
            content = {"model": model.state_dict(), "config": self.about, "row": rows[-1]}
            if average:
                content["ema"] = average.module.state_dict()
            self._write("best.pt", lambda file: torch.save(content, file))
        state = {
            "model": model.state_dict(),
            "config": self.about,
            "row": rows[-1],
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "step": step.state_dict(),
            "rows": rows,
            "random": random,
        }
        if average:
            state["ema"] = average.state_dict()
        self._write("last.pt", lambda file: torch.save(state, file))
        lines = [",".join(self.COLUMNS)]
        lines += [",".join(_cell(row.get(name)) for name in self.COLUMNS) for row in rows]
        self._write("metrics.csv", lambda file: file.write("\n".join([*lines, ""]).encode()))

    def _write(self, name: str, write: Callable[[Any], Any]) -> None:
        temporary = self.path / f".{name}.{os.getpid()}"
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        finally:
            temporary.unlink(missing_ok=True)


def _to_float(x: Tensor) -> Tensor:
    return x.to(torch.float32, memory_format=torch.channels_last) / 255


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def read_metrics(folder: Path | str) -> list[Row]:
    """The rows of a run folder's ``metrics.csv``."""
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _random_states(device: torch.device, *generators: torch.Generator) -> list[Tensor]:
    states = [torch.get_rng_state(), *(g.get_state() for g in generators)]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_states(
    states: list[Tensor], device: torch.device, *generators: torch.Generator
) -> None:
    states = [state.cpu() for state in states]
    torch.set_rng_state(states[0])
    for generator, state in zip(generators, states[1:], strict=False):
        generator.set_state(state)
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[-1], device)
