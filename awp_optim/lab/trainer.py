"""Adversarial training of an image classifier, with or without AWP.

``fit`` trains, evaluates and writes a run folder, from which a run that was broken off goes on.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from awp_optim import AWP, AdversarialStep
from awp_optim.attacks import Captured
from awp_optim.attacks.base import in_mode
from awp_optim.lab.augment import cutout, mixup, random_crop_flip
from awp_optim.lab.config import PRECISIONS, Config
from awp_optim.lab.data import ImageData
from awp_optim.lab.distributed import TrainingRanks
from awp_optim.lab.job import naming_lost_ranks
from awp_optim.lab.models import build_model
from awp_optim.lab.order import epoch_order, steps_per_epoch
from awp_optim.lab.pseudo import PseudoLabeled
from awp_optim.lab.run_folder import Row, RunFolder, best, foreign
from awp_optim.lab.schedules import SCHEDULES
from awp_optim.lab.weights import initialize

__all__ = ["check", "fit", "is_over", "measure"]

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]

CHECK_EVERY = 100
"""Steps from one look at the loss to the next: a look waits for the device."""


def fit(
    config: Config,
    data: ImageData,
    out: Path | str | None = None,
    *,
    unlabeled: PseudoLabeled | None = None,
    init: Mapping[str, Tensor] | None = None,
    resume: bool = False,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[Row], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[nn.Module, list[Row]]:
    """Train, and evaluate as it goes.

    Where torch.distributed is initialised, all its processes must call it alike: each trains and
    evaluates on its share of every batch, and the first one writes. The results are those of a
    single process, within rounding, and so are the files.

    Args:
        config: the run.
        data: images and labels, on the device to train on.
        out: the run folder; None writes nothing.
        unlabeled: more images with labels that a classifier gave them: ``config.unlabeled_share``
            of every batch. "rst" needs them; the other methods can have them, too.
        init: a state dict to start from, such as :func:`~awp_optim.lab.weights.load_weights` reads.
            A head for another number of classes is left as it was initialised. "pretrain" needs
            it; the other methods can have it, too.
        resume: go on from ``last.pt`` in ``out`` if it is there. The result is the one that a run
            without a break would have had, on a GPU as far as its kernels are repeatable.
        on_step: called after each step with the number of steps done and to do, in all.
        on_epoch: called after each epoch with its row.
        stop: asked after every step, and while evaluating; True saves the run and ends it there, to
            go on later with ``resume``.

    Returns:
        The model at the end, and a row for every finished epoch (see
        :data:`~awp_optim.lab.run_folder.Row`).

    Raises:
        FileExistsError: ``out`` holds a run already and ``resume`` is False.
        ConnectionError: another process has gone. The checkpoints are of before.
        FloatingPointError: the loss or a weight is no longer finite. The checkpoints are of before.
        OSError: a file could not be written; those of before are intact.
        ValueError: the run to go on with had other settings or its checkpoint is damaged; or
            settings and data do not go together.
    """
    ranks = TrainingRanks()
    with naming_lost_ranks(ranks):
        training = _Training(config, data, unlabeled, init, ranks)
        folder = None if out is None else _open(training, Path(out), resume)
        try:
            _train(training, folder, on_step, on_epoch, ranks.sync_stop(stop, training.device))
        finally:
            if folder:
                folder.close()
    return training.model, training.rows


def _open(training: _Training, out: Path, resume: bool) -> RunFolder | None:
    """The first rank's folder, and all ranks where the run in it was."""
    ranks, device = training.ranks, training.device
    folder: RunFolder | None = None

    def read() -> dict[str, Any] | None:
        nonlocal folder
        folder = RunFolder(out, training.config, training.about, resume)
        # To be sent around it must not lie on a device, which would be the first one's.
        saved = folder.load_last(device if ranks.world == 1 else torch.device("cpu"))
        if saved and (was := saved.get("device", device.type)) != device.type:
            raise ValueError(f"the run was on {was}, and cannot go on on {device}")
        return saved

    if saved := ranks.first(read):
        try:
            training.load_state_dict(saved)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, RuntimeError, TypeError, ValueError, IndexError) as error:
            raise foreign(out, f"{type(error).__name__}: {error}") from error
    del saved  # it would keep its tensors on the device

    def begin() -> None:
        assert folder is not None
        folder.begin()
        if training.rows:  # a run that was killed in between has not written them
            folder.save_metrics(training.rows)

    ranks.first(begin)
    return folder


def is_over(config: Config, rows: list[Row]) -> bool:
    """Whether a run with these rows has all its epochs, or early stopping has ended it."""
    if len(rows) >= config.epochs:
        return True
    if not config.patience or not rows or "test_robust_acc" not in rows[-1]:
        return False  # not before an evaluation could have found a new best
    return rows[-1]["epoch"] - best(rows)["epoch"] >= config.patience


