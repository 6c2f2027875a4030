"""Adversarial training of an image classifier, with or without AWP.

:func:`fit` is the experiment of Section 4.4 of the paper: it builds data, model and optimizer,
trains, evaluates after each epoch, and writes a run folder from which it can resume.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awp_optim import AdversarialStep
from awp_optim.lab.building import build_network, build_optimizer, compile_network
from awp_optim.lab.checkpoints import EpochProgress, RunState, bad_checkpoint, load_last
from awp_optim.lab.class_means import ClassMeans
from awp_optim.lab.config import PRECISIONS, Config
from awp_optim.lab.data import ImageData
from awp_optim.lab.distributed import TrainingRanks
from awp_optim.lab.ema import MovingAverage
from awp_optim.lab.evaluator import Evaluator, Images
from awp_optim.lab.job import naming_lost_ranks
from awp_optim.lab.precision import resolve_precision
from awp_optim.lab.pseudo import PseudoLabeled
from awp_optim.lab.run_folder import Row, RunFolder, best
from awp_optim.lab.schedules import SCHEDULES
from awp_optim.lab.training_set import TrainingSet, describe_inputs
from awp_optim.objectives import GKL, Objective

__all__ = ["check", "fit", "is_over"]

CHECK_EVERY = 100
"""Steps between two checks that the loss is finite: a check waits for the device."""


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
    """Train, and evaluate after each epoch.

    If torch.distributed is initialized, all its processes must make the same call: each trains and
    evaluates on its share of every batch, and the first one writes. The results are those of a
    single process, within rounding, and so are the files.

    Args:
        config: the run's settings. The precision "auto" is decided here.
        data: images and labels, on the device to train on.
        out: the run folder; None writes nothing.
        unlabeled: more images with labels that a classifier gave them: ``config.unlabeled_share``
            of every batch. "rst" needs them; the other methods can use them, too.
        init: a state dict to start from, such as :func:`~awp_optim.lab.weights.load_weights` reads.
            A head for another number of classes is initialized anew. "pretrain" needs it; the other
            methods can use it, too.
        resume: continue from ``last.pt`` in ``out`` if it exists. The result is the one that an
            uninterrupted run would have had, on a GPU as far as its kernels are deterministic.
        on_step: called after each step with the number of steps done and the number in all.
        on_epoch: called after each epoch with its row.
        stop: called after every step and while evaluating; True saves the run and ends it there, to
            be continued with ``resume``.

    Returns:
        The model at the end, and a row for every finished epoch (see
        :data:`~awp_optim.lab.run_folder.Row`).

    Raises:
        BlockingIOError: another process is running in ``out``.
        ConnectionError: another rank has ended. The last checkpoint is intact.
        FileExistsError: ``out`` holds a run already and ``resume`` is False.
        FloatingPointError: the loss or a weight is not finite. The last checkpoint is intact.
        OSError: a file could not be written; the previous one is intact.
        ValueError: the run to resume had other settings or its checkpoint is damaged; or settings
            and data do not go together.
    """
    ranks = TrainingRanks()
    with naming_lost_ranks(ranks):
        continued = out if resume else None
        config = ranks.first(lambda: resolve_precision(config, data.x_train.device, continued))
        run = _Run(config, data, unlabeled, init, ranks)
        with _opened(out, run, resume=resume) as folder:
            _train(
                run,
                folder,
                on_step or (lambda done, total: None),
                on_epoch or (lambda row: None),
                ranks.sync_stop(stop, run.device),
            )
    return run.model, run.state.rows


def check(
    config: Config,
    data: ImageData,
    *,
    unlabeled: PseudoLabeled | None = None,
    init: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise what :func:`fit` would raise for these arguments, without training."""
    config = resolve_precision(config, data.x_train.device)
    _Run(config, data, unlabeled, init, TrainingRanks())


def is_over(config: Config, rows: list[Row]) -> bool:
    """Whether a run with these rows has all its epochs, or early stopping has ended it."""
    if len(rows) >= config.epochs:
        return True
    if not config.patience or not rows or "test_robust_acc" not in rows[-1]:
        return False  # not before an evaluation that could have found a new best
    return rows[-1]["epoch"] - best(rows)["epoch"] >= config.patience


def _train(
    run: _Run,
    folder: RunFolder | None,
    on_step: Callable[[int, int], None],
    on_epoch: Callable[[Row], None],
    stop: Callable[[], bool],
) -> None:
    """Train, evaluate and save epoch by epoch, until the run is over or asked to stop."""
    while not is_over(run.config, run.state.rows):
        if stop():
            return  # the last epoch has been saved
        epoch = run.begin_epoch()
        finished = _train_steps(run, epoch, on_step, stop)
        unfinished = run.state.state_dict()  # an evaluation draws random numbers
        row = run.end_epoch(epoch, stop) if finished else None
        if row is None:
            if folder:
                folder.save("last.pt", unfinished)
            return
        if folder:
            _save_epoch(folder, run.config, run.state)
        on_epoch(row)


