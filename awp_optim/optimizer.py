"""AWP: adversarial weight perturbation around any torch optimizer.

Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020.

The optimizer is a small state machine. It rests at the centre w. ``first_step`` moves the weights
to the worst point w + v nearby, ``second_step`` brings them back and lets the base optimizer step
with the gradients found there::

    centre --first_step--> perturbed --second_step--> centre, updated by the base optimizer
                           perturbed --restore------> centre
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from awp_optim._core.dtensors import (
    Sharding,
    agreed_seed,
    is_distributed,
    local_like,
    local_part,
    processes,
    sharding_of,
)
from awp_optim._core.perturbation import NORMS, arithmetic_dtype, ascend_, layer_norms

__all__ = ["AWP"]

DIRECTIONS = ("gradient", "random", "momentum")
# Where base optimizers keep an average of gradients: SGD, RMSprop and Muon; the Adam family.
_MOMENTA = ("momentum_buffer", "exp_avg")
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

# A compiled optimizer method loses what it assigns to the optimizer, here that the weights are
# perturbed. torch.optim uses this for its own; the public decorator adds seconds to the import.
_not_compiled = torch._disable_dynamo  # type: ignore[attr-defined]


def _home_on_error(step: Callable[..., Any]) -> Callable[..., Any]:
    """Let an exception in a step, or in one of its hooks, bring the weights home on its way."""

    @functools.wraps(step)
    def guarded(self: AWP, *args: Any, **kwargs: Any) -> Any:
        try:
            return step(self, *args, **kwargs)
        except BaseException:
            self.restore()
            # GradScaler sets these for the time of the call, and leaves them behind on an error.
            self.__dict__.pop("found_inf", None)
            self.__dict__.pop("grad_scale", None)
            raise

    guarded.hooked = True  # type: ignore[attr-defined] # the hooks are inside, torch adds no more
    return guarded


class AWP(Optimizer):
    """A base optimizer that steps with the gradients at adversarially perturbed weights.

    For every parameter tensor l, one ascent is Eq. (10) and (15) of the paper:
    ``v_l <- P(v_l + gamma/ascent_steps * |w_l| * g_l/|g_l|)``, where P scales v_l back onto
    ``|v_l| <= gamma |w_l|``. A tensor gets v_l = 0 that has fewer than ``min_ndim`` dimensions, no
    gradient, a zero or non-finite gradient, or zero weight.

    The base update is computed at w from the gradients at w + v, so a base optimizer's weight decay
    acts on w. A script that adds v to the weights, steps and takes v away decays w + v instead: the
    two agree exactly without weight decay and differ by ``lr * weight_decay * v`` with it.

    **Accumulation.** v is of what is in ``p.grad``. Accumulate all micro-batches before both steps
    and v is that of the whole batch, at twice the passes; accumulate one of them before
    ``first_step(zero_grad=True)`` and all before ``second_step``, and it is that of the one, for
    1/n more. In v the scale of the sum cancels; in the update it counts as ever.

    **Loss scales.** With ``GradScaler`` call ``scaler.unscale_(opt)`` after the last backward pass
    alone: before :meth:`first_step` there is no need, and the scaler unscales once per update.

    **Several processes.** With ``DistributedDataParallel`` the gradients of both passes are
    averaged: every process has the same v. A pass under ``model.no_sync()`` before the first step
    saves that all-reduce and gives each process a v of its own batch; random directions are each
    process' own, too. The weights stay equal in all processes either way, for w comes back bit for
    bit and the update is of averaged gradients. As one process alone must not skip an update, there
    an overflow in the ascent leaves v_l = 0 and skips none.

    Parameters may be DTensors, as ``fully_shard`` (FSDP2) and tensor parallelism make them: norms
    are of whole tensors, for one all-reduce of L numbers per ascent (one more for the projection of
    further ones) along the mesh dimensions that split them. A random direction is drawn in parts,
    alike where there are copies: the first draw agrees on a seed for each mesh, which reads it
    back to the host once. FSDP2 does not gather again what a forward pass without a backward pass
    left gathered: call ``model.reshard()`` after evaluating inside :meth:`perturbed`. Under its
    ``set_requires_gradient_sync(False)`` there is nothing in ``p.grad`` to ascend along.

    Args:
        params: parameters, named parameters or parameter groups, as for any torch optimizer. A
            group may set its own ``gamma``, ``norm``, ``direction`` and ``min_ndim``.
        base_optimizer: a class, or a callable ``(param_groups, **base_kwargs) -> Optimizer``. For
            an optimizer already built see :meth:`wrap`.
        gamma: size of the perturbation relative to each tensor's weight norm, >= 0, a number or a
            0-d tensor. The paper uses 5e-3 to 1e-2. With 0 this is the base optimizer.
        ascent_steps: calls of :meth:`first_step` before the second, K2 * A in the paper, >= 1.
        norm: "l2" (Frobenius) or "l1", measuring weights, gradients and perturbations.
        direction: "gradient", the paper's; "momentum", along the base optimizer's average of the
            gradients (SGD's momentum buffer, Adam's first moment), which saves the pass for the
            ascent and gives up that v is adversarial to this batch: v is zero before the first
            update, weight decay is in it where the average has it, as SGD's, and measured it did
            little (see the README); or "random" for the paper's RWP baseline.
        min_ndim: tensors with fewer dimensions stay unperturbed; 2 leaves out biases and norms.
        foreach: True for the ``torch._foreach_*`` implementation, False for the readable one, None
            for foreach except with tensor subclasses. Passed on to a base optimizer that has it.
        **base_kwargs: for the base optimizer.

    Raises:
        TypeError: if ``base_optimizer`` does not give an optimizer, or gives one that has to call
            a closure itself (LBFGS).
        ValueError: if a setting is out of its range, or the base optimizer has a setting of the
            same name; later, from :meth:`first_step`, if ``direction="momentum"`` finds none.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> opt = AWP(model.parameters(), torch.optim.SGD, gamma=5e-3, lr=0.1, momentum=0.9)
        >>> x, y = torch.randn(8, 2), torch.randint(2, (8,))
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> opt.first_step(zero_grad=True)
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> opt.second_step(zero_grad=True)
    """

    # GradScaler then calls step() on an overflow too, which brings the weights home; see _update.
    _step_supports_amp_scaling = True

    base_optimizer: Optimizer
    ascent_steps: int
    foreach: bool | None

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
        if isinstance(base_optimizer, Optimizer) or not callable(base_optimizer):
            raise TypeError(
                "base_optimizer must be a class such as torch.optim.SGD or a callable that builds "
                f"an optimizer, got {base_optimizer!r:.80}; for an optimizer already built use "
                "AWP.wrap(optimizer, gamma=...)"
            )
        if not isinstance(ascent_steps, int) or ascent_steps < 1:
            raise ValueError(f"ascent_steps must be an integer >= 1, got {ascent_steps!r}")
        settings = {"gamma": gamma, "norm": norm, "direction": direction, "min_ndim": min_ndim}
        _check_settings(settings)
        if foreach is not None and _names_argument(base_optimizer, "foreach"):
            base_kwargs["foreach"] = foreach

        self.ascent_steps = ascent_steps
        self.foreach = foreach
        self._forget()
        # param_groups, state and defaults are the base optimizer's own. Until it is built, a
        # placeholder holds them while torch checks the parameters and our settings fill the groups.
        self.base_optimizer = SimpleNamespace()  # type: ignore[assignment]
        super().__init__(_own_groups(params), settings)
        base = base_optimizer(self.param_groups, **base_kwargs)
        _check_base(base, settings)
        for group in base.param_groups:
            for name, value in settings.items():
                group.setdefault(name, value)
        base.defaults.update(settings)
        self.base_optimizer = base

    @classmethod
    def wrap(cls, optimizer: Optimizer, gamma: float | Tensor = 5e-3, **settings: Any) -> AWP:
        """AWP around an optimizer already built, which keeps its state and its groups.

        Args:
            optimizer: any torch optimizer; from now on step through the AWP that is returned.
            gamma: as in the constructor; a group's own setting wins.
            **settings: ``ascent_steps``, ``norm``, ``direction``, ``min_ndim``, ``foreach``.

        Example:
            >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
            >>> AWP.wrap(sgd, gamma=1e-2).base_optimizer is sgd
            True
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"AWP.wrap takes an optimizer already built, got {optimizer!r:.80}; with a class "
                "use AWP(params, base_optimizer, ...)"
            )
        unknown = settings.keys() - {"ascent_steps", "norm", "direction", "min_ndim", "foreach"}
        if unknown:
            raise TypeError(
                f"AWP.wrap got {sorted(unknown)}: the settings of the optimizer itself are given "
                "where it is built"
            )
        return cls(optimizer.param_groups, lambda _: optimizer, gamma, **settings)

    # ------------------------------------------------------------------ the two steps

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at w + v instead of the centre w."""
        return bool(self._place.is_perturbed)

    @property
    def directions(self) -> frozenset[str]:
        """The directions in which weights are perturbed; empty where gamma is 0 in every group."""
        return frozenset(group["direction"] for group in self.param_groups if _is_active(group))

    @_not_compiled
    @torch.no_grad()
    def first_step(
        self, zero_grad: bool = False, *, along: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        """One ascent of the weights, from ``w + v`` along the gradients in ``p.grad``.

        Call it ``ascent_steps`` times, each after a fresh backward pass; further calls stay inside
        the ball. A gradient multiplied by a loss scale need not be unscaled: the scale cancels.

        Args:
            zero_grad: set the gradients to None afterwards.
            along: tensors to ascend along instead of the gradients, by parameter, each shaped like
                its parameter; a parameter that is not in it stays. For the groups whose direction
                is "gradient".

        Raises:
            ValueError: if a group's settings are not valid, a tensor in ``along`` has another shape
                than its parameter, or the direction is "momentum" and the base optimizer has
                none; nothing is changed.
            TypeError: if a tensor in ``along`` is a DTensor and its parameter is not, or the other
                way round, when nothing is changed; if a parameter is placed on its mesh as neither
                Shard nor Replicate, when the weights are at the centre.
        """
        self._check_groups()
        on_momentum = [
            g for g in self.param_groups if g["direction"] == "momentum" and _is_active(g)
        ]
        momenta = self._momenta(on_momentum)
        for p, direction in (along or {}).items():
            if direction.shape != p.shape:
                raise ValueError(
                    f"along holds a tensor of shape {tuple(direction.shape)} for a parameter of "
                    f"shape {tuple(p.shape)}"
                )
            if is_distributed(direction) != is_distributed(p):
                raise TypeError(
                    "along holds a plain tensor for a DTensor, or the other way round: distribute "
                    "it as its parameter is, with torch.distributed.tensor.distribute_tensor"
                )
        try:
            self._place.is_perturbed = True
            batches = self._gather(along, momenta)
            self._back_up(batches)
            for batch in batches:
                self._ascend(batch)
        except BaseException:
            self.restore()
            raise
        torch.clear_autocast_cache()  # else it goes on with copies of the weights before
        if zero_grad:
            self.zero_grad()

    def perturbation(self, out: Mapping[Tensor, Tensor] | None = None) -> dict[Tensor, Tensor]:
        """v of every parameter that was perturbed; empty at the centre.

        Half-precision weights are perturbed in their own dtype: this is v as they hold it.

        Args:
            out: what an earlier call gave; its tensors are written to again.
        """
        out = out or {}
        with torch.inference_mode(False), torch.no_grad():
            return {p: _difference(p, w, out.get(p)) for p, w in self._live.items()}

    def _check_groups(self) -> None:
        for group in self.param_groups:
            _check_settings(group)

    def momenta(self) -> dict[Tensor, Tensor]:
        """The base optimizer's average of the gradients, by parameter; empty before its first step.

        Raises:
            ValueError: the base optimizer keeps none.
        """
        return self._momenta(self.param_groups)

    def second_step(self, zero_grad: bool = False) -> None:
        """Back to the centre, bit for bit, then the base optimizer's step.

        Args:
            zero_grad: set the gradients to None afterwards.

        Raises:
            RuntimeError: at the centre, that is without a :meth:`first_step` before.
        """
        if not self._place.is_perturbed:
            raise RuntimeError(
                "second_step() needs a first_step() before it: the weights are not perturbed"
            )
        self.step()  # the attribute, which learning-rate schedulers replace
        if zero_grad:
            self.zero_grad()

    @_not_compiled
    @torch.no_grad()
    def restore(self) -> None:
        """Back to the centre, bit for bit, without an update; does nothing at the centre."""
        if not self._place.is_perturbed:
            return
        for params, centres, foreach in self._backed_up:
            _copy_(params, centres, foreach)
        self._backed_up.clear()
        self._live.clear()
        self._overflows.clear()
        self._place.is_perturbed = False
        torch.clear_autocast_cache()

    @contextmanager
    def perturbed(self, zero_grad: bool = False) -> Iterator[None]:
        """Inside the ``with`` the weights are w + v; leaving restores, also on an exception.

        Takes the :meth:`first_step` on entry unless one was taken before. A :meth:`second_step`
        inside is fine: then there is nothing left to restore.

        Args:
            zero_grad: set the gradients to None once the weights are perturbed.
        """
        if not self._place.is_perturbed:
            self.first_step()
        try:
            if zero_grad:
                self.zero_grad()
            yield
        finally:
            self.restore()

    @_home_on_error
    @Optimizer.profile_hook_step
    @functools.partial(_not_compiled, recursive=False)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The second step or, with a closure, all of it.

        Args:
            closure: zeroes the gradients, computes the loss, backpropagates and returns the loss.
                It is called before each of ``ascent_steps`` ascents and once at the perturbed
                weights; just once where nothing is perturbed by gradients, or where they were
                perturbed before, by :meth:`first_step`.

        Returns:
            The closure's first loss, or None without a closure.

        Raises:
            RuntimeError: without a closure at the centre (unless gamma is 0 everywhere), where it
                would be a plain step; with one that does not zero the gradients; with one while
                GradScaler calls. The trial step of ``torch.distributed.checkpoint``, at learning
                rate 0 with gradients of zero before there is any state, is let through.

        After an exception, whoever raised it, the weights are at the centre.
        """
        loss = self._reach_perturbed(closure)
        overflows = list(self._overflows)
        self.restore()
        self._update(overflows)
        return loss

    # ------------------------------------------------------------------ as any torch optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups, shared with it."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state. The backup of the weights is no part of it."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults and AWP's own."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have its own ``gamma``, ``norm``, ``direction``, ``min_ndim``."""
        if isinstance(param_group, dict):
            _check_settings({**self.defaults, **param_group})
        if isinstance(self.base_optimizer, Optimizer):
            self.base_optimizer.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as the base optimizer does it."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and the groups' settings, never the backup of the weights.

        Raises:
            RuntimeError: while perturbed, when the model's weights are not those to be saved.
        """
        self._require_centre("state_dict()")
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base_optimizer.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or the state of a plain base optimizer.

        Raises:
            RuntimeError: while perturbed.
        """
        self._require_centre("load_state_dict()")
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        settings = [{name: group[name] for name in _SETTINGS} for group in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        self._has_updated = False  # it may be of the time before
        for group, before in zip(self.param_groups, settings, strict=True):
            for name, value in before.items():  # a plain optimizer's checkpoint has none
                group.setdefault(name, value)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._require_centre("copying or pickling")
        return {name: self.__dict__[name] for name in ("base_optimizer", "ascent_steps", "foreach")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        super().__setstate__(state)

    def __repr__(self) -> str:
        name, base = type(self).__name__, type(self.base_optimizer).__name__
        groups = super().__repr__().removeprefix(name)
        return f"{name} of {base}, ascent_steps={self.ascent_steps}{groups}"

    # ------------------------------------------------------------------ how it is done

    def _forget(self) -> None:
        # Shared with whoever copies the attributes, as Lightning's wrapper does.
        self._place = SimpleNamespace(is_perturbed=False)
        # One buffer for every parameter perturbed so far, allocated once.
        self._buffers: dict[Tensor, Tensor] = {}
        # While perturbed: the centre of each perturbed parameter, and both in lists.
        self._live: dict[Tensor, Tensor] = {}
        self._backed_up: list[tuple[list[Tensor], list[Tensor], bool]] = []
        # For random directions of sharded parameters: a seed for each mesh, then what draws.
        self._seeds: dict[Any, int] = {}
        self._generators: dict[tuple[Sharding, torch.device], torch.Generator] = {}
        # Whether the ascents met gradients that were not finite: 0-d tensors, read by none but AMP.
        self._overflows: list[Tensor] = []
        # Updates in a row that were skipped for these alone.
        self._skipped = 0
        # Whether the base optimizer has had occasion to build its state.
        self._has_updated = False

    def _host_state(self) -> HostState:
        """What the host knows of where the weights are, to be put back after a replay."""
        return HostState(
            self._place.is_perturbed, dict(self._live), list(self._backed_up), list(self._overflows)
        )

    def _set_host_state(self, state: HostState) -> None:
        self._place.is_perturbed = state.is_perturbed
        self._live, self._backed_up = dict(state.live), list(state.backed_up)
        self._overflows = list(state.overflows)

    def _require_centre(self, what: str) -> None:
        if self._place.is_perturbed:
            raise RuntimeError(
                f"{what} while the weights are perturbed: call second_step() or restore() first"
            )

    def _momenta(self, groups: list[dict[str, Any]]) -> dict[Tensor, Tensor]:
        momenta = {}
        for p in (p for group in groups for p in group["params"]):
            state = self.state.get(p, {})
            found = (state[name] for name in _MOMENTA if state.get(name) is not None)
            m = next(found, None)
            if m is not None and m.shape == p.shape:
                momenta[p] = m
        switched_off = any(g.get("momentum", 1) == 0 and "betas" not in g for g in groups)
        if groups and not momenta and (switched_off or self._has_updated):
            raise ValueError(
                "an ascent along the momentum needs a base optimizer that has one, such as "
                f"SGD(momentum=0.9) or Adam; {type(self.base_optimizer).__name__} keeps none here "
                f"(looked for {' and '.join(_MOMENTA)} in its state)"
            )
        return momenta

    def _gather(
        self, along: Mapping[Tensor, Tensor] | None, momenta: Mapping[Tensor, Tensor]
    ) -> list[_Batch]:
        """The tensors to ascend, in batches of one group, device and dtype."""
        # With thousands of small tensors this loop takes as long as the arithmetic: it looks at
        # each tensor as little as it can.
        batches: dict[Any, _Batch] = {}
        seen: set[int] = set()
        live, forced = self._live, self.foreach
        for index, group in enumerate(self.param_groups):
            if not _is_active(group):
                continue
            random, min_ndim = group["direction"] == "random", group["min_ndim"]
            given = momenta if group["direction"] == "momentum" else along
            # The worst weights are those with the least of what is maximised. (The base optimizer
            # averages gradients that it has turned round itself.)
            turned = given is None and group.get("maximize", False)
            for p in group["params"]:
                g = None if random else p.grad if given is None else given.get(p)
                if not p.requires_grad if random else g is None:
                    continue
                if p.ndim < min_ndim or id(p) in seen or p.numel() == 0:
                    continue
                seen.add(id(p))
                if g is not None and g.layout is not torch.strided:
                    g = g.to_dense()
                part, sharding = p, None
                is_plain = type(p) in _PLAIN_TENSORS
                if not is_plain and is_distributed(p):
                    sharding, part = sharding_of(p), local_part(p)
                    g = None if g is None else local_like(g, p)
                    is_plain = type(part) in _PLAIN_TENSORS
                if turned and g is not None:
                    g = -g
                foreach = is_plain if forced is None else forced
                device, dtype = part.device, part.dtype
                centre = live.get(p) if live else None
                g_dtype, at_centre = None if g is None else g.dtype, centre is None
                key = index, device, dtype, g_dtype, foreach, at_centre, sharding
                batch = batches.get(key)
                if batch is None:
                    batch = _Batch(group, [], [], [], [], foreach, at_centre, sharding)
                    batches[key] = batch
                batch.owners.append(p)
                batch.params.append(part)
                batch.centres.append(self._buffer(p, part) if centre is None else centre)
                if g is not None:
                    batch.grads.append(g)
        return list(batches.values())

    def _buffer(self, p: Tensor, part: Tensor) -> Tensor:
        """Where the centre of a parameter is kept, or of the part of it that is here."""
        buffer = self._buffers.get(p)
        if (
            buffer is None
            or buffer.dtype is not part.dtype
            or buffer.shape != part.shape
            or buffer.device != part.device
        ):
            with torch.inference_mode(False):  # a buffer outlives the mode it was made in
                buffer = self._buffers[p] = torch.empty_like(part)
        return buffer

    def _back_up(self, batches: list[_Batch]) -> None:
        """Copy the centres of all batches, before any weight moves: tensors may share memory."""
        for batch in batches:
            if batch.at_centre:
                _copy_(batch.centres, batch.params, batch.foreach)
                self._backed_up.append((batch.params, batch.centres, batch.foreach))
                self._live.update(zip(batch.owners, batch.centres, strict=True))

    def _ascend(self, batch: _Batch) -> None:
        group, _, params, centres, grads, foreach, at_centre, sharding = batch
        norm = group["norm"]
        weight_norms = layer_norms(centres, norm, foreach=foreach)

        settings: dict[str, Any] = {
            "gamma": group["gamma"],
            "steps": self.ascent_steps,
            "norm": norm,
            "at_centre": at_centre,
            "foreach": foreach,
        }
        if sharding is not None:
            settings["whole"] = lambda norms: sharding.whole_norms(norm, norms)[0]
        if group["direction"] == "random":  # one at a time: a draw takes the memory of its weight
            generator = self._generator(sharding, params[0].device)
            if sharding is not None:
                (weight_norms,) = sharding.whole_norms(norm, weight_norms)
            for p, w, w_norm in zip(params, centres, weight_norms, strict=True):
                draw = _normal_like(p, generator)
                draw_norm = layer_norms([draw], norm, foreach=foreach)
                if sharding is not None:
                    (draw_norm,) = sharding.whole_norms(norm, draw_norm)
                ascend_([p], [draw], [w], w_norm.view(1), draw_norm, **settings)
        else:
            grad_norms = layer_norms(grads, norm, foreach=foreach)
            if sharding is not None:
                weight_norms, grad_norms = sharding.whole_norms(norm, weight_norms, grad_norms)
            # Processes with copies of a tensor may ascend along gradients of their own. To skip an
            # update in one of them alone would part the copies for good.
            if processes() == (1 if sharding is None else sharding.mesh.size()):
                self._overflows.append(grad_norms.isfinite().all().logical_not())
            ascend_(params, grads, centres, weight_norms, grad_norms, **settings)

    def _generator(self, sharding: Sharding | None, device: torch.device) -> torch.Generator | None:
        """What draws random directions: None, torch's default, for tensors that are whole."""
        if sharding is None:
            return None
        key = sharding, device
        if key not in self._generators:
            mesh = sharding.mesh
            if mesh not in self._seeds:
                self._seeds[mesh] = agreed_seed(mesh)
            self._generators[key] = sharding.generator(self._seeds[mesh], device)
        return self._generators[key]

    def _reach_perturbed(self, closure: Callable[[], Any] | None) -> Any:
        """With the closure go to w + v and take the gradients there; without, see that we are."""
        if closure is None:
            if self.directions and not self._place.is_perturbed and not self._is_trial_step():
                raise RuntimeError(
                    "step() without a closure would be a plain step without perturbation: call "
                    "first_step() and backpropagate again before it, or pass a closure; for a "
                    "plain step call base_optimizer.step()"
                )
            return None
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                "GradScaler cannot be used with a closure: call first_step(), then scaler.step()"
            )
        if self._place.is_perturbed:  # by a first step of the caller's
            with torch.enable_grad():
                return closure()
        directions = self.directions
        losses = []
        for _ in range(self.ascent_steps if directions else 0):
            if "gradient" in directions:
                losses.append(self._pass(closure))
            self.first_step()
        losses.append(self._pass(closure))
        return losses[0]

    def _pass(self, closure: Callable[[], Any]) -> Any:
        """The closure's loss; what is in ``p.grad`` afterwards must be of this call alone."""
        if not self.directions:  # as the base optimizer, which does not care
            with torch.enable_grad():
                return closure()
        mark = _Mark(p for group in self.param_groups for p in group["params"])
        try:
            with torch.enable_grad():
                loss = closure()
        except BaseException:
            mark.erase()
            raise
        if mark.is_there():
            self.zero_grad()
            raise RuntimeError(
                "the closure did not zero the gradients, so that those of several calls would add "
                "up, at w and at w + v: call zero_grad() in it. If they were accumulated on "
                "purpose, as by Lightning's accumulate_grad_batches, take the two steps yourself "
                "or let the closure go over all batches of the update. The weights are at the "
                "centre, the gradients are cleared"
            )
        return loss

    def _is_trial_step(self) -> bool:
        """Whether a step would do nothing but build the base optimizer's state.

        ``torch.distributed.checkpoint.state_dict`` takes one before it loads: with no state yet,
        every learning rate 0 and every gradient zeros.
        """
        if self.state or any(float(group.get("lr", 1)) != 0 for group in self.param_groups):
            return False
        params = [p for g in self.param_groups for p in g["params"] if p.requires_grad]
        grads = [local_part(p.grad) if is_distributed(p.grad) else p.grad for p in params]
        return all(g is not None and not g.any() for g in grads)

    def _update(self, overflows: list[Tensor]) -> None:
        """The base optimizer's step, unless GradScaler or an ascent found an overflow.

        An ascent looks at the gradients it uses: an overflow in a bias alone is none to it.

        GradScaler's protocol for optimizers with ``_step_supports_amp_scaling``: it sets
        ``found_inf`` and, where the gradients are still scaled, ``grad_scale``, and calls step()
        in any case.
        """
        base = self.base_optimizer
        if not hasattr(self, "found_inf"):
            base.step()
            self._has_updated = True
            return
        grad_scale: Tensor | None = self.grad_scale  # type: ignore[attr-defined]
        found_inf = torch.as_tensor(self.found_inf)  # the number 0 where there was no gradient
        total = found_inf
        for overflow in overflows:
            total = total.maximum(overflow.to(total))
        if getattr(base, "_step_supports_amp_scaling", False) and base.state:
            base.grad_scale, base.found_inf = grad_scale, total  # type: ignore[attr-defined]
            try:
                base.step()
            finally:
                del base.grad_scale, base.found_inf  # type: ignore[attr-defined]
        elif total.item():  # the one read that GradScaler makes for most optimizers
            self._count_skip(in_ascent_alone=not found_inf.item())
        else:
            self._skipped = 0
            if grad_scale is not None:
                _unscale(self.param_groups, grad_scale)
            base.step()
            self._has_updated = True

    def _count_skip(self, in_ascent_alone: bool) -> None:
        """Warn of updates skipped in a row for overflows that GradScaler does not know of."""
        self._skipped = self._skipped + 1 if in_ascent_alone else 0
        if self._skipped == _SKIPPED_IN_A_ROW:
            warnings.warn(
                f"{self._skipped} updates in a row were skipped because gradients overflowed in "
                "the ascent, but not at the perturbed weights, which is all that GradScaler sees: "
                "lower its scale, for example by scaler.update(scaler.get_scale() / 4)",
                stacklevel=5,
            )


def _copy_(targets: list[Tensor], sources: list[Tensor], foreach: bool) -> None:
    if foreach:
        torch._foreach_copy_(targets, sources)
    else:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def _normal_like(p: Tensor, generator: torch.Generator | None) -> Tensor:
    draw = torch.empty_like(p, dtype=arithmetic_dtype(p.dtype))
    return draw.normal_(generator=generator)


def _difference(p: Tensor, w: Tensor, out: Tensor | None) -> Tensor:
    """p - w, where w is the local part of a DTensor if p is one."""
    if not is_distributed(p):
        return torch.sub(p, w, out=out)
    out = torch.empty_like(p) if out is None else out
    torch.sub(local_part(p), w, out=local_part(out))
    return out


class _Mark:
    """A NaN in a gradient of before: a closure that zeroes the gradients wipes it away.

    Whichever way it zeroes them, and without a look at a value unless the tensor is still there.
    """

    def __init__(self, params: Iterator[Tensor]) -> None:
        self._param: Tensor | None = None
        for p in params:
            g = p.grad
            if g is None or g.layout is not torch.strided or g.is_inference():
                continue
            part = local_part(g) if is_distributed(g) else g
            if part.numel():
                self._param, self._grad = p, g
                self._first = part[(0,) * part.ndim]
                self._before = self._first.clone()
                self._first.fill_(math.nan)
                return

    def is_there(self) -> bool:
        """Whether the gradient is the one of before, and not wiped."""
        p = self._param
        return p is not None and p.grad is self._grad and bool(self._first.isnan())

    def erase(self) -> None:
        """Put back what was in its place, if it is there."""
        if self.is_there():
            self._first.copy_(self._before)


class HostState(NamedTuple):
    is_perturbed: bool
    live: dict[Tensor, Tensor]
    backed_up: list[tuple[list[Tensor], list[Tensor], bool]]
    overflows: list[Tensor]


class _Batch(NamedTuple):
    group: dict[str, Any]
    owners: list[Tensor]  # the parameters
    params: list[Tensor]  # themselves or, of DTensors, the parts that are here
    centres: list[Tensor]
    grads: list[Tensor]  # empty for random directions
    foreach: bool
    at_centre: bool
    sharding: Sharding | None


_SKIPPED_IN_A_ROW = 5
_SETTINGS = ("gamma", "norm", "direction", "min_ndim")


def _check_settings(group: dict[str, Any]) -> None:
    gamma, norm, direction, min_ndim = (group[name] for name in _SETTINGS)
    if isinstance(gamma, Tensor):
        if gamma.ndim != 0 or not gamma.is_floating_point():
            raise ValueError(
                f"gamma as a tensor must be a 0-d float, got {gamma.shape} {gamma.dtype}"
            )
    elif isinstance(gamma, bool) or not isinstance(gamma, Real):
        raise TypeError(f"gamma must be a number or a 0-d tensor, got {gamma!r}")
    elif not 0 <= float(gamma) < math.inf:
        raise ValueError(f"gamma must be finite and >= 0, got {gamma}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {tuple(NORMS)}, got {norm!r}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {DIRECTIONS}, got {direction!r}")
    if not isinstance(min_ndim, int) or min_ndim < 0:
        raise ValueError(f"min_ndim must be an integer >= 0, got {min_ndim!r}")


def _check_base(base: Any, settings: dict[str, Any]) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must give a torch.optim.Optimizer, got {base!r:.80}")
    name = type(base).__name__
    if isinstance(base, AWP) or settings.keys() <= base.defaults.keys():
        raise TypeError(
            f"{name} is already wrapped by AWP: change gamma and the other settings in its "
            "param_groups instead"
        )
    clash = sorted(settings.keys() & base.defaults.keys())
    if clash:
        raise ValueError(
            f"{name} has settings named {clash} of its own, which AWP would overwrite: subclass "
            "it and rename them"
        )
    # FSDP1 marks its parameters so: flat pieces, of which no norm of a weight can be had.
    if any(getattr(p, "_fsdp_flattened", False) for g in base.param_groups for p in g["params"]):
        raise TypeError(
            "parameters of FullyShardedDataParallel (FSDP1) are flattened, their weight tensors "
            "cannot be told apart: shard the model with torch.distributed.fsdp.fully_shard instead"
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{name} calls a closure several times in a step, at weights of its own choosing: it "
            "cannot step with gradients taken at perturbed weights"
        )


def _is_active(group: dict[str, Any]) -> bool:
    """Whether a group is perturbed. A gamma in a tensor counts as not zero, unread."""
    return isinstance(group["gamma"], Tensor) or group["gamma"] != 0


def _own_groups(params: ParamsT) -> Any:
    """Groups of our own, so that the caller's are not written to (torch leaves defaults there)."""
    if isinstance(params, (Tensor, set)):
        return params  # for torch to complain
    entries = list(params)
    return [dict(entry) if isinstance(entry, dict) else entry for entry in entries]


def _names_argument(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False


def _unscale(groups: list[dict[str, Any]], scale: Tensor) -> None:
    """Divide all gradients by the loss scale, in place, as GradScaler.unscale_ does."""
    grads: dict[torch.device, list[Tensor]] = {}
    for p in (p for group in groups for p in group["params"] if p.grad is not None):
        grad = local_part(p.grad) if is_distributed(p.grad) else p.grad
        if grad.dtype == torch.float16:
            raise ValueError("Attempting to unscale FP16 gradients.")
        if grad.layout == torch.strided:
            grads.setdefault(grad.device, []).append(grad)
        else:
            grad.mul_(scale.reciprocal().to(grad.device))
    for device, tensors in grads.items():
        torch._foreach_mul_(tensors, scale.reciprocal().to(device))