def _train(
    training: _Training,
    folder: RunFolder | None,
    on_step: Callable[[int, int], None] | None,
    on_epoch: Callable[[Row], None] | None,
    stop: Callable[[], bool] | None,
) -> None:
    steps = training.batches * training.config.epochs
    while not is_over(training.config, training.rows):
        if stop and stop():
            return  # the last epoch is saved
        epoch = training.begin_epoch()
        while epoch.step < training.batches:
            training.step()
            if on_step:
                on_step(len(training.rows) * training.batches + epoch.step, steps)
            if epoch.step % CHECK_EVERY == 0:
                training.check()
            if stop and epoch.step < training.batches and stop():
                training.check()
                if folder:
                    folder.save_last(training.state_dict())
                return
        training.check()
        before = training.state_dict() if folder and stop else {}
        try:
            row = training.end_epoch(stop)
        except _Stopped:
            if folder:
                folder.save_last(before)
            return
        if folder:
            if "test_robust_acc" in row and best(training.rows) is row:
                folder.save_best(training.weights())
            done, every = len(training.rows), training.config.save_every
            if every and done % every == 0:
                folder.save_epoch(done, training.weights())
            folder.log(row)  # before, for what is not in last.pt is logged anew
            folder.save_last(training.state_dict())
            folder.save_metrics(training.rows)
        if on_epoch:
            on_epoch(row)


class _Stopped(Exception):
    """An evaluation was asked to stop."""


@dataclass
class _Epoch:
    """Where a run is within an epoch."""

    order: Tensor  # indices of the images, shape (images,)
    loss_sum: Tensor  # over the images of the steps done
    correct: Tensor  # of these images
    bad_step: Tensor  # the first step whose loss was not finite; inf
    step: int = 0  # steps done
    seconds: float = 0.0