def _train_steps(
    run: _Run,
    epoch: EpochProgress,
    on_step: Callable[[int, int], None],
    stop: Callable[[], bool],
) -> bool:
    """Train the remaining steps of an epoch; False if it was asked to stop before the last."""
    steps = run.training_set.steps
    with closing(run.training_set.batches(epoch.order, epoch.step)) as batches:
        while epoch.step < steps:
            run.step(epoch, batches)
            on_step(len(run.state.rows) * steps + epoch.step, steps * run.config.epochs)
            if epoch.step % CHECK_EVERY == 0:
                run.check_finite(epoch)
            if epoch.step < steps and stop():
                break
    run.check_finite(epoch)
    return epoch.step == steps


def _save_epoch(folder: RunFolder, config: Config, state: RunState) -> None:
    """Save a finished epoch, ``last.pt`` after all files that a resumed run would not write."""
    rows = state.rows
    if "test_robust_acc" in rows[-1] and best(rows) is rows[-1]:
        folder.save_best(state.weights())
    if config.save_every and len(rows) % config.save_every == 0:
        folder.save(f"epoch_{len(rows):04d}.pt", state.weights())
    folder.log(rows[-1])
    folder.save("last.pt", state.state_dict())
    folder.save_metrics(rows)


@contextmanager
def _opened(out: Path | str | None, run: _Run, *, resume: bool) -> Iterator[RunFolder | None]:
    """Open the run folder on the first rank, and restore the run in it on all ranks."""
    if out is None:
        yield None
        return
    path, ranks, device = Path(out), run.ranks, run.device
    folder: RunFolder | None = None

    def read() -> dict[str, Any] | None:
        nonlocal folder
        folder = RunFolder(path, run.config, run.about, resume=resume)
        if not folder.last.exists():
            return None
        # What is broadcast to the other ranks must not be on the first one's device.
        saved = load_last(folder.last, device if ranks.world == 1 else torch.device("cpu"))
        folder.check_settings(saved["config"])  # it may belong to another run
        if (was := saved.get("device", device.type)) != device.type:
            raise ValueError(f"the run was on {was}, and cannot be resumed on {device}")
        return saved

    def begin() -> None:
        assert folder is not None
        folder.begin(run.state.rows)

    try:
        _restore(run.state, ranks.first(read), path)
        ranks.first(begin)
        yield folder
    finally:
        if folder:
            folder.close()


def _restore(state: RunState, saved: dict[str, Any] | None, path: Path) -> None:
    if saved is None:
        return
    try:
        state.load_state_dict(saved)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a foreign or damaged state leads to
        raise bad_checkpoint(path / "last.pt", f"{type(error).__name__}: {error}") from error


