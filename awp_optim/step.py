"""One step of adversarial training: attack the inputs, ascend the weights, descend.

Algorithm 2 of Wu, Xia & Wang (2020). With a plain torch optimizer in place of AWP it is plain
adversarial training, through the same lines. On a GPU the step is replayed as one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from awp_optim._core.backup import Snapshot
from awp_optim._core.settings import check_group
from awp_optim._cuda_graphs.capturable import (
    DeviceScalars,
    frozen_settings,
    is_zero,
    may_capture_update,
    structure,
)
from awp_optim._cuda_graphs.graphs import Graphs, as_key, module_key
from awp_optim.attacks import Attack
from awp_optim.attacks.gradient_ascent import GradientAscentAttack
from awp_optim.batchnorm import frozen_batch_norm
from awp_optim.objectives import AT, Objective
from awp_optim.optimizer import AWP

__all__ = ["AdversarialStep", "StepOutput"]

ASCENTS = ("exact", "attack", "momentum")
Outputs = tuple[Tensor, Tensor, Tensor]


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

    **What v costs.** Count a forward pass, a backward pass to the inputs and one to the weights as
    1 each; with PGD-10 plain adversarial training takes 23.

    - ``ascent="exact"``, the paper's: a pass of its own at the adversarial examples, in the model's
      training mode, of the objective: 26.
    - ``ascent="attack"``: v from the gradient in the attack's last iteration, one backward pass to
      the weights more: 24. It is of the attack's loss, in the attack's mode and at the input before
      the last step; in eval mode BatchNorm normalises otherwise than in the descent. With
      DistributedDataParallel it is of each process's own batch: every process has its own v.
    - ``ascent="momentum"``: v along the base optimizer's average of past gradients: 23. It knows
      nothing of this batch, and is zero in the first step. Measured, it was nearly orthogonal to
      the exact v and did little; see the README before you use it.
    - ``interval=k``: v is computed in every k-th step alone; in between its direction is kept, at
      the present weights' size: 23 + 3/k. It takes the memory of the perturbed parameters once
      more.

    **CUDA graphs.** From the third or fourth call of a kind on (shapes, modes, which weights) the
    step is replayed as one graph; the calls before are training steps like any other. Every replay
    draws fresh random numbers; learning rate, gamma and all other settings may change between
    calls. The update is part of the graph for ``torch.optim.SGD`` and for optimizers built with
    ``capturable=True``, as long as they have no hooks and no setting but learning rate and gamma
    changes; else it runs after the replay, which takes a few launches more. What a graph cannot
    know is what only the host does: hooks on modules, Python code in the model's forward, code
    wrapped around ``optimizer.step``: it runs when a step is captured, not when it is replayed.
    Every kind of call keeps the memory of its gradients, and its replays write to the same ones.

    **Several processes.** The model may be a ``DistributedDataParallel`` or sharded by
    ``fully_shard`` or into DTensors; each process passes its own batch. The ascents of ``"exact"``
    are along synchronised gradients; ``"attack"`` is not for ``fully_shard``. An attack on a
    ``DistributedDataParallel`` with ``static_graph=True`` goes past it to the module inside: in a
    loop of your own do so, too, for without gradients of the weights in its first pass it would
    never synchronise any. Such steps run without a CUDA graph.

    Args:
        model: maps inputs to logits.
        optimizer: an :class:`~awp_optim.AWP`; or any torch optimizer, to train without AWP.
        attack: ``attack(model, x, y) -> x_adv``, such as :class:`~awp_optim.attacks.PGD`.
        objective: the loss to minimise.
        alternations: A of Algorithm 2, how often inputs and weights are perturbed in turn before
            the update; each time the attack starts afresh, at the weights perturbed so far. Must
            divide the optimizer's ``ascent_steps`` (K2 * A). Without AWP it must be 1.
        ascent: where v comes from: "exact", "attack" or "momentum", see above. For the parameter
            groups whose direction is "gradient".
        interval: steps from one computation of v to the next, see above; >= 1.
        autocast: run the forward passes in this dtype, for example ``torch.bfloat16``; None leaves
            it to the surrounding code.
        cuda_graph: True, False, or "auto": on a CUDA device, unless the attack is a function of
            the caller's own, the model is distributed or has sparse gradients, and if capturing
            succeeds.
        clip_grad_norm: clip the norm of all gradients together to this before the update.

    Raises:
        TypeError: ``optimizer`` is no optimizer or ``attack`` cannot be called.
        ValueError: a setting is out of its range, or does not go with another.

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
        interval: int = 1,
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
        if ascent not in ASCENTS:
            raise ValueError(f"ascent must be one of {ASCENTS}, got {ascent!r}")
        if ascent == "attack" and not isinstance(attack, GradientAscentAttack):
            raise ValueError(
                "ascent='attack' needs an attack that takes gradients, such as PGD, got "
                f"{attack!r:.80}"
            )
        if ascent == "attack" and (
            getattr(attack, "eps", 1) == 0 or getattr(attack, "steps", 1) == 0
        ):
            raise ValueError(f"ascent='attack' needs gradients, and {attack} takes none")
        if ascent == "attack" and ascents != alternations:
            raise ValueError(
                f"ascent='attack' has one gradient for each attack: build the optimizer as "
                f"AWP(..., ascent_steps={alternations}), here it is {ascents}"
            )
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be an integer >= 1, got {interval!r}")
        if interval > 1 and ascent == "momentum":
            raise ValueError("interval saves nothing with ascent='momentum': leave it at 1")
        if autocast is not None and autocast not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"autocast must be torch.bfloat16 or None, got {autocast!r}; float16 needs a loss "
                "scale: write the loop with first_step() and GradScaler"
            )
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm must be positive or None, got {clip_grad_norm!r}")
        distributed = [type(m).__name__ for m in model.modules() if _is_distributed(m)]
        if cuda_graph is True and distributed:
            raise ValueError(
                f"cuda_graph=True does not go with {distributed[0]}: leave it at 'auto'"
            )
        gathering = [m for m in model.modules() if _gathers_weights(m)]
        if ascent == "attack" and gathering:
            raise ValueError(
                "ascent='attack' takes gradients of the parameters, and "
                f"{type(gathering[0]).__name__} computes "
                "with weights that it gathers for each pass: leave it at 'exact'"
            )
        self.model = model
        self.optimizer = optimizer
        self.attack = attack
        self.objective = objective
        self.alternations = alternations
        self.ascent = ascent
        self.interval = interval
        self.autocast = autocast
        self.clip_grad_norm = clip_grad_norm

        # A static graph is that of the first pass, and in an attack no weight gets a gradient:
        # DistributedDataParallel would never synchronise one again.
        self._attacked = model
        if isinstance(model, nn.parallel.DistributedDataParallel) and model.static_graph:
            self._attacked = model.get_submodule("module")
        self._gathering = gathering
        self._steps = 0
        self._kept: dict[Tensor, Tensor] = {}  # v when it was last computed, for interval > 1
        eager = (
            not isinstance(attack, Attack)
            or len(distributed) > 0
            or any(getattr(module, "sparse", False) for module in model.modules())
        )
        self._graphs = Graphs(
            False if cuda_graph == "auto" and eager else cuda_graph, "the training step"
        )
        self._settings: Hashable = None  # of the base optimizer, when last seen
        self._may_capture_update = True
        self._scalars = DeviceScalars()

    def __call__(self, x: Tensor, y: Tensor) -> StepOutput:
        """Train on one batch.

        Args:
            x: inputs in the attack's box, shape (N, ...).
            y: class indices, int64 of shape (N,); or probabilities of the classes, floating, shape
                (N, C), as mixup gives them, if attack and objective take them: the package's
                objectives do, and its attacks of the losses "ce" and "kl".

        Returns:
            Detached tensors; nothing is read back to the host. An exception on the way leaves the
            weights at the centre.

        Raises:
            RuntimeError: the weights are perturbed; or ``cuda_graph=True`` and the step cannot be
                captured, in which case nothing has changed.
        """
        optimizer = self.optimizer
        if isinstance(optimizer, AWP) and optimizer.is_perturbed:
            raise RuntimeError(
                "a step starts at the centre, but the weights are perturbed: call second_step() or "
                "restore() of the optimizer first"
            )
        again = self._steps % self.interval != 0 and len(self._kept) > 0
        try:
            if self._graphs.applies_to(x.device):
                outputs = self._graphed(x, y, again)
            else:
                outputs = self._passes(x, y, again)
                self._update()
        except BaseException:
            if isinstance(optimizer, AWP):
                optimizer.restore()
            raise
        self._steps += 1
        return StepOutput(*outputs)

    def state_dict(self) -> dict[str, Any]:
        """What the next call depends on, beside model and optimizer; of use if ``interval > 1``."""
        numbers = {p: i for i, p in enumerate(_parameters(self.optimizer))}
        return {"steps": self._steps, "kept": {numbers[p]: v for p, v in self._kept.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the step that gave ``state_dict`` would have.

        Raises:
            ValueError: it does not fit the optimizer's parameters; nothing is changed.
        """
        parameters = dict(enumerate(_parameters(self.optimizer)))
        kept = state_dict["kept"]
        if any(i not in parameters or v.shape != parameters[i].shape for i, v in kept.items()):
            raise ValueError(
                "the state is of a step with other parameters: build model and optimizer as they "
                "were when it was saved"
            )
        self._steps = state_dict["steps"]
        loaded = {}
        for i, v in kept.items():
            p = parameters[i]
            loaded[p] = self._kept.get(p, torch.empty_like(p.detach())).copy_(v)
        self._kept = loaded

    # ------------------------------------------------------------------ the step itself

    def _passes(self, x: Tensor, y: Tensor, again: bool) -> Outputs:
        """All but the update: leaves the weights at w + v, and the gradients of there."""
        awp = self.optimizer if isinstance(self.optimizer, AWP) else None
        if awp and not awp.directions:
            awp = None
        self.optimizer.zero_grad()  # memory that the attack can do without
        for _ in range(1 if again or not awp else self.alternations):
            x_adv, gradients = self._attack(x, y, with_gradients=awp is not None and not again)
            if awp:
                self._ascend(awp, x_adv, x, y, self._kept if again else gradients)
            del gradients  # they have the size of the weights
        if awp and self.interval > 1 and not again:
            # In place, for a graph goes on reading from where it lies.
            self._kept = awp.perturbation()
        loss, logits = self._descend(x_adv, x, y)
        return loss, logits, x_adv

    def _attack(
        self, x: Tensor, y: Tensor, with_gradients: bool
    ) -> tuple[Tensor, dict[Tensor, Tensor] | None]:
        """The adversarial examples and, if it is to come from there, what to ascend along."""
        with_gradients = with_gradients and self.ascent == "attack"
        weights = _ascended(self.optimizer) if with_gradients else []
        with self._autocast(x):
            if not weights:
                return self.attack(self._attacked, x, y), None
            assert isinstance(self.attack, GradientAscentAttack)  # __init__ saw to it
            x_adv, gradients = self.attack.with_weight_gradients(self._attacked, x, y, weights)
        pairs = zip(weights, gradients, strict=True)
        return x_adv, {p: g for p, g in pairs if g is not None}

    def _ascend(
        self, awp: AWP, x_adv: Tensor, x: Tensor, y: Tensor, along: dict[Tensor, Tensor] | None
    ) -> None:
        """The ascents after an attack; with a kept direction, all there are."""
        alternations = 1 if along is self._kept else self.alternations
        for _ in range(awp.ascent_steps // alternations):
            if along is None and "gradient" in awp.directions:
                with frozen_batch_norm(self.model):
                    self._backward(x_adv, x, y)
            awp.first_step(along=along)
            for module in self._gathering:  # a pass that nothing was derived from leaves them
                module.reshard()  # type: ignore[operator] # with the weights of before

    def _descend(self, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = self._backward(x_adv, x, y)
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(_parameters(self.optimizer), self.clip_grad_norm)
        return loss.detach(), logits.detach()

    def _update(self) -> None:
        self.optimizer.step()

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

    # ------------------------------------------------------------------ as a graph

    def _graphed(self, x: Tensor, y: Tensor, again: bool) -> Outputs:
        """The same, by replay. What the host did when it was captured is done again here."""
        optimizer = self.optimizer
        awp = optimizer if isinstance(optimizer, AWP) else None
        base = awp.base_optimizer if awp else optimizer
        if awp:
            for group in awp.param_groups:
                check_group(group)
        settings = frozen_settings(base)
        if self._settings not in (None, settings):
            self._may_capture_update = False  # else every change would take a new graph
        self._settings = settings
        inside = self._may_capture_update and may_capture_update(optimizer, base, x.device)
        self._scalars.update(optimizer, x.device)

        def function(x: Tensor, y: Tensor) -> Outputs:
            with self._scalars.installed(optimizer, base if inside else None):
                outputs = self._passes(x, y, again)
                if inside:
                    self._update()
            return outputs

        def keep() -> _Kept:
            return _Kept(
                [(p, p.grad) for p in _parameters(optimizer)],
                awp.backup.snapshot() if awp else None,
                dict(self._kept),
                (awp and dict(awp.backup.buffers), self.attack, self.objective),
            )

        def before_replay(kept: _Kept) -> None:
            for p, grad in kept.gradients:
                p.grad = grad
            self._kept = dict(kept.kept)
            if awp and kept.awp:
                awp.backup.reinstate(kept.awp)

        def discard() -> None:
            optimizer.zero_grad()
            if awp:
                awp.backup.forget()

        kept_at = tuple((id(p), v.data_ptr()) for p, v in self._kept.items())
        key = (again and kept_at, settings if inside else None, self._key())
        loss, logits, x_adv = self._graphs(
            function,
            (x.detach(), y.detach()),
            key,
            keep=keep,
            before_replay=before_replay,
            discard=discard,
        )
        torch.clear_autocast_cache()  # the weights are others now
        if not inside:
            self._update()
        return loss, logits, x_adv

    def _key(self) -> Hashable:
        """What decides which kernels run on which memory."""
        optimizer = self.optimizer
        state = [t for of_p in optimizer.state.values() for t in of_p.values()]
        return (
            module_key(self.model),
            tuple(as_key(p) for p in _parameters(optimizer)),
            tuple(as_key(t) for t in state if isinstance(t, Tensor)),
            tuple(structure(group) for group in optimizer.param_groups),
            (id(self.attack), id(self.objective), _settings_of(self.objective)),
            (self.ascent, self.alternations, self.autocast, self.clip_grad_norm),
        )


class _Kept(NamedTuple):
    """What the host knew after a capture, and what must live as long as the graph."""

    gradients: list[tuple[Tensor, Tensor | None]]
    awp: Snapshot | None
    kept: dict[Tensor, Tensor]
    memory: Any


_DISTRIBUTED = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def _gathers_weights(module: nn.Module) -> bool:
    """Whether fully_shard was here, told without importing it."""
    return hasattr(module, "unshard") and hasattr(module, "reshard")


def _is_distributed(module: nn.Module) -> bool:
    return (
        isinstance(module, _DISTRIBUTED)
        or _gathers_weights(module)
        or any(hasattr(p, "full_tensor") for p in module.parameters(recurse=False))
    )


def _settings_of(objective: Any) -> Hashable:
    return tuple(
        (name, as_key(value)) for name, value in getattr(objective, "__dict__", {}).items()
    )


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _ascended(optimizer: Optimizer) -> list[Tensor]:
    """The parameters that an ascent along gradients moves."""
    if not isinstance(optimizer, AWP):
        return []
    return [
        p
        for group in optimizer.param_groups
        if group["direction"] == "gradient" and not is_zero(group["gamma"])
        for p in group["params"]
        if p.requires_grad and p.ndim >= group["min_ndim"]
    ]
