"""AWP: adversarial weight perturbation around any torch optimizer.

Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020.

``first_step`` moves the weights from w to w + v, where the loss is higher; ``second_step`` restores
w and lets the base optimizer step with the gradients taken at w + v::

    not perturbed --first_step--> perturbed --first_step---> perturbed (ascent_steps > 1)
                                  perturbed --second_step--> not perturbed, updated
                                  perturbed --restore------> not perturbed
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from awp_optim._core import grad_scaler
from awp_optim._core.backup import WeightBackup
from awp_optim._core.checkpointing import is_state_initialization
from awp_optim._core.closures import GradientsNotZeroedError, refuse_accumulation
from awp_optim._core.dtensors import RandomGenerators, difference
from awp_optim._core.layers import Layers, collect_layers
from awp_optim._core.perturbation import ascend_, layer_norms
from awp_optim._core.settings import (
    GROUP_SETTINGS,
    check_along,
    check_group,
    copy_groups,
    is_active,
    shared_state,
    takes_argument,
)

__all__ = ["AWP"]

# torch.compile does not track what a method assigns to an optimizer's attributes. torch.optim uses
# this decorator on its own methods. The public torch.compiler.disable imports the compiler right
# away, which takes seconds; this one waits until a method is first called.
_not_compiled = torch._disable_dynamo  # type: ignore[attr-defined] # noqa: SLF001


def _restores_on_error(step: Callable[..., Any]) -> Callable[..., Any]:
    """Add torch's optimizer hooks to ``step``, and restore w if it or a hook raises."""
    hooked: Callable[..., Any] = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def guarded(self: AWP, *args: Any, **kwargs: Any) -> Any:
        try:
            return hooked(self, *args, **kwargs)
        except BaseException:
            grad_scaler.clear(self)
            self.restore()
            raise

    guarded.hooked = True  # type: ignore[attr-defined] # so that torch does not add the hooks again
    return guarded


