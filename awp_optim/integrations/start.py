"""A condition for when AWP starts."""

from __future__ import annotations

from dataclasses import dataclass

from awp_optim.optimizer import AWP

__all__ = ["StartWhen"]

_AWAITED = "awaited_gamma"  # in a parameter group: its gamma before the start, None afterwards


@dataclass(frozen=True)
class StartWhen:
    """Keeps gamma at 0 until all given conditions hold at the same time, then sets it for good.

    Until then, AWP only runs its base optimizer, at no extra cost. Whether it has started is stored
    in the parameter groups, and so in the optimizer's checkpoints: a resumed run neither waits
    again nor starts early.

    Args:
        epoch: the first epoch with perturbation, counted as in the calls.
        step: the first step with perturbation, counted as in the calls.
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
        """Set gamma; call it before the first step and whenever a condition may have changed.

        Args:
            optimizer: an AWP whose weights are not perturbed.
            epoch: the current epoch.
            step: the current step.
            loss: a training or validation loss; None if there is none yet. NaN does not count.

        Returns:
            Whether the weights are perturbed from now on.

        Raises:
            TypeError: ``optimizer`` is not an AWP.
            ValueError: a condition needs an epoch or a step that is not given.
            RuntimeError: the weights are perturbed.
        """
        if not isinstance(optimizer, AWP):
            raise TypeError(f"StartWhen takes an AWP, got {type(optimizer).__name__}")
        if optimizer.is_perturbed:
            raise RuntimeError("StartWhen needs unperturbed weights: call it before first_step()")
        conditions = [
            _reached("epoch", self.epoch, epoch),
            _reached("step", self.step, step),
            self.loss_below is None or (loss is not None and loss < self.loss_below),
        ]
        for group in optimizer.param_groups:
            if _AWAITED not in group:
                group[_AWAITED], group["gamma"] = group["gamma"], 0.0
            if all(conditions) and group[_AWAITED] is not None:
                group["gamma"], group[_AWAITED] = group[_AWAITED], None
        return all(group[_AWAITED] is None for group in optimizer.param_groups)


def _reached(name: str, wanted: float | None, now: float | None) -> bool:
    if wanted is None:
        return True
    if now is None:
        raise ValueError(f"StartWhen waits for {name} {wanted}: pass {name}=")
    return now >= wanted
