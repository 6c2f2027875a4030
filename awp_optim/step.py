"""One step of adversarial training: perturb the inputs, perturb the weights, update.

Algorithm 2 of Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust Generalization"
(NeurIPS 2020). With a plain torch optimizer in place of AWP it is plain adversarial training. On a
GPU a step may be replayed as one CUDA graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from awp_optim._core.layers import perturbed_parameters
from awp_optim._cuda_graphs.keys import object_key, parameters
from awp_optim._cuda_graphs.step import CapturedStep
from awp_optim._utils.checks import check_choice, check_int, check_positive, describe
from awp_optim._utils.model_state import modes_restored
from awp_optim.attacks import Attack, Captured
from awp_optim.attacks.gradient_ascent import GradientAscentAttack
from awp_optim.attacks.losses import ce, compares_with_clean
from awp_optim.batchnorm import frozen_batch_norm
from awp_optim.objectives import AT, Objective
from awp_optim.optimizer import AWP

__all__ = ["AdversarialStep", "StepOutput"]

ASCENTS = ("exact", "attack")
Outputs = tuple[Tensor, ...]


class StepOutput(NamedTuple):
    """What a step computed, as detached tensors on the model's device."""

    loss: Tensor
    """The objective at the weights whose gradients gave the update (w + v with AWP), a scalar."""
    logits: Tensor
    """The logits at the adversarial examples and at the same weights, shape (N, C)."""
    x_adv: Tensor
    """The adversarial examples, shaped like the inputs."""


