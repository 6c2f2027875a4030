"""What every attack has in common: it is a value, and it leaves the model as it found it."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from awp_optim._utils.checks import DTYPES, check_choice, check_real, describe, is_integer

from .balls import at_least_float32, limits, round_toward
from .losses import Loss

Model = Callable[[Tensor], Tensor]
Gradients = tuple[Tensor | None, ...]
MODEL_MODES = ("eval", "train")


class Attack(ABC):
    """An immutable recipe for perturbing inputs: ``x_adv = attack(model, x, y)``.

    A subclass is a frozen dataclass with at least the two fields below (it declares them itself, so
    that the order of its arguments is its own) and implements :meth:`_perturb`.

    Attributes:
        uses_gradients: of the class, whether it asks the model for gradients.
        clip: the box (lo, hi) of valid inputs, or None for no box.
        model_mode: "eval" or "train", the mode in which the model is attacked.
    """

    uses_gradients: ClassVar[bool] = True

    clip: tuple[float, float] | None
    model_mode: str

    def __post_init__(self) -> None:
        """Check and normalise the settings; subclasses extend it."""
        check_choice("model_mode", self.model_mode, MODEL_MODES)
        if self.clip is not None:
            try:
                lo, hi = (check_real("clip", bound) for bound in self.clip)
            except (TypeError, ValueError):
                lo, hi = 1.0, 0.0
            if not lo < hi:
                raise ValueError(
                    f"clip must be (lo, hi) with lo < hi, the range of valid inputs, or None for"
                    f" no box, got {self.clip!r}"
                )
            self._set("clip", (lo, hi))

    def __call__(self, model: Model, x: Tensor, y: Tensor | None) -> Tensor:
        """Perturb a batch.

        The gradient is taken with respect to the input alone, of the loss summed over the batch:
        no example's perturbation depends on the others (unless the model itself mixes them, as
        BatchNorm does in train mode). No value is read back from an accelerator. The surrounding
        autocast applies; a surrounding ``no_grad`` or ``inference_mode`` does not hinder.

        Args:
            model: maps inputs in ``clip`` to logits of shape (N, C). Normalisation is one of its
                layers. A module is put in ``model_mode`` for the duration of the call and then left
                as it was, also after an exception: every submodule's mode, ``requires_grad``,
                ``.grad`` and hooks, and in eval mode its buffers. In train mode BatchNorm updates
                its running statistics at every forward pass. Any other callable is called as it is.
            x: float64, float32, bfloat16 or float16, shape (N, ...). It is not modified.
            y: on the device of ``x``. Class indices of any integer dtype, shape (N,); or, as mixup
                gives them, the classes' probabilities, of any dtype that ``x`` may have, shape
                (N, C): the loss is then its expectation. ``loss="cw"`` and "dlr" need indices. May
                be None for a loss that needs no label.

        Returns:
            The perturbed batch, detached, with the shape, dtype, device and memory format of ``x``.

        Raises:
            TypeError: ``x``, ``y`` or what the model returns is of the wrong type.
            ValueError: their shapes or devices do not fit, or, checked on the CPU only, where
                looking is free, ``x`` leaves ``clip``, a label is not among the model's classes, or
                probabilities are negative, not finite or do not sum to 1.
        """
        return self._call(model, x, y, ())[0]

    def _call(
        self, model: Model, x: Tensor, y: Tensor | None, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Gradients]:
        self._check(x, y)
        with torch.inference_mode(False), torch.no_grad():
            # Autograd refuses inference tensors; a clone made here is an ordinary tensor.
            x = x.clone() if x.is_inference() else x.detach()
            if y is not None:
                dtype = torch.int64 if is_integer(y) else y.dtype
                y = y.detach().to(dtype, copy=y.is_inference())
            if x.numel() == 0:
                return x.clone(), (None,) * len(weights)
            with in_mode(model, self.model_mode):
                oracle = ModelOracle(model, x, y, weights)
                x_adv = oracle.shown(self._perturb(oracle, at_least_float32(x), y))
                return x_adv, oracle.weight_gradients

    @abstractmethod
    def _perturb(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the perturbed ``x``, a new tensor; called without gradients, ``x`` not empty.

        ``x`` is in float32 at least: iterating in half precision would lose steps shorter than half
        a unit in the last place. What is returned is rounded toward the caller's input.
        """

    def _needs_labels(self) -> bool:
        return True

    def _takes_probabilities(self) -> bool:
        return False

    def _check(self, x: Tensor, y: Tensor | None) -> None:
        if not isinstance(x, Tensor) or x.dtype not in DTYPES:
            raise TypeError(
                f"x must be a tensor of dtype float64, float32, bfloat16 or float16, got"
                f" {describe(x)}; convert images with x.float() / 255"
            )
        if x.ndim == 0:
            raise ValueError("x must be a batch of shape (N, ...), got a tensor of no dimension")
        self._check_labels(y, x)
        if x.device.type != "cpu" or x.numel() == 0:
            return
        smallest, largest = x.detach().aminmax()
        lo, hi = limits(x.dtype, self.clip)
        if not (smallest >= lo and largest <= hi):
            if not bool(x.isfinite().all()):
                raise ValueError("x holds values that are not finite")
            raise ValueError(
                f"x spans [{smallest.item():.6g}, {largest.item():.6g}], outside clip={self.clip}."
                f" If x is normalised, make the normalisation a layer of the model and pass the"
                f" image itself; else give the range of your inputs, clip=(lo, hi) or clip=None"
            )
        if y is not None:
            _check_values(y.detach())

    def _check_labels(self, y: Tensor | None, x: Tensor) -> None:
        """All but their values, which only the CPU may look at."""
        n = len(x)
        if y is None:
            if self._needs_labels():
                raise ValueError("y is None, but this attack needs labels; only loss='kl' does not")
            return
        if not isinstance(y, Tensor) or not (is_integer(y) or y.dtype in DTYPES):
            raise TypeError(
                f"y must be a tensor of integer class indices, shape ({n},), or of floating-point"
                f" probabilities, shape ({n}, C), got {describe(y)}"
            )
        if is_integer(y) and y.shape != (n,):
            raise ValueError(
                f"y must hold one class index for each of the {n} examples, shape ({n},), got shape"
                f" {tuple(y.shape)}; turn one-hot labels into indices with y.argmax(1) or into"
                f" probabilities with y.float()"
            )
        if not is_integer(y) and (y.ndim != 2 or len(y) != n):
            raise ValueError(
                f"y is floating-point, so it must hold the classes' probabilities for each of the"
                f" {n} examples, shape ({n}, C), got shape {tuple(y.shape)}; class indices must be"
                f" integers, y.long()"
            )
        if not is_integer(y) and not self._takes_probabilities():
            raise TypeError(
                f"this attack needs class indices, but y holds probabilities, {describe(y)}; set"
                f" loss='ce', which takes both, or pass y.argmax(1), the most probable classes"
            )
        if y.device != x.device:
            raise ValueError(f"x is on {x.device} and y on {y.device}; move them to one device")

    def _set(self, name: str, value: Any) -> None:
        """Assign in ``__post_init__``, where a frozen dataclass needs to be told twice."""
        object.__setattr__(self, name, value)


