"""Hugging Face's Trainer with AWP.

    class AWPTrainer(AWPTrainerMixin, Trainer):  # or Seq2SeqTrainer, or a Trainer of your own
        pass

    AWPTrainer(model, args, train_dataset=data, awp=AWPArguments(gamma=5e-3, perturb=["embed"]))

The batches that are accumulated for one update are one batch to AWP: the ascent follows their
gradient at w as a whole, then each is passed again at w + v.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from awp_optim.batchnorm import frozen_batch_norm
from awp_optim.integrations.groups import perturb_only
from awp_optim.integrations.start import StartWhen
from awp_optim.optimizer import AWP

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # a mixin: what it extends is the user's choice, and need not be installed

__all__ = ["AWPArguments", "AWPTrainerMixin"]


@dataclass
class AWPArguments:
    """Settings of AWP beside TrainingArguments; HfArgumentParser reads them, too."""

    gamma: float = field(
        default=5e-3, metadata={"help": "Size of the perturbation relative to each weight's norm."}
    )
    norm: str = field(default="l2", metadata={"help": "l2 or l1."})
    ascent_steps: int = field(
        default=1, metadata={"help": "Ascents per update; each costs a pass over its batches."}
    )
    min_ndim: int = field(
        default=2,
        metadata={"help": "Weights with fewer dimensions stay; 1 perturbs biases and norms, too."},
    )
    perturb: list[str] | None = field(
        default=None,
        metadata={"help": "Regular expressions: perturb only parameters whose name has one."},
    )
    start_epoch: float | None = field(
        default=None, metadata={"help": "Perturb once so many epochs are done."}
    )
    start_step: int | None = field(
        default=None, metadata={"help": "Perturb once so many updates are done."}
    )
    start_loss_below: float | None = field(
        default=None, metadata={"help": "Perturb once the training loss of an update is below."}
    )


class AWPTrainerMixin(_Trainer):
    """Put before Trainer among the bases: trains with AWP around the optimizer Trainer would use.

    Logged is the training loss at the centre w (with a direction other than "gradient", which needs
    no pass there, that at w + v). Gradients are clipped where Trainer clips them: those of the
    update; the ascent's length does not depend on theirs. Checkpoints, evaluation and prediction
    see w.

    Args:
        awp: the settings. Left out with an AWP of your own in ``optimizers=(awp, None)``, which
            then is used as it is.

    Raises:
        ValueError: from ``train()`` or the making of the optimizer: with DeepSpeed, FSDP 1, and
            optimizers that step during the backward pass, none of which keeps whole gradients at
            whole weights; with ``perturb`` that chooses nothing, or groups that a scheduler given
            in ``optimizers`` does not know.
    """

    def __init__(self, *args: Any, awp: AWPArguments | None = None, **kwargs: Any) -> None:
        self.awp_args = awp
        self._window: list[Any] = []
        self._clean_losses: deque[Tensor] = deque()
        self._update_loss: Tensor | None = None
        super().__init__(*args, **kwargs)
        awp = awp or AWPArguments()
        self._start = StartWhen(awp.start_epoch, awp.start_step, awp.start_loss_below)
        self.add_callback(_make_callback(self))

    @property
    def awp(self) -> AWP | None:
        """The AWP in use, without what Accelerate puts around it; None before training."""
        return _find(self.optimizer)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's optimizer, wrapped."""
        given = self.optimizer
        if _find(given) is not None:
            if self.awp_args is not None and not getattr(self, "_is_ours", False):
                raise ValueError(
                    "the optimizer is an AWP already: leave out awp=, or give its base"
                )
            return given
        optimizer = super().create_optimizer(*args, **kwargs)
        _refuse_stepping_in_backward(optimizer, str(getattr(self.args.optim, "value", "")))
        settings = self.awp_args or AWPArguments()
        if settings.perturb is not None:
            model: Any = args[0] if args and args[0] is not None else self.model
            groups = perturb_only(
                model, settings.perturb, settings.gamma, groups=optimizer.param_groups
            )
            if self.lr_scheduler is not None and len(groups) != len(optimizer.param_groups):
                raise ValueError(
                    "perturb splits the parameter groups, but the scheduler in optimizers= was "
                    "built on those before: build the optimizer on perturb_only(...) yourself"
                )
            optimizer.param_groups[:] = groups
        self.optimizer = AWP.wrap(
            optimizer,
            settings.gamma,
            ascent_steps=settings.ascent_steps,
            norm=settings.norm,
            min_ndim=settings.min_ndim,
        )
        self._is_ours = True
        for mode in ("train", "eval"):  # schedule-free optimizers have them, and Trainer asks
            if hasattr(optimizer, mode):
                setattr(self.optimizer, mode, getattr(optimizer, mode))
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any
    ) -> tuple[list[Any], Any]:
        """The batches of one update, which the ascent must see before the first of them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, *args, **kwargs)
        self._window = batches
        self._clean_losses.clear()
        self._update_loss = None
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A pass at w + v; before the first of an update, the ascent."""
        awp = self.awp
        assert awp is not None
        try:
            if awp.directions and not awp.is_perturbed:
                self._ascend(awp, model, inputs, *args, **kwargs)
            loss = super().training_step(model, inputs, *args, **kwargs)
        except BaseException:
            awp.restore()
            raise
        if self._clean_losses:
            loss = self._clean_losses.popleft()
        if self._start.loss_below is not None:
            self._update_loss = loss if self._update_loss is None else self._update_loss + loss
        return loss

    def _ascend(self, awp: AWP, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> None:
        window = self._window if any(b is inputs for b in self._window) else [inputs]
        model.zero_grad()  # what an update that was broken off has left
        for ascent in range(awp.ascent_steps):
            if "gradient" in awp.directions:
                for batch in window:
                    # Trainer keeps processes apart until the last batch of an update; this is not
                    # it, but the last of the ascent.
                    is_last_of_many = len(window) > 1 and batch is window[-1]
                    together = (
                        self.accelerator.trigger_sync_in_backward(model)
                        if is_last_of_many
                        else nullcontext()
                    )
                    with frozen_batch_norm(model), together:
                        loss = super().training_step(model, batch, *args, **kwargs)
                    if ascent == 0:
                        self._clean_losses.append(loss)
            awp.first_step()
            model.zero_grad()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; however it ends, the weights are at the centre."""
        if self.is_deepspeed_enabled or (
            self.is_fsdp_enabled and not getattr(self.accelerator, "is_fsdp2", False)
        ):
            raise ValueError(
                "AWP needs each weight and its gradient whole: train with DistributedDataParallel "
                "(torchrun), not with DeepSpeed or FSDP 1"
            )
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.awp is not None:
                self.awp.restore()

    def _check_start(self) -> None:
        """At the centre, before what is saved of the step just taken."""
        awp = self.awp
        if awp is None or self._start == StartWhen():
            return
        loss = self._update_loss
        if loss is not None:  # the processes must start together
            loss = self.accelerator.reduce(loss, "mean")
        self._start(
            awp,
            epoch=self.state.epoch or 0,
            step=self.state.global_step,
            loss=None if loss is None else loss.item(),
        )


def _make_callback(trainer: AWPTrainerMixin) -> Any:
    from transformers import TrainerCallback

    class AWPCallback(TrainerCallback):
        """Tells the mixin of the moments between two updates."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer._check_start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            trainer._check_start()

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            if trainer.awp is not None:  # an epoch may be broken off between accumulated batches
                trainer.awp.restore()

    return AWPCallback()


def _find(optimizer: Any) -> AWP | None:
    while optimizer is not None and not isinstance(optimizer, AWP):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _refuse_stepping_in_backward(optimizer: Any, name: str) -> None:
    if "lomo" in name or "layerwise" in name:
        raise ValueError(
            f"{type(optimizer).__name__} (optim={name!r}) updates weights during the backward "
            "pass: there is no gradient left to step with at the centre. Choose another optim"
        )