class _Run:
    """Data, model, optimizer, training step and evaluation of a run."""

    def __init__(
        self,
        config: Config,
        data: ImageData,
        unlabeled: PseudoLabeled | None,
        init: Mapping[str, Tensor] | None,
        ranks: TrainingRanks,
    ) -> None:
        check_inputs(config, unlabeled=bool(unlabeled), init=init is not None)
        self.config, self.ranks = config, ranks
        self.about = describe_inputs(data, unlabeled, init)
        data, held_out = _hold_out(config, data)
        self.device = data.x_train.device

        torch.manual_seed(config.seed)
        self.training_set = TrainingSet(config, data, unlabeled, ranks)
        ranks.check_batch(config.batch_size, "a batch")
        ranks.check_batch(self.training_set.last_batch, "the last batch of an epoch")

        self.model = build_network(config, data, init).to(self.device)
        self.model.to(memory_format=torch.channels_last)  # faster convolutions, on CPUs too
        if config.compile:
            compile_network(self.model)
        self._shared_model = ranks.shared_model(self.model)
        optimizer = build_optimizer(self.model, config)
        self._lr_factor = _lr_factor(config, config.epochs * self.training_set.steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        self.state = RunState(
            self.model,
            optimizer,
            scheduler,
            self.training_set.generators,
            self.device,
            self._average(),
            ClassMeans(data.num_classes, self.device) if config.method == "gkl" else None,
            rows=[],
        )
        self.adversarial_step = self._adversarial_step(epoch=0)
        self.evaluate = Evaluator(config, data, held_out, ranks)

    def _average(self) -> MovingAverage | None:
        config = self.config
        if not config.ema:
            return None
        start = config.ema_start * self.training_set.steps
        average = MovingAverage(self.model, config.ema, start=start, warmup=config.ema_warmup)
        if config.compile:
            compile_network(average.module)
        return average

    def _adversarial_step(self, epoch: int) -> AdversarialStep:
        config, ranks = self.config, self.ranks
        return AdversarialStep(
            self._shared_model,
            self.state.optimizer,
            ranks.shared_attack(config.training_attack_in(epoch)),
            ranks.shared_objective(self._objective()),
            alternations=config.alternations,
            ascent=config.ascent,
            ascent_below=config.ascent_below or None,
            autocast=PRECISIONS[config.precision],
        )

    def _objective(self) -> Objective:
        objective, means = self.config.objective, self.state.class_means
        if isinstance(objective, GKL) and means:
            return replace(objective, class_probs=means.means)
        return objective

    def begin_epoch(self) -> EpochProgress:
        """Draw an epoch's order, or continue an epoch that was interrupted."""
        state = self.state
        if state.epoch is None:
            state.epoch = EpochProgress.begin(self.training_set.shuffle())
        gamma = 0.0 if len(state.rows) < self.config.awp_start else self.config.gamma
        for group in state.optimizer.param_groups:
            group["gamma"] = gamma
        if self.config.eps_schedule != "constant":
            # A new step rather than a new attack for it: its CUDA graphs replace the previous ones.
            self.adversarial_step = self._adversarial_step(len(state.rows))
        self.model.train()
        return state.epoch

    def step(self, epoch: EpochProgress, batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Train on the next batch: attack the inputs, ascend and descend in the weights."""
        start = time.perf_counter()
        ranks, state = self.ranks, self.state
        x, y, labels = ranks.shard(*next(batches))
        result = self.adversarial_step(x, y)
        state.scheduler.step()
        if state.average:
            state.average.update_parameters(self.model)
        loss_sum = result.loss * (ranks.batch / ranks.world)
        logits_nat = self.adversarial_step.logits_nat
        if state.class_means and logits_nat is not None:
            sums = state.class_means.sums_of(logits_nat, y)
            state.class_means.sums += ranks.sum(sums)
        correct = (result.logits.argmax(1) == labels).sum()
        epoch.add_step(*ranks.sum(torch.stack([loss_sum, correct.to(loss_sum.dtype)])))
        epoch.seconds += time.perf_counter() - start

    def check_finite(self, epoch: EpochProgress) -> None:
        """Raise FloatingPointError if a loss of the epoch, or a weight, is not finite."""
        start = time.perf_counter()
        bad_step = epoch.bad_step.item()  # waits for the device, whose time belongs to the steps
        epoch.seconds += time.perf_counter() - start
        values = self.model.state_dict().values()  # BatchNorm's statistics, too
        norm = nn.utils.get_total_norm([v for v in values if v.is_floating_point()])
        if math.isfinite(bad_step):
            what, step = "loss is", int(bad_step)
        elif not norm.isfinite():
            what, step = "weights are", epoch.step - 1
        else:
            return
        steps, done = self.training_set.steps, len(self.state.rows)
        raise FloatingPointError(
            f"the {what} not finite at step {step + 1} of {steps} of epoch {done + 1}, at a "
            f"learning rate of {self._lr(done * steps + step):g}: start again in another folder "
            "with a lower --lr or --gamma, or in float32, perhaps by --init from the last "
            "checkpoint, which is intact"
        )

    def end_epoch(self, epoch: EpochProgress, stop: Callable[[], bool]) -> Row | None:
        """Evaluate if it is time to, and add the epoch's row to the state.

        Returns None if ``stop`` ended the evaluation: the state is then unchanged except for the
        random numbers drawn.
        """
        config, state = self.config, self.state
        number, images = len(state.rows), self.training_set.epoch_images
        row: Row = {
            "epoch": number,
            "lr": self._lr(number * self.training_set.steps),
            "step_robust_loss": epoch.loss_sum.item() / images,
            "step_robust_acc": epoch.correct.item() / images,
            "seconds": epoch.seconds,
        }
        if (number + 1) % config.eval_every == 0 or number + 1 == config.epochs:
            average = state.average.module if state.average else None
            metrics = self.evaluate(self.model, average, stop)
            if metrics is None:
                return None
            row |= metrics
        if state.class_means:
            state.class_means.end_epoch()
        state.rows.append(row)
        state.epoch = None
        return row

    def _lr(self, step: int) -> float:
        return self.config.lr * self._lr_factor(step)


def check_inputs(config: Config, *, unlabeled: bool, init: bool) -> None:
    """Raise ValueError for a method without the images or the weights that it needs.

    Args:
        config: the run.
        unlabeled: whether there are images with pseudo-labels.
        init: whether there are weights to start from.
    """
    if config.method == "rst" and not unlabeled:
        raise ValueError(
            "method 'rst' needs images with pseudo-labels: --unlabeled FILE or --labeled N"
        )
    if config.method == "pretrain" and not init:
        raise ValueError("method 'pretrain' needs weights to start from: --init CHECKPOINT")


def _hold_out(config: Config, data: ImageData) -> tuple[ImageData, Images | None]:
    """The data to train and test on, and the training images held out to pick the best epoch."""
    if config.select_on != "val":
        return data, None
    if config.val_images >= len(data.x_train):
        raise ValueError(
            f"val_images must be fewer than the {len(data.x_train)} training images, got "
            f"{config.val_images}"
        )
    return data.split(config.val_images)


def _lr_factor(config: Config, steps: int) -> Callable[[int], float]:
    """The schedule's factor of the learning rate at each of the run's steps.

    It does not refer to the run, which the scheduler would else keep in memory.
    """
    schedule = SCHEDULES[config.schedule]
    # A function: LambdaLR would save the attributes of anything else.
    return lambda step: schedule(step / steps)