class _Training:
    """Everything that changes during a run, and how it changes."""

    def __init__(
        self,
        config: Config,
        data: ImageData,
        unlabeled: PseudoLabeled | None,
        init: Mapping[str, Tensor] | None,
        ranks: TrainingRanks,
    ) -> None:
        self.ranks = ranks
        if config.method == "rst" and not unlabeled:
            raise ValueError(
                "method 'rst' needs images with pseudo-labels: --unlabeled FILE or --labeled N"
            )
        if config.method == "pretrain" and init is None:
            raise ValueError("method 'pretrain' needs weights to start from: --init CHECKPOINT")
        self.about = {
            "dataset": data.name,
            "train_images": len(data.x_train),
            "test_images": len(data.x_test),
            "unlabeled_images": len(unlabeled) if unlabeled else 0,
            "init": None if init is None else _fingerprint(init),
            "data": _fingerprint(_samples(data, unlabeled)),
        }
        self.config = config
        self.device = device = data.x_train.device
        self.tested = {"test_": (data.x_test, data.y_test)}
        if config.select_on == "val":
            if config.val_images >= len(data.x_train):
                raise ValueError(
                    f"val_images must be fewer than the {len(data.x_train)} training images, got "
                    f"{config.val_images}"
                )
            data, self.tested["val_"] = data.split(config.val_images)
        shown = data.limit(min(config.train_eval, len(data.x_train)))
        self.shown = shown.x_train, shown.y_train
        self.labeled, self.num_classes = len(data.x_train), data.num_classes
        self.x, self.y = data.x_train, data.y_train
        if unlabeled:
            unlabeled.check_fits(data)
            self.x = torch.cat([self.x, unlabeled.x.to(device)])
            self.y = torch.cat([self.y, unlabeled.y.to(device)])
        self.images = config.epoch_images or self.labeled
        self.batches = steps_per_epoch(self.images, config.batch_size)
        ranks.check_batch(config.batch_size, "a batch")
        if not unlabeled:  # else all batches are whole
            left = self.images - (self.batches - 1) * config.batch_size
            ranks.check_batch(min(left, config.batch_size), "the last batch of an epoch")

        torch.manual_seed(config.seed)
        self.shuffler = torch.Generator().manual_seed(config.seed)
        self.augmenter = torch.Generator(device).manual_seed(config.seed)
        self._order()  # a share that leaves no image is an error now
        self.shuffler.manual_seed(config.seed)
        model = build_model(
            config.arch,
            num_classes=data.num_classes,
            in_channels=data.in_channels,
            mean=data.mean,
            std=data.std,
            activation=config.activation,
        )
        if init is not None:
            initialize(model, init)
        model.to(device)
        model.to(memory_format=torch.channels_last)  # faster convolutions, on CPUs too
        shared = ranks.shared_model(model)
        self.model = model
        self.optimizer = AWP(
            _groups(model, config),
            torch.optim.SGD,
            gamma=config.gamma,
            norm=config.awp_norm,
            direction=config.direction,
            ascent_steps=config.ascent_steps * config.alternations,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        if config.l1:
            # At the centre, where the base optimizer steps; the ascent is of the loss alone.
            self.optimizer.base_optimizer.register_step_pre_hook(
                lambda base, *_: _add_l1_gradient(model, config.l1)
            )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: self._factor(step),  # a function: a method would be saved
        )
        self.autocast = PRECISIONS[config.precision]
        self.adversarial_step = AdversarialStep(
            shared,
            self.optimizer,
            ranks.shared_attack(config.training_attack),
            ranks.shared_objective(config.objective),
            alternations=config.alternations,
            ascent=config.ascent,
            autocast=self.autocast,
        )
        self.average: AveragedModel | None = None
        if config.ema:
            decay = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
        # Among others an attack depends on what a graph does not see: how many images they have.
        test_attack = ranks.shared_attack(config.test_attack)
        self.test_attack = Captured(test_attack, "auto" if ranks.world == 1 else False)
        self.rows: list[Row] = []
        self.epoch: _Epoch | None = None

    def begin_epoch(self) -> _Epoch:
        """Draw an epoch's order; but go on with one that was begun."""
        if self.epoch is None:
            zero = torch.zeros((), device=self.device)
            order = self._order().to(self.device)
            self.epoch = _Epoch(order, zero.clone(), zero.clone(), zero + math.inf)
        gamma = 0.0 if len(self.rows) < self.config.awp_start else self.config.gamma
        for group in self.optimizer.param_groups:
            group["gamma"] = gamma
        self.model.train()
        return self.epoch

    def step(self) -> None:
        """One training step."""
        epoch, config = self.epoch, self.config
        assert epoch is not None
        start = time.perf_counter()
        index = epoch.order[epoch.step * config.batch_size :][: config.batch_size]
        images, labels = self.x[index], self.y[index]
        if config.augment:
            images = random_crop_flip(images, generator=self.augmenter)
        if config.cutout:
            images = cutout(images, config.cutout, generator=self.augmenter)
        x, y = _to_float(images), labels
        if config.mixup:
            x, y = mixup(x, labels, self.num_classes, config.mixup, self.augmenter)
            labels = y.argmax(1)
        x, y, labels = self.ranks.shard(x, y, labels)
        result = self.adversarial_step(x, y)
        self.scheduler.step()
        if self.average:
            self.average.update_parameters(self.model)
        loss = result.loss * (self.ranks.batch / self.ranks.world)
        correct = (result.logits.argmax(1) == labels).sum()
        loss, correct = self.ranks.sum(torch.stack([loss, correct.to(loss.dtype)])).unbind()
        epoch.loss_sum += loss
        epoch.correct += correct
        here = torch.where(loss.isfinite(), math.inf, epoch.step)
        epoch.bad_step = torch.minimum(epoch.bad_step, here)
        epoch.step += 1
        epoch.seconds += time.perf_counter() - start

    def check(self) -> None:
        """Raise FloatingPointError if a loss so far, or a weight, is not finite."""
        epoch = self.epoch
        assert epoch is not None
        start = time.perf_counter()
        bad = epoch.bad_step.item()  # waits for the device, whose time belongs to the steps
        epoch.seconds += time.perf_counter() - start
        values = self.model.state_dict().values()  # BatchNorm's statistics, too
        size = nn.utils.get_total_norm([v for v in values if v.is_floating_point()])
        if math.isfinite(bad) or not size.isfinite():
            what = "loss is" if math.isfinite(bad) else "weights are"
            step = int(bad) if math.isfinite(bad) else epoch.step - 1
            lr = self._rate(len(self.rows) * self.batches + step)
            raise FloatingPointError(
                f"the {what} not finite at step {step + 1} of {self.batches} of epoch "
                f"{len(self.rows) + 1}, at a learning rate of {lr:g}: start again in another "
                "folder with a lower --lr or --gamma, or in float32, perhaps by --init from the "
                "last checkpoint. What is saved is of before"
            )

    def end_epoch(self, stop: Callable[[], bool] | None) -> Row:
        """Evaluate if it is time to, and add the epoch's row.

        Raises:
            _Stopped: ``stop`` said so; the row is not there, random numbers were drawn.
        """
        epoch, config = self.epoch, self.config
        assert epoch is not None
        seen = min(len(epoch.order), self.batches * config.batch_size)
        number = len(self.rows)
        row: Row = {
            "epoch": number,
            "lr": self._rate(number * self.batches),
            "step_robust_loss": epoch.loss_sum.item() / seen,
            "step_robust_acc": epoch.correct.item() / seen,
            "train_seconds": epoch.seconds,
        }
        if (number + 1) % config.eval_every == 0 or number + 1 == config.epochs:
            start = time.perf_counter()

            def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
                if stop and stop():
                    raise _Stopped
                return self.test_attack(model, x, y)

            parts = [("train_", self.model, self.shown)]
            parts += [(name, self.model, xy) for name, xy in self.tested.items()]
            if self.average:
                net = self.average.module
                parts += [(f"ema_{name}", net, xy) for name, xy in self.tested.items()]
            batch = 1000 if self.device.type == "cuda" else 128
            for name, net, (x, y) in parts:
                row |= measure(net, x, y, attack, name, batch, self.autocast, self.ranks)
            row["eval_seconds"] = time.perf_counter() - start
        self.rows.append(row)
        self.epoch = None
        return row

    def weights(self) -> dict[str, Any]:
        """What ``best.pt`` holds, and ``epoch_0020.pt``."""
        content: dict[str, Any] = {"model": self.model.state_dict(), "row": self.rows[-1]}
        if self.average:
            content["ema"] = self.average.module.state_dict()
        return content

    def state_dict(self) -> dict[str, Any]:
        """What ``last.pt`` holds: tensors and plain data, all that is needed to go on."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rows": self.rows,
            "random": _random_states(self.device, self.shuffler, self.augmenter),
            "device": self.device.type,
        }
        if self.rows:
            state["row"] = self.rows[-1]
        if self.average:
            state["ema"] = self.average.state_dict()
        if self.epoch:
            state["epoch"] = {f.name: getattr(self.epoch, f.name) for f in fields(self.epoch)}
        return state

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        if self.average:
            self.average.load_state_dict(saved["ema"])
        self.rows = saved["rows"]
        self.epoch = None
        if "epoch" in saved:
            kept: dict[str, Any] = dict(saved["epoch"])
            for name, value in kept.items():
                kept[name] = value.to(self.device) if torch.is_tensor(value) else value
            self.epoch = _Epoch(**kept)
        _set_random_states(saved["random"], self.device, self.shuffler, self.augmenter)

    def _factor(self, step: int) -> float:
        """What the schedule makes of the learning rate at a step of all."""
        t = step / (self.config.epochs * self.batches)
        return SCHEDULES[self.config.schedule](t)

    def _rate(self, step: int) -> float:
        return self.config.lr * self._factor(step)

    def _order(self) -> Tensor:
        return epoch_order(
            self.labeled,
            self.images,
            self.config.batch_size,
            self.shuffler,
            unlabeled=len(self.x) - self.labeled,
            share=self.config.unlabeled_share,
        )


def check(
    config: Config,
    data: ImageData,
    *,
    unlabeled: PseudoLabeled | None = None,
    init: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise what :func:`fit` would about these arguments, without training."""
    _Training(config, data, unlabeled, init, TrainingRanks())