class AdversarialStep:
    """Attack, weight ascent and update in one call: ``out = step(x, y)``.

    The model trains in its current mode; the attack runs in its own ``model_mode``. In the ascent,
    BatchNorm normalizes by the batch but does not update its running statistics: only the pass at
    w + v does.

    **What v costs.** Count a forward pass, a backward pass to the inputs and one to the weights as
    1 each: plain adversarial training with PGD-10 takes 10 * 2 + 3 = 23.

    - ``ascent="exact"``, the paper's: v from the gradient of the objective at the adversarial
      examples, in the model's current mode, by separate forward and backward passes: 26.
    - ``ascent="attack"``: v from the attack's last gradient, by one backward pass to the weights:
      24. This is the gradient of the attack's loss, in the attack's mode, at the input before the
      last step. With DistributedDataParallel, each process has a v from its own batch.

    **CUDA graphs.** The third call with the same shapes, modes and weights is captured as a graph,
    which later calls replay; or the fourth, if the first creates the optimizer's state. Replays
    draw new random numbers, and the optimizer's settings may change between calls. The update of
    ``torch.optim.SGD`` and of optimizers with ``capturable=True`` is part of the graph as long as
    they have no hooks and only learning rate and gamma change; otherwise it runs after the replay.
    A replay does not run Python: hooks on modules, Python code in the model's forward and code
    wrapped around ``optimizer.step`` run only during capture. Each graph holds the memory of its
    gradients.

    **Several processes.** The model may be a ``DistributedDataParallel``, or sharded by
    ``fully_shard`` or into DTensors; each process passes its own batch. "exact" ascends along
    synchronized gradients; "attack" does not work with ``fully_shard``. Distributed models always
    run eagerly.

    Args:
        model: maps inputs to logits.
        optimizer: an :class:`~awp_optim.AWP`; or any torch optimizer, to train without AWP.
        attack: ``attack(model, x, y) -> x_adv``, such as :class:`~awp_optim.attacks.PGD`.
        objective: the loss to minimize.
        alternations: A of Algorithm 2, how often inputs and weights are perturbed in turn before
            the update; each attack starts over, at the currently perturbed weights. Must divide the
            optimizer's ``ascent_steps`` (K2 * A). Without AWP it must be 1.
        ascent: where v comes from in the parameter groups whose direction is "gradient": "exact" or
            "attack", see above.
        ascent_below: v comes from the examples alone whose cross-entropy at x' is below this, above
            0, at each ascent: the loss stationary condition of Yu et al., "Robust weight
            perturbation for adversarial training" (IJCAI 2022, https://arxiv.org/abs/2205.14826),
            who use 1.7 for CIFAR-10 and 4.0 for CIFAR-100. If there are none, v does not change.
            Needs "exact". None: from all examples.
        autocast: ``torch.bfloat16`` to run the forward passes in it; None leaves the surrounding
            autocast in effect.
        cuda_graph: True, False, or "auto": on a CUDA device, unless the attack is not from this
            package, the model is distributed or has sparse gradients, or the capture fails.
        clip_grad_norm: clip the total norm of the gradients to this value before the update.

    Attributes:
        logits_nat: the logits of the last step at the inputs themselves and at the weights of
            ``out.logits``, detached, shape (N, C); None if the objective does not use them.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or ``attack`` or ``objective`` not callable.
        ValueError: a setting is out of range or incompatible with another.

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
        objective: Objective = AT(),  # noqa: B008 -- immutable
        *,
        alternations: int = 1,
        ascent: str = "exact",
        ascent_below: float | None = None,
        autocast: torch.dtype | None = None,
        cuda_graph: bool | str = "auto",
        clip_grad_norm: float | None = None,
    ) -> None:
        # The step is captured including its attack: graphs cannot be nested.
        attack = attack.attack if isinstance(attack, Captured) else attack
        _check_parts(optimizer, attack, objective)
        self.model = model
        self.optimizer = optimizer
        self._awp = optimizer if isinstance(optimizer, AWP) else None
        self.attack = attack
        self.objective = objective
        self.alternations = check_int("alternations", alternations, least=1)
        self.ascent = ascent
        self.ascent_below = ascent_below
        self.autocast = autocast
        self.clip_grad_norm = clip_grad_norm
        self.logits_nat: Tensor | None = None
        _check_settings(self)

        self._sharded = _sharded_modules(model)
        self._attacked = model
        if isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph:
            # Its first pass decides which gradients it synchronizes; an attack's pass has none.
            self._attacked = model.get_submodule("module")
        if cuda_graph == "auto" and not isinstance(self.attack, Attack):
            cuda_graph = False  # an arbitrary function may not be capturable
        self._captured = CapturedStep(model, optimizer, cuda_graph)

    def __call__(self, x: Tensor, y: Tensor) -> StepOutput:
        """Train on one batch.

        Args:
            x: inputs in the attack's box, shape (N, ...).
            y: class indices, int64 of shape (N,); or class probabilities, floating-point, shape
                (N, C), as from mixup, if attack and objective accept them: the package's objectives
                do, and so do its attacks with the losses "ce", "kl" and "score".

        Returns:
            Detached tensors; nothing is read back to the host. After an exception the weights are
            not perturbed.

        Raises:
            RuntimeError: the weights are already perturbed, and stay so; or ``cuda_graph=True`` and
                the step cannot be captured: the weights are unchanged, the gradients None.
            ValueError: ``cuda_graph=True`` on a device without CUDA graphs.
        """
        if self._awp and self._awp.is_perturbed:
            raise RuntimeError(
                "the weights are already perturbed: call the optimizer's second_step() or "
                "restore() first"
            )
        x, y = x.detach(), y.detach()
        try:
            if self._captured.applies_to(x.device):
                passes = self._perturb_and_backpropagate
                outputs = self._captured(passes, x, y, self._settings_key())  # and the update
            else:
                outputs = self._perturb_and_backpropagate(x, y)
                self.optimizer.step()
        except BaseException:
            if self._awp:
                self._awp.restore()
                self._reshard()
            raise
        loss, logits, x_adv, *rest = outputs
        self.logits_nat = rest[0] if rest else None
        return StepOutput(loss, logits, x_adv)

    def _perturb_and_backpropagate(self, x: Tensor, y: Tensor) -> Outputs:
        """Algorithm 2 up to the update: leaves the weights at w + v, with the gradients there."""
        awp = self._awp if self._awp and self._awp.directions else None  # None: gamma is 0
        self.optimizer.zero_grad()  # frees memory for the attack
        for _ in range(self.alternations if awp else 1):  # line 4
            x_adv, along = self._perturb_inputs(x, y, awp)  # lines 5 to 10
            if awp:
                for _ in range(awp.ascent_steps // self.alternations):  # line 11
                    self._perturb_weights(awp, along, x_adv, x, y)  # line 12
            del along  # as large as the weights
        loss, logits, logits_nat = self._backpropagate(x_adv, x, y)  # the gradients of line 15
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters(self.optimizer), self.clip_grad_norm)
        outputs = loss.detach(), logits.detach(), x_adv
        return outputs if logits_nat is None else (*outputs, logits_nat.detach())

    def _perturb_inputs(
        self, x: Tensor, y: Tensor, awp: AWP | None
    ) -> tuple[Tensor, dict[Tensor, Tensor] | None]:
        """The adversarial examples; with ``ascent="attack"`` also what to ascend along."""
        weights = _ascending_weights(awp) if awp and self.ascent == "attack" else []
        with self._autocast_context(x), modes_restored(self._attacked):  # other people's attacks
            if not weights:
                return self.attack(self._attacked, x, y), None
            assert isinstance(self.attack, GradientAscentAttack)  # _check_settings
            x_adv, gradients = self.attack.with_weight_gradients(self._attacked, x, y, weights)
        pairs = zip(weights, gradients, strict=True)
        return x_adv, {p: g for p, g in pairs if g is not None}

    def _perturb_weights(
        self, awp: AWP, along: dict[Tensor, Tensor] | None, x_adv: Tensor, x: Tensor, y: Tensor
    ) -> None:
        """One ascent, along ``along`` if the attack gave it, else the objective's gradient."""
        if along is None and "gradient" in awp.directions:
            with frozen_batch_norm(self.model):
                self._backpropagate(x_adv, x, y, self.ascent_below)
        awp.first_step(along=along)
        self._reshard()

    def _backpropagate(
        self, x_adv: Tensor, x: Tensor, y: Tensor, below: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The objective and the logits, with fresh gradients in ``p.grad``.

        Gradients flow only into examples whose cross-entropy is below ``below``, unless it is None.
        """
        self.optimizer.zero_grad()
        with self._autocast_context(x):
            logits_adv = self.model(x_adv)
            logits_nat = self.model(x) if self.objective.needs_natural else None
            if below is not None:
                counts = (ce(logits_adv.detach(), y) < below).unsqueeze(1)
                logits_adv = logits_adv.where(counts, logits_adv.detach())
                if logits_nat is not None:
                    logits_nat = logits_nat.where(counts, logits_nat.detach())
            loss = self.objective(logits_adv, logits_nat, y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss, logits_adv, logits_nat

    def _reshard(self) -> None:
        """With ``fully_shard``, make the next pass gather the current weights."""
        for module in self._sharded:
            module.reshard()  # type: ignore[operator]

    def _autocast_context(self, x: Tensor) -> AbstractContextManager[None]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(x.device.type, self.autocast)

    def _settings_key(self) -> Hashable:
        """The settings that are fixed in a captured graph."""
        ascent = (self.alternations, self.ascent, self.ascent_below)
        settings = (*ascent, self.autocast, self.clip_grad_norm)
        awp = (self._awp.ascent_steps, self._awp.foreach) if self._awp else None
        return object_key(self.attack), object_key(self.objective), settings, awp


def _ascending_weights(awp: AWP) -> list[Tensor]:
    """The parameters that are perturbed along gradients."""
    groups = [group for group in awp.param_groups if group["direction"] == "gradient"]
    return [p for group in groups for p in perturbed_parameters(group) if p.requires_grad]


def _sharded_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that ``fully_shard`` was applied to; they gather weights for each pass."""
    return [m for m in model.modules() if hasattr(m, "reshard")]


def _check_parts(optimizer: object, attack: object, objective: object) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be an AWP or a torch optimizer, got {describe(optimizer)}")
    if isinstance(attack, type) or not callable(attack):
        raise TypeError(
            "attack must be callable as attack(model, x, y): write attack=PGD() or pass a "
            f"function, got {describe(attack)}"
        )
    is_objective = callable(objective) and hasattr(objective, "needs_natural")
    if isinstance(objective, type) or not is_objective:
        raise TypeError(
            "objective must be one of awp_optim.objectives or a callable with needs_natural: write "
            f"objective=TRADES(), got {describe(objective)}"
        )
    loss, expected = getattr(attack, "loss", None), getattr(objective, "attack_loss", None)
    if isinstance(loss, str) and isinstance(expected, str) and not _may_replace(loss, expected):
        message = f"the attack maximizes {loss!r}, but {objective} expects loss={expected!r}"
        warnings.warn(message, stacklevel=3)


def _may_replace(loss: str, expected: str) -> bool:
    """Whether an attack may maximize one loss instead of another: losses of the label may."""
    return loss == expected or not (compares_with_clean(loss) or compares_with_clean(expected))


def _check_settings(step: AdversarialStep) -> None:
    check_choice("ascent", step.ascent, ASCENTS)
    ascents = step.optimizer.ascent_steps if isinstance(step.optimizer, AWP) else 1
    if ascents % step.alternations:
        raise ValueError(
            f"alternations={step.alternations} must divide ascent_steps, which is {ascents}: build "
            f"the optimizer as AWP(..., ascent_steps=K2 * {step.alternations})"
        )
    if step.autocast not in (None, torch.bfloat16):
        raise ValueError(
            f"autocast must be torch.bfloat16 or None, got {step.autocast!r}; float16 needs a loss "
            "scale: write the loop with first_step() and GradScaler"
        )
    if step.clip_grad_norm is not None:
        check_positive("clip_grad_norm", step.clip_grad_norm)
    if step.ascent_below is not None:
        check_positive("ascent_below", step.ascent_below)
        if step.ascent == "attack":
            raise ValueError("ascent_below needs ascent='exact': the attack's gradient is of all")
    if step.ascent == "attack":
        _check_ascent_from_attack(step, ascents)


def _check_ascent_from_attack(step: AdversarialStep, ascents: int) -> None:
    attack = step.attack
    takes_gradients = isinstance(attack, GradientAscentAttack) and attack.gradient_passes > 0
    if not takes_gradients or getattr(attack, "eps", 0) == 0:
        raise ValueError(
            "ascent='attack' needs FGSM, N-FGSM, PGD or CW with a positive eps and at least one "
            f"step, got {attack!r:.80}"
        )
    if ascents != step.alternations:
        raise ValueError(
            "ascent='attack' has one gradient for each attack, but ascent_steps is "
            f"{ascents}: build the optimizer as AWP(..., ascent_steps={step.alternations})"
        )
    if sharded := _sharded_modules(step.model):
        raise ValueError(
            f"ascent='attack' differentiates by the parameters, but {type(sharded[0]).__name__} "
            "computes with weights that it gathers for each pass: use ascent='exact'"
        )
