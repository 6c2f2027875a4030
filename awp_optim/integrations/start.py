"""From when on the weights are perturbed."""

from __future__ import annotations

from dataclasses import dataclass

from awp_optim.optimizer import AWP

__all__ = ["StartWhen"]

_AWAITED = "awaited_gamma"


@dataclass(frozen=True)
class StartWhen:
    """Keeps gamma at 0 until all conditions that are set hold at once; from then on it is gamma.

    Until then AWP is its base optimizer, at its price. What is awaited lies in the parameter groups
    and so in the optimizer's checkpoints: a run that is resumed neither waits again nor starts
    early.

    Args:
        epoch: the first epoch with perturbation, counted as you count in the call.
        step: the first step, likewise.
        loss_below: start once the loss is below this.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> opt = AWP(model.parameters(), torch.optim.SGD, gamma=5e-3, lr=0.1)
        >>> start = StartWhen(epoch=2)
        >>> [start(opt, epoch=epoch) for epoch in range(4)]
        [False, False, True, True]
        >>> opt.param_groups[0]["gamma"]
        0.005
    """

    epoch: float | None = None
    step: int | None = None
    loss_below: float | None = None

    def __call__(
        self,
        optimizer: AWP,
        *,
        epoch: float | None = None,
        step: int | None = None,
        loss: float | None = None,
    ) -> bool:
        """Call it before the first step, and whenever what it waits for may have changed.

        Args:
            optimizer: whose groups are switched on, at the centre.
            epoch: where training is now.
            step: where training is now.
            loss: a training or validation loss, NaN counts as not below. None where there is none
                yet.

        Returns:
            Whether the weights are perturbed from now on.

        Raises:
            TypeError: if ``optimizer`` is no AWP.
            ValueError: if a condition waits for an epoch or a step that is not given.
            RuntimeError: between a first and a second step.
        """
        if not isinstance(optimizer, AWP):
            raise TypeError(f"StartWhen takes an AWP, got {type(optimizer).__name__}")
        for name, wanted, now in (("epoch", self.epoch, epoch), ("step", self.step, step)):
            if wanted is not None and now is None:
                raise ValueError(f"the start waits for {name} {wanted}: pass {name}=")
        if optimizer.is_perturbed:
            raise RuntimeError("StartWhen while the weights are perturbed: call it before a step")
        holds = (
            (self.epoch is None or (epoch is not None and epoch >= self.epoch))
            and (self.step is None or (step is not None and step >= self.step))
            and (self.loss_below is None or (loss is not None and loss < self.loss_below))
        )
        for group in optimizer.param_groups:
            if _AWAITED not in group:
                group[_AWAITED], group["gamma"] = group["gamma"], 0.0
            if holds and group[_AWAITED] is not None:  # None: it has started
                group["gamma"], group[_AWAITED] = group[_AWAITED], None
        return all(group[_AWAITED] is None for group in optimizer.param_groups)
