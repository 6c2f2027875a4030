"""One step of adversarial training: attack the inputs, ascend the weights, descend.

Algorithm 2 of Wu, Xia & Wang (2020). With a plain torch optimizer in place of AWP it is plain
adversarial training, through the same lines.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from awp_optim.batchnorm import frozen_batch_norm
from awp_optim.objectives import AT, Objective
from awp_optim.optimizer import AWP

__all__ = ["AdversarialStep", "StepOutput"]


class StepOutput(NamedTuple):
    """What a step computed on its way, as detached tensors on the model's device."""

    loss: Tensor
    """The objective at the weights that gave the update (w + v with AWP), a scalar."""
    logits: Tensor
    """The logits at the adversarial examples there, shape (N, C)."""
    x_adv: Tensor
    """The adversarial examples, shaped like the inputs."""


class AdversarialStep:
    """Attack, weight ascent and update in one call: ``out = step(x, y)``.

    The model trains in the mode it is in; the attack runs in the mode that the attack names. In the
    ascent passes BatchNorm normalises by the batch but its running statistics stand still: only the
    pass at w + v updates them.

    Args:
        model: maps inputs to logits.
        optimizer: an :class:`~awp_optim.AWP`; or any torch optimizer, to train without AWP.
        attack: ``attack(model, x, y) -> x_adv``, such as :class:`~awp_optim.attacks.PGD`.
        objective: the loss to minimise.
        alternations: A of Algorithm 2, how often inputs and weights are perturbed in turn before
            the update; each time the attack starts afresh, at the weights perturbed so far. Must
            divide the optimizer's ``ascent_steps`` (K2 * A). Without AWP it must be 1.
        ascent: "exact", the paper's: a forward and backward pass at the final adversarial examples
            for every ascent.
        autocast: run the forward passes in this dtype, for example ``torch.bfloat16``; None leaves
            it to the surrounding code.
        cuda_graph: False or "auto"; both run the step eagerly.
        clip_grad_norm: clip the norm of all gradients together to this before the update.

    Raises:
        TypeError: ``optimizer`` is no optimizer or ``attack`` cannot be called.
        ValueError: a setting is out of its range.

    Example:
        >>> from awp_optim import AWP
        >>> from awp_optim.attacks import PGD
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> opt = AWP(model.parameters(), torch.optim.SGD, gamma=5e-3, lr=0.1)
        >>> step = AdversarialStep(model, opt, PGD(eps=8 / 255))
        >>> out = step(torch.rand(8, 1, 4, 4), torch.randint(3, (8,)))
        >>> out.x_adv.shape
        torch.Size([8, 1, 4, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
        objective: Objective = AT(),  # noqa: B008 -- a value that cannot change
        *,
        alternations: int = 1,
        ascent: str = "exact",
        autocast: torch.dtype | None = None,
        cuda_graph: bool | str = "auto",
        clip_grad_norm: float | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be an AWP or a torch optimizer, got {optimizer!r:.80}")
        if not callable(attack):
            raise TypeError(
                f"attack must be callable as attack(model, x, y), such as PGD(), got {attack!r:.80}"
            )
        if not isinstance(alternations, int) or alternations < 1:
            raise ValueError(f"alternations must be an integer >= 1, got {alternations!r}")
        ascents = optimizer.ascent_steps if isinstance(optimizer, AWP) else 1
        if ascents % alternations:
            raise ValueError(
                f"alternations={alternations} must divide the number of ascents: build the "
                f"optimizer as AWP(..., ascent_steps=K2 * {alternations}), here it is {ascents}"
            )
        if ascent != "exact":
            raise ValueError(f"ascent must be 'exact', got {ascent!r}")
        if cuda_graph not in (False, "auto"):
            raise ValueError(f"cuda_graph must be False or 'auto', got {cuda_graph!r}")
        if autocast is not None and autocast not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"autocast must be torch.bfloat16 or None, got {autocast!r}; float16 needs a loss "
                "scale: write the loop with first_step() and GradScaler"
            )
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm must be positive or None, got {clip_grad_norm!r}")
        self.model = model
        self.optimizer = optimizer
        self.attack = attack
        self.objective = objective
        self.alternations = alternations
        self.autocast = autocast
        self.clip_grad_norm = clip_grad_norm

    def __call__(self, x: Tensor, y: Tensor) -> StepOutput:
        """Train on one batch.

        Args:
            x: inputs in the attack's box, shape (N, ...).
            y: class indices, shape (N,).

        Returns:
            Detached tensors; nothing is read back to the host. An exception on the way leaves the
            weights at the centre.
        """
        optimizer = self.optimizer
        if isinstance(optimizer, AWP) and optimizer.is_perturbed:
            raise RuntimeError(
                "a step starts at the centre, but the weights are perturbed: call second_step() or "
                "restore() of the optimizer first"
            )
        awp = optimizer if isinstance(optimizer, AWP) and optimizer.directions else None
        try:
            if awp is None:
                x_adv = self._attack(x, y)
            else:
                for _ in range(self.alternations):
                    x_adv = self._attack(x, y)
                    for _ in range(awp.ascent_steps // self.alternations):
                        self._ascend(awp, x_adv, x, y)
            loss, logits = self._backward(x_adv, x, y)
            if self.clip_grad_norm is not None:
                params = [p for group in optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(params, self.clip_grad_norm)
            optimizer.step()
        except BaseException:
            if awp:
                awp.restore()
            raise
        return StepOutput(loss.detach(), logits.detach(), x_adv)

    def _attack(self, x: Tensor, y: Tensor) -> Tensor:
        with self._autocast(x):
            return self.attack(self.model, x, y)

    def _ascend(self, awp: AWP, x_adv: Tensor, x: Tensor, y: Tensor) -> None:
        if "gradient" in awp.directions:
            with frozen_batch_norm(self.model):
                self._backward(x_adv, x, y)
        awp.first_step()

    def _backward(self, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh gradients of the objective at the weights as they are."""
        self.optimizer.zero_grad()
        with self._autocast(x):
            logits_adv = self.model(x_adv)
            logits_nat = self.model(x) if self.objective.needs_natural else None
            loss = self.objective(logits_adv, logits_nat, y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss, logits_adv

    def _autocast(self, x: Tensor) -> AbstractContextManager[None]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(x.device.type, self.autocast)
