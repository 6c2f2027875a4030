"""Hugging Face's Trainer with AWP.

    class AWPTrainer(AWPTrainerMixin, Trainer):  # or Seq2SeqTrainer, or your own Trainer
        pass

    AWPTrainer(model, args, train_dataset=data, awp=AWPArguments(gamma=5e-3, perturb=["embed"]))

AWP treats all batches that Trainer accumulates for one update as a single batch: the ascent follows
their total gradient at w, then each batch is passed again at w + v.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from awp_optim.batchnorm import frozen_batch_norm
from awp_optim.integrations.groups import compile_names, perturb_only
from awp_optim.integrations.start import StartWhen
from awp_optim.optimizer import AWP

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the user adds Trainer as a base; transformers need not be installed here

__all__ = ["AWPArguments", "AWPTrainerMixin"]


@dataclass
class AWPArguments:
    """Settings of AWP, used along with TrainingArguments; HfArgumentParser can parse them.

    Raises:
        ValueError: ``perturb`` holds something that is not a regular expression.
    """

    gamma: float = field(
        default=5e-3, metadata={"help": "Size of the perturbation relative to each weight's norm."}
    )
    norm: str = field(default="l2", metadata={"help": "l2 or l1."})
    ascent_steps: int = field(
        default=1,
        metadata={"help": "Ascents per update; each is a pass over its batches."},
    )
    min_ndim: int = field(
        default=2,
        metadata={"help": "Perturb only tensors with at least this many dimensions."},
    )
    perturb: list[str] | None = field(
        default=None,
        metadata={"help": "Regular expressions: perturb only parameters whose names match."},
    )
    start_epoch: float | None = field(
        default=None, metadata={"help": "Perturb after this many epochs."}
    )
    start_step: int | None = field(
        default=None, metadata={"help": "Perturb after this many updates."}
    )
    start_loss_below: float | None = field(
        default=None, metadata={"help": "Perturb once an update's training loss is below this."}
    )

    def __post_init__(self) -> None:
        compile_names(self.perturb or [])


class AWPTrainerMixin(_Trainer):
    """Trains with AWP around Trainer's own optimizer; list it before Trainer among the bases.

    The logged training loss is the loss at w (at w + v with a direction other than "gradient",
    which needs no pass at w). Trainer clips the gradients of the update; those of the ascent need
    no clipping, because their length cancels. Checkpoints, evaluation and prediction use w.

    Args:
        awp: the settings. Omit it if you pass your own AWP as ``optimizers=(awp, None)``, which is
            used unchanged.

    Raises:
        ValueError: from ``train()`` or ``create_optimizer()``, for DeepSpeed, FSDP 1 and optimizers
            that step during the backward pass, which do not provide complete weights and gradients;
            if ``perturb`` matches nothing; if it splits groups on which a scheduler given in
            ``optimizers`` was built.
    """

    def __init__(self, *args: Any, awp: AWPArguments | None = None, **kwargs: Any) -> None:
        self.awp_args = awp
        self._has_wrapped = False
        self._update_batches: list[Any] = []
        self._losses_at_w: deque[Tensor] = deque()
        self._update_loss: Tensor | None = None
        super().__init__(*args, **kwargs)
        awp = awp or AWPArguments()
        self._start = StartWhen(awp.start_epoch, awp.start_step, awp.start_loss_below)
        self.add_callback(_between_updates(self._set_gamma, self._restore))

    @property
    def awp(self) -> AWP | None:
        """The AWP inside Accelerate's wrapper; None before training."""
        return _find_awp(self.optimizer)

    # ------------------------------------------------------------------ the optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's optimizer, wrapped in AWP."""
        if self.awp is not None:
            if self.awp_args is not None and not self._has_wrapped:
                raise ValueError(
                    "the optimizer is an AWP already: omit awp=, or pass its base optimizer"
                )
            return self.optimizer
        base = super().create_optimizer(*args, **kwargs)
        _refuse_stepping_in_backward(base, str(getattr(self.args.optim, "value", "")))
        settings = self.awp_args or AWPArguments()
        if settings.perturb is not None:
            model = args[0] if args and args[0] is not None else self.model
            self._split_groups(base, model, settings)
        self.optimizer = AWP.wrap(
            base,
            settings.gamma,
            ascent_steps=settings.ascent_steps,
            norm=settings.norm,
            min_ndim=settings.min_ndim,
        )
        self._has_wrapped = True
        for mode in ("train", "eval"):  # Trainer calls them on schedule-free optimizers
            if hasattr(base, mode):
                setattr(self.optimizer, mode, getattr(base, mode))
        return self.optimizer

    def _split_groups(self, base: Any, model: Any, settings: AWPArguments) -> None:
        """Split the optimizer's groups into perturbed and unperturbed ones, in place."""
        assert settings.perturb is not None
        groups = perturb_only(model, settings.perturb, settings.gamma, groups=base.param_groups)
        if self.lr_scheduler is not None and len(groups) != len(base.param_groups):
            raise ValueError(
                "perturb splits the parameter groups, but the scheduler in optimizers= was built "
                "on the unsplit ones: build the optimizer on perturb_only(...) yourself"
            )
        base.param_groups[:] = groups

    # ------------------------------------------------------------------ the passes

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any
    ) -> tuple[list[Any], Any]:
        """The batches of one update, which the ascent needs before the first pass."""
        batches, num_items = super().get_batch_samples(epoch_iterator, *args, **kwargs)
        self._update_batches = batches
        self._losses_at_w.clear()
        self._update_loss = None
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A pass at w + v; the first one of an update is preceded by the ascents."""
        awp = self.awp
        assert awp is not None
        try:
            if awp.directions and not awp.is_perturbed:
                self._ascend(awp, model, inputs, *args, **kwargs)
            loss = super().training_step(model, inputs, *args, **kwargs)
        except BaseException:
            awp.restore()
            raise
        if self._losses_at_w:
            loss = self._losses_at_w.popleft()
        if self._start.loss_below is not None:
            self._update_loss = loss if self._update_loss is None else self._update_loss + loss
        return loss

    def _ascend(self, awp: AWP, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> None:
        """All ascents of an update, each after a pass over all its batches."""
        known = any(batch is inputs for batch in self._update_batches)
        batches = self._update_batches if known else [inputs]
        model.zero_grad()  # an interrupted update may have left gradients
        for ascent in range(awp.ascent_steps):
            for batch in batches if "gradient" in awp.directions else ():
                # Trainer synchronizes processes only in an update's last batch; the ascent must do
                # so in its own last batch.
                is_last = len(batches) > 1 and batch is batches[-1]
                synchronize = self.accelerator.trigger_sync_in_backward if is_last else nullcontext
                with frozen_batch_norm(model), synchronize(model):
                    loss = super().training_step(model, batch, *args, **kwargs)
                if ascent == 0:
                    self._losses_at_w.append(loss)
            awp.first_step()
            model.zero_grad()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's ``train``; the weights are always restored at the end."""
        is_fsdp2 = getattr(self.accelerator, "is_fsdp2", False)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not is_fsdp2):
            raise ValueError(
                "DeepSpeed and FSDP 1 do not provide the complete weights and gradients that AWP "
                "needs: train with DistributedDataParallel (torchrun)"
            )
        try:
            return super().train(*args, **kwargs)
        finally:
            self._restore()

    # ------------------------------------------------------------------ between updates

    def _set_gamma(self) -> None:
        """Apply the start condition before a checkpoint of the last update is saved."""
        awp = self.awp
        if awp is None or self._start == StartWhen():
            return
        loss = self._update_loss
        if loss is not None:  # all processes must start together
            loss = self.accelerator.reduce(loss, "mean")
        self._start(
            awp,
            epoch=self.state.epoch or 0,
            step=self.state.global_step,
            loss=None if loss is None else loss.item(),
        )

    def _restore(self) -> None:
        if self.awp is not None:
            self.awp.restore()


def _between_updates(set_gamma: Callable[[], None], restore: Callable[[], None]) -> Any:
    """A TrainerCallback that calls these functions between updates."""
    from transformers import TrainerCallback

    class BetweenUpdates(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            set_gamma()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            set_gamma()

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            restore()  # an epoch may end between accumulated batches

    return BetweenUpdates()


def _find_awp(optimizer: Any) -> AWP | None:
    while optimizer is not None and not isinstance(optimizer, AWP):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _refuse_stepping_in_backward(optimizer: Any, name: str) -> None:
    if "lomo" in name or "layerwise" in name:
        raise ValueError(
            f"{type(optimizer).__name__} (optim={name!r}) updates weights during the backward "
            "pass, so no gradient is left for AWP's second step. Choose another optim"
        )