def _samples(data: ImageData, unlabeled: PseudoLabeled | None) -> dict[str, Tensor]:
    """All labels, and a thousand images of each part: enough to tell data from other data."""
    parts = {"train": (data.x_train, data.y_train), "test": (data.x_test, data.y_test)}
    if unlabeled:
        parts["unlabeled"] = unlabeled.x, unlabeled.y
    samples = {f"y_{name}": y for name, (_, y) in parts.items()}
    return samples | {f"x_{name}": x[:: -(-len(x) // 1000)] for name, (x, _) in parts.items()}


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Tells one set of named tensors from another."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


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
    ranks: TrainingRanks | None = None,
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
        ranks: processes that share out every batch; None for this one alone.

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
            if ranks:
                xs, ys = ranks.shard(xs, ys)
            images = _to_float(xs)
            adversarial = attack(model, images, ys)
            if ranks and not ranks.own:
                continue
            with torch.no_grad():
                for i, inputs in enumerate((images, adversarial)):
                    logits = model(inputs)
                    sums[2 * i] += F.cross_entropy(logits, ys, reduction="sum")
                    sums[2 * i + 1] += (logits.argmax(1) == ys).sum()
    if ranks:
        sums = ranks.sum(sums)
    names = ("natural_loss", "natural_acc", "robust_loss", "robust_acc")
    return {prefix + n: v for n, v in zip(names, (sums / len(x)).tolist(), strict=True)}


def _to_float(x: Tensor) -> Tensor:
    return x.to(torch.float32, memory_format=torch.channels_last) / 255


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