class AWP(Optimizer):
    """A base optimizer that steps with the gradients at adversarially perturbed weights.

    For every parameter tensor l, one ascent is Eq. (10) and (15) of the paper:
    ``v_l <- P(v_l + gamma/ascent_steps * |w_l| * g_l/|g_l|)``, where P scales v_l back onto
    ``|v_l| <= gamma |w_l|``. v_l starts at 0. An ascent does not change it if the tensor has
    fewer than ``min_ndim`` dimensions, no gradient, a zero or non-finite gradient, or zero weight.

    The base optimizer's update is computed at w from the gradients at w + v, so its weight decay
    acts on w. A script that adds v to the weights, steps and subtracts v decays w + v instead.
    Without weight decay the two agree exactly; with it, a step of SGD differs by
    ``lr * weight_decay * v``.

    **Accumulation.** v follows the gradients in ``p.grad``. Accumulate all micro-batches before
    each of the two steps; or only one before ``first_step(zero_grad=True)``, and all of them before
    ``second_step``.

    **Loss scales.** With ``GradScaler``, ``scaler.step(opt)`` takes the place of ``second_step()``;
    call ``scaler.unscale_(opt)`` only after the last backward pass. A tensor whose gradient
    overflows in the ascent keeps its v; an overflow at w + v skips the update and restores w.

    **Several processes.** With ``DistributedDataParallel`` all processes compute the same v, or
    each a v from its own batch if the first pass runs under ``model.no_sync()``; random directions
    differ between processes. The weights stay equal: w is restored bit for bit, and the update uses
    averaged gradients. Parameters may be DTensors (``fully_shard``, tensor parallelism): norms are
    taken over full tensors, with one small all-reduce per ascent.

    Args:
        params: parameters, named parameters or parameter groups, as for any torch optimizer. A
            group may have its own ``gamma``, ``norm``, ``direction`` and ``min_ndim``.
        base_optimizer: a class, or a callable ``(param_groups, **base_kwargs) -> Optimizer``. To
            wrap an existing optimizer, see :meth:`wrap`.
        gamma: size of the perturbation relative to each tensor's weight norm, >= 0, a number or a
            0-d tensor. The paper uses 5e-3 to 1e-2. With 0, AWP only runs the base optimizer.
        ascent_steps: calls of :meth:`first_step` before the second, K2 * A in the paper, >= 1.
        norm: "l2" (Frobenius) or "l1", the norm of weights, gradients and perturbations.
        direction: "gradient", or "random" for the paper's RWP baseline, which needs no gradient.
        min_ndim: tensors with fewer dimensions are not perturbed; 2 excludes biases and norms.
        foreach: True for the ``torch._foreach_*`` implementation, False for the per-tensor loop,
            None for foreach except with tensor subclasses. True and False are also passed to
            ``base_optimizer`` if it has a parameter of that name.
        **base_kwargs: passed to ``base_optimizer``.

    Raises:
        TypeError: ``base_optimizer`` does not return an optimizer, or returns one that requires a
            closure (LBFGS); ``gamma`` is neither a number nor a tensor.
        ValueError: a setting is out of range, or the base optimizer has a setting of the same name.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> opt = AWP(model.parameters(), torch.optim.SGD, gamma=5e-3, lr=0.1, momentum=0.9)
        >>> x, y = torch.randn(8, 2), torch.randint(2, (8,))
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> opt.first_step(zero_grad=True)
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> opt.second_step(zero_grad=True)
    """

    # Makes GradScaler call step() even after an overflow, so that the weights are restored.
    _step_supports_amp_scaling = True

    base_optimizer: Optimizer
    ascent_steps: int
    foreach: bool | None
    backup: WeightBackup
    """Holds w; shared with Lightning's wrapper, which copies all attributes."""

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        gamma: float | Tensor = 5e-3,
        *,
        ascent_steps: int = 1,
        norm: str = "l2",
        direction: str = "gradient",
        min_ndim: int = 2,
        foreach: bool | None = None,
        **base_kwargs: Any,
    ) -> None:
        if not callable(base_optimizer):
            raise TypeError(
                "base_optimizer must be a class such as torch.optim.SGD or a callable that builds "
                f"an optimizer, got {base_optimizer!r:.80}; to wrap an existing optimizer, use "
                "AWP.wrap(optimizer, gamma=...)"
            )
        if foreach is not None and takes_argument(base_optimizer, "foreach"):
            base_kwargs["foreach"] = foreach
        base = base_optimizer(copy_groups(params), **base_kwargs)
        settings = {"gamma": gamma, "norm": norm, "direction": direction, "min_ndim": min_ndim}
        # Instead of super().__init__(), which would create separate groups and state.
        state = shared_state(base, settings, ascent_steps=ascent_steps, foreach=foreach)
        self.__setstate__(state)

    @classmethod
    def wrap(
        cls,
        optimizer: Optimizer,
        gamma: float | Tensor = 5e-3,
        *,
        ascent_steps: int = 1,
        norm: str = "l2",
        direction: str = "gradient",
        min_ndim: int = 2,
        foreach: bool | None = None,
    ) -> AWP:
        """AWP around an existing optimizer, which keeps its state and its groups.

        Args:
            optimizer: any torch optimizer; from now on, step the returned AWP instead.
            gamma: as in the constructor; a group's own setting takes precedence.
            ascent_steps: as in the constructor.
            norm: as in the constructor.
            direction: as in the constructor.
            min_ndim: as in the constructor.
            foreach: as in the constructor, but not passed on to the optimizer.

        Example:
            >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
            >>> AWP.wrap(sgd, gamma=1e-2).base_optimizer is sgd
            True
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"AWP.wrap takes an existing optimizer, got {optimizer!r:.80}; with a class use "
                "AWP(params, base_optimizer, ...)"
            )
        awp = cls.__new__(cls)
        settings = {"gamma": gamma, "norm": norm, "direction": direction, "min_ndim": min_ndim}
        awp.__setstate__(
            shared_state(optimizer, settings, ascent_steps=ascent_steps, foreach=foreach)
        )
        return awp

    # --- the two steps ---

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are w + v instead of w."""
        return self.backup.is_perturbed

    @property
    def directions(self) -> frozenset[str]:
        """The directions of the groups that are perturbed, which are those with gamma > 0."""
        return frozenset(group["direction"] for group in self.param_groups if is_active(group))

    @_not_compiled
    @torch.no_grad()
    def first_step(
        self, zero_grad: bool = False, *, along: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        """One ascent of the weights, from w + v along the gradients in ``p.grad``.

        Call it ``ascent_steps`` times, each after a fresh backward pass; further calls stay inside
        the ball. Gradients multiplied by a loss scale need no unscaling: the scale cancels.

        Args:
            zero_grad: set the gradients to None afterwards.
            along: a tensor for each parameter, of the same shape, to ascend along instead of its
                gradient; parameters without one keep their v. Used in groups whose direction is
                "gradient", and never negated, even if the optimizer maximizes.

        Raises:
            TypeError, ValueError: a group's settings are not valid, or a tensor in ``along`` and
                its parameter differ in shape or only one is a DTensor. Nothing changes.
            RuntimeError: another AWP has perturbed the same parameters. After this and any other
                error, the weights are not perturbed.
        """
        for group in self.param_groups:
            check_group(group)
        check_along(along or {})
        is_first = not self.is_perturbed
        with self.backup.restored_on_error():
            self.backup.is_perturbed = True
            batches = collect_layers(self.param_groups, along, foreach=self.foreach)
            for layers in batches:  # save all before any weight moves: tensors may share memory
                self.backup.save(layers.params, layers.parts, foreach=layers.foreach)
            for layers in batches:
                for directed in layers.with_directions(self._generators):
                    self._ascend(directed, is_first)
            torch.clear_autocast_cache()  # it may hold low-precision copies of the previous weights
            if zero_grad:
                self.zero_grad()

    def _ascend(self, layers: Layers, is_first: bool) -> None:
        """Eq. (10) and (15) for tensors that share a group, a device and a dtype."""
        norm, foreach = layers.group["norm"], layers.foreach
        weights = [self.backup.weights[p] for p in layers.params]
        norms = [layer_norms(t, norm, foreach=foreach) for t in (weights, layers.directions)]
        weight_norms, direction_norms = layers.reduce_norms(*norms)
        ascend_(
            layers.parts,
            layers.directions,
            weights,
            weight_norms,
            direction_norms,
            gamma=layers.group["gamma"],
            steps=self.ascent_steps,
            norm=norm,
            is_first=is_first,
            foreach=foreach,
            reduce_norms=lambda norms: layers.reduce_norms(norms)[0],
        )

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights bit for bit, then take the base optimizer's step.

        Args:
            zero_grad: set the gradients to None afterwards.

        Raises:
            RuntimeError: the weights are not perturbed: :meth:`first_step` was not called.
        """
        if not self.is_perturbed:
            raise RuntimeError(
                "the weights are not perturbed: call first_step() before second_step()"
            )
        self.step()  # the attribute, which learning-rate schedulers replace
        if zero_grad:
            self.zero_grad()

    @_not_compiled
    def restore(self) -> None:
        """Restore the weights bit for bit, without an update; do nothing if they are unperturbed.

        Raises:
            RuntimeError: a parameter changed shape while it was perturbed; all others are restored.
        """
        self.backup.restore()

    @contextmanager
    def perturbed(self, zero_grad: bool = False) -> Iterator[None]:
        """Context manager: inside, the weights are w + v; leaving restores w, also on exceptions.

        Takes the :meth:`first_step` on entry unless the weights are already perturbed. After a
        :meth:`second_step` inside, there is nothing left to restore. If nested, only the outermost
        one restores.

        Args:
            zero_grad: set the gradients to None once the weights are perturbed.
        """
        if not self.is_perturbed:
            self.first_step()
        with self.backup.restored_on_exit():
            if zero_grad:  # not in first_step(), which may have been called earlier
                self.zero_grad()
            yield

    def perturbation(self) -> dict[Tensor, Tensor]:
        """v of each parameter that is currently perturbed; empty if none is.

        For half-precision weights, v includes the rounding of w + v.
        """
        with torch.inference_mode(False), torch.no_grad():  # usable outside inference mode
            return {p: difference(p, w) for p, w in self.backup.weights.items()}

    @_restores_on_error
    @_not_compiled(recursive=False)  # a closure may be compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The second step or, with a closure, both steps.

        Args:
            closure: zeroes the gradients, computes the loss, backpropagates and returns the loss.
                It is called before each of ``ascent_steps`` ascents and once at the perturbed
                weights; only once if no group's direction is "gradient", or if the weights are
                already perturbed.

        Returns:
            The closure's first loss, or None without a closure.

        Raises:
            RuntimeError: there is no closure and the weights are not perturbed (unless gamma is 0
                everywhere), so this would be a plain step; or the closure does not zero the
                gradients, or was passed through ``GradScaler.step``. After any error, including one
                in the closure or a hook, the weights are not perturbed.
        """
        if closure is not None:
            loss = self._run(closure)
        elif self.is_perturbed or not self.directions or is_state_initialization(self):
            loss = None  # the last: torch.distributed.checkpoint creates the state
        else:
            raise RuntimeError(
                "step() without a closure would be a plain step, because the weights are not "
                "perturbed: call first_step() and backpropagate again first, or pass a closure; "
                "for a plain step, call base_optimizer.step()"
            )
        self.restore()
        grad_scaler.step_base(self, self.base_optimizer)
        return loss

    def _run(self, closure: Callable[[], Any]) -> Any:
        """Run all passes of a step; leave the weights at w + v, with the gradients taken there."""
        if grad_scaler.is_calling(self):
            raise RuntimeError(
                "GradScaler cannot be used with a closure: call first_step(), then scaler.step()"
            )
        if not self.directions:  # gamma is 0: one pass, as for the base optimizer's step
            with torch.enable_grad():
                return closure()
        losses = []
        if not self.is_perturbed:
            for _ in range(self.ascent_steps):
                if "gradient" in self.directions:
                    losses.append(self._backpropagate(closure))
                self.first_step()
        losses.append(self._backpropagate(closure))
        return losses[0]

    def _backpropagate(self, closure: Callable[[], Any]) -> Any:
        params = (p for group in self.param_groups for p in group["params"])
        try:
            with torch.enable_grad(), refuse_accumulation(params):
                return closure()
        except GradientsNotZeroedError:
            self.zero_grad()
            raise

    # --- torch's optimizer interface; wrappers such as Accelerate's assign to the properties ---

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups, shared with it."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state. It does not contain the backup of the weights."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults, and AWP's own."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have its own ``gamma``, ``norm``, ``direction``, ``min_ndim``."""
        check_group({**self.defaults, **param_group})
        self.base_optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as the base optimizer does."""
        if set_to_none:  # the default; apex's and DeepSpeed's optimizers take no argument
            self.base_optimizer.zero_grad()
        else:
            self.base_optimizer.zero_grad(set_to_none=False)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and the groups' settings, never the backup of the weights.

        Raises:
            RuntimeError: the weights are perturbed; a checkpoint would pair this state with w + v.
        """
        self._require_unperturbed("state_dict()")
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base_optimizer.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or the state of a plain base optimizer.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._require_unperturbed("load_state_dict()")
        state_dict = state_dict.copy()  # hooks may write to it
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        settings = [{name: group[name] for name in GROUP_SETTINGS} for group in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        for group, before in zip(self.param_groups, settings, strict=True):
            for name, value in before.items():  # missing in a plain optimizer's checkpoint
                group.setdefault(name, value)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _require_unperturbed(self, what: str) -> None:
        if self.is_perturbed:
            raise RuntimeError(
                f"{what} needs unperturbed weights: call second_step() or restore() first"
            )

    def __getstate__(self) -> dict[str, Any]:
        self._require_unperturbed("copying or pickling")
        return {name: self.__dict__[name] for name in ("base_optimizer", "ascent_steps", "foreach")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.backup = WeightBackup()
        self._generators = RandomGenerators()
        super().__setstate__(state)

    def __repr__(self) -> str:
        name, base = type(self).__name__, type(self.base_optimizer).__name__
        groups = super().__repr__().removeprefix(name)
        return f"{name} of {base}, ascent_steps={self.ascent_steps}{groups}"