class ModelOracle:
    """The model during one call of an attack: what it says at a point, and which way is up."""

    def __init__(
        self, model: Model, x: Tensor, y: Tensor | None, weights: Sequence[Tensor] = ()
    ) -> None:
        self.model = model
        self._x = x
        self._weights = list(weights)
        self.weight_gradients: Gradients = (None,) * len(self._weights)
        self._whole = self
        # A compiled backward pass computes all gradients there are, asked for or not.
        self._costly: list[Tensor] = []
        if isinstance(model, nn.Module) and any(map(_is_compiled, model.modules())):
            self._costly = list(model.parameters()) if _compiler_sees_requires_grad() else []
        # The number of classes is known at the first forward pass only. Reading labels is free on
        # the CPU, elsewhere it would wait for the device.
        self._largest_label, self._classes = -1, None
        if y is not None and not is_integer(y):
            self._classes = y.shape[1]
        elif y is not None and y.device.type == "cpu":
            self._largest_label = int(y.max())

    def only(self, rows: Tensor) -> ModelOracle:
        """The same for some of the examples, which an index or a mask names."""
        of_rows = copy.copy(self)
        of_rows._x = self._x[rows]
        return of_rows

    @property
    def dtype(self) -> torch.dtype:
        """The caller's, in which the model is shown its inputs."""
        return self._x.dtype

    def shown(self, z: Tensor) -> Tensor:
        """``z`` as the model is shown it: in the caller's dtype, and no further from x than z."""
        return round_toward(z, self._x)

    def logits(self, z: Tensor) -> Tensor:
        """The logits at ``z``, shape (N, C), without gradients: one forward pass."""
        with torch.no_grad(), uncached_autocast(z.device.type):
            return self.forward(self.shown(z))

    def gradient(self, z: Tensor, loss: Loss, target: Tensor, *, last: bool = False) -> Tensor:
        """The gradient at ``z`` of each example's ``loss(logits, target)``, in the dtype of ``z``.

        One forward pass and one backward pass to the input alone: no weight's gradient is computed.
        But in the ``last`` one of an attack, those that its caller asked for.
        """
        return self.evaluate_point(z, loss, target, last=last)[2]

    def evaluate_point(
        self, z: Tensor, loss: Loss, target: Tensor, *, last: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The logits at ``z``, the losses and their :meth:`gradient`, all of the same passes."""
        weights = self._weights if last else []
        with torch.enable_grad(), without_gradients([] if weights else self._costly):
            shown = self.shown(z).detach().requires_grad_()
            # The view, because tools that hook a module's input (FlopCounterMode, say) cannot hook
            # a leaf that autograd.grad was asked for.
            logits = self.forward(shown.view_as(shown))
            losses = loss(logits, target)
            total = losses.sum()
            g = None
            if total.requires_grad:
                g, *rest = torch.autograd.grad(total, [shown, *weights], allow_unused=True)
                if last:
                    self._whole.weight_gradients = tuple(rest)
        if g is None:
            raise ValueError(
                "the model's logits do not depend on its input through autograd, so there is no"
                " gradient to climb; does its forward pass detach, or run under torch.no_grad()?"
            )
        return logits.detach(), losses.detach(), g.to(z.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of ``x``, in the caller's dtype, through autograd if that is on; checked."""
        logits = self.model(x)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise TypeError(
                f"the model must return a floating-point tensor of logits, got {describe(logits)};"
                f" wrap it in a module that does (a plain function would leave its mode alone)"
            )
        if logits.ndim != 2 or len(logits) != len(x):
            raise ValueError(
                f"the model must return logits of shape (N, C), here ({len(x)}, C), got shape"
                f" {tuple(logits.shape)}"
            )
        if self._largest_label >= logits.shape[1]:
            raise ValueError(
                f"label {self._largest_label} is not among the model's {logits.shape[1]} classes,"
                f" numbered from 0"
            )
        if self._classes not in (None, logits.shape[1]):
            raise ValueError(
                f"y holds probabilities of {self._classes} classes, but the model has"
                f" {logits.shape[1]}"
            )
        return logits


def _check_values(y: Tensor) -> None:
    """Refuse labels that no model could have, indices or probabilities."""
    if is_integer(y):
        if bool((y < 0).any()):
            raise ValueError(f"labels must not be negative, got {int(y.min())}")
        return
    if not bool(y.isfinite().all()):
        raise ValueError("y holds probabilities that are not finite")
    if bool((y < 0).any()):
        raise ValueError(f"probabilities must not be negative, got {y.min().item():.6g}")
    total = y.double().sum(1)
    furthest = total[(total - 1).abs().argmax()].item()
    # Mixing and smoothing rounds each of them a few times, by half an eps at most.
    if not abs(furthest - 1) <= max(1e-3, 2 * torch.finfo(y.dtype).eps):
        raise ValueError(
            f"each example's probabilities must sum to 1, got a sum of {furthest:.6g}; divide them"
            f" by y.sum(1, keepdim=True), or take the softmax if they are logits"
        )


@contextmanager
def in_mode(model: Model, mode: str) -> Iterator[None]:
    """Put a module in "eval" or "train" mode, then every submodule back in its own."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    was = [(module, module.training) for module in modules]
    try:
        if isinstance(model, nn.Module):
            model.train(mode == "train")
        yield
    finally:
        for module, training in was:
            module.training = training


@contextmanager
def without_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, the parameters require no gradients."""
    required = [p for p in parameters if p.requires_grad]
    try:
        for p in required:
            p.requires_grad_(False)
        yield
    finally:
        for p in required:
            p.requires_grad_(True)


@functools.cache
def _compiler_sees_requires_grad() -> bool:
    """Whether code is compiled anew for weights that no longer require gradients.

    torch 2.11 goes on with what it has, which would then give no gradients when they are wanted.
    """
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        compilations.append(graph)
        return graph.forward

    # Without drawing random numbers.
    linear: nn.Module = nn.utils.skip_init(nn.Linear, 1, 1, bias=False)  # type: ignore[no-untyped-call]
    compiled = torch.compile(linear, backend=backend)
    with torch.enable_grad():
        for required in (True, False):
            linear.requires_grad_(required)
            compiled(torch.zeros(1, 1))
    return len(compilations) == 2


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module runs through torch.compile, as a wrapper or by its compile()."""
    return (
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
    )


@contextmanager
def uncached_autocast(device_type: str) -> Iterator[None]:
    """The surrounding autocast, if any, without its cache of weights cast to low precision.

    What a pass without gradients left there would be reused by the caller's training pass, and cut
    its weights off their gradient.
    """
    available = torch.amp.is_autocast_available(device_type)
    if not available or not torch.is_autocast_enabled(device_type):
        yield
        return
    dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, dtype=dtype, cache_enabled=False):
        yield
