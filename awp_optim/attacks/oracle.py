"""The model as seen by an attack during one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from awp_optim._utils.model_state import Model as Model
from awp_optim.attacks._batch_norm import BatchNorms, batch_norms_of, for_input_gradients
from awp_optim.attacks._inputs import check_outputs
from awp_optim.attacks.balls import round_toward
from awp_optim.attacks.losses import Labels, Loss

Gradients = tuple[Tensor | None, ...]
MODEL_MODES = ("eval", "train")

COMPILER_SEES_REQUIRES_GRAD = torch.__version__ >= "2.12"
"""Whether compiled code notices that a weight's ``requires_grad`` has changed (PyTorch PR 177158).

Older versions may run code that was compiled for frozen weights when gradients are needed.
"""


class ModelOracle:
    """Gives an attack the model's outputs and input gradients at points near ``x``.

    Args:
        model: maps inputs to logits (for a custom loss, to any tensor with N rows).
        x: the clean inputs. The model gets inputs of this dtype.
        y: their labels, against which the outputs are checked.
        labels: what ``y`` may hold.
    """

    def __init__(
        self, model: Model, x: Tensor, y: Tensor | None, labels: Labels = Labels.CLASSES
    ) -> None:
        self.model, self.x, self.y = model, x, y
        self._labels = labels
        self._weights: Sequence[Tensor] = ()
        self._passes_to_weights = 0
        self.weight_gradients: Gradients = ()
        self._frozen: list[Tensor] = []
        self._batch_norms: BatchNorms = []
        if isinstance(model, nn.Module):
            if not _is_compiled(model):
                self._batch_norms = batch_norms_of(model)
            elif COMPILER_SEES_REQUIRES_GRAD:
                # A compiled backward pass computes the gradients of all weights that require them.
                self._frozen = list(model.parameters())

    def subset(self, rows: Tensor) -> ModelOracle:
        """The oracle for some of the examples, given by their indices or a mask."""
        y = None if self.y is None else self.y[rows]
        return ModelOracle(self.model, self.x[rows], y, self._labels)

    def collect_weight_gradients(self, weights: Sequence[Tensor], in_pass: int) -> None:
        """Let gradient pass number ``in_pass``, counted from 1, also differentiate by ``weights``.

        :attr:`weight_gradients` then holds the gradients of the loss, summed over the batch.
        """
        self._weights, self._passes_to_weights = weights, in_pass
        self.weight_gradients = (None,) * len(weights)

    def as_input(self, z: Tensor) -> Tensor:
        """``z`` in the dtype of the clean inputs, rounded toward them."""
        return round_toward(z, self.x)

    def forward(self, x: Tensor) -> Tensor:
        """The model's checked outputs for ``x``; differentiable if autograd is enabled."""
        outputs = self.model(x)
        check_outputs(outputs, len(x), self.y, self._labels)
        return outputs

    def logits(self, z: Tensor) -> Tensor:
        """The outputs at ``z``, without gradients: one forward pass."""
        with torch.no_grad(), uncached_autocast(z.device.type):
            return self.forward(self.as_input(z).clone())  # the model may normalize in place

    def gradient(self, z: Tensor, loss: Loss, target: Tensor) -> Tensor:
        """The gradient of each example's ``loss(logits, target)`` at ``z``, in the dtype of ``z``.

        One forward pass and one backward pass to the input. Weight gradients are computed only if
        :meth:`collect_weight_gradients` asks for them.
        """
        return self.evaluate_point(z, loss, target)[2]

    def evaluate_point(
        self, z: Tensor, loss: Loss, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The logits at ``z``, the losses and their :meth:`gradient`, from the same passes."""
        self._passes_to_weights -= 1
        weights = self._weights if self._passes_to_weights == 0 else ()
        with torch.enable_grad(), nullcontext() if weights else self._for_input_alone():
            x = self.as_input(z).detach().requires_grad_()
            # A view, because tools that hook a module's input (such as FlopCounterMode) cannot hook
            # the leaf with respect to which autograd.grad differentiates.
            logits = self.forward(x.view_as(x))
            losses = loss(logits, target)
            g, *weight_gradients = input_gradient(losses.sum(), x, weights)
        if weights:
            self.weight_gradients = tuple(weight_gradients)
        return logits.detach(), losses.detach(), g.to(z.dtype)

    @contextmanager
    def _for_input_alone(self) -> Iterator[None]:
        """Context manager: inside, backward passes need not reach the weights."""
        with without_gradients(self._frozen), for_input_gradients(self._batch_norms):
            yield


def input_gradient(
    output: Tensor, x: Tensor, weights: Sequence[Tensor] = (), **options: Any
) -> tuple[Tensor, ...]:
    """``torch.autograd.grad(output, [x, *weights])`` with clear errors.

    Raises:
        ValueError: the output does not depend on ``x``.
        RuntimeError: the model uses a checkpoint that supports ``backward()`` alone.
    """
    gradients: tuple[Tensor, ...] = (None,)  # type: ignore[assignment]
    if output.requires_grad:
        try:
            gradients = torch.autograd.grad(output, [x, *weights], allow_unused=True, **options)
        except RuntimeError as error:
            if "checkpoint" not in str(error).lower():
                raise
            raise RuntimeError(
                "the model calls torch.utils.checkpoint with use_reentrant=True, which does not"
                " support gradients of the input alone; set use_reentrant=False there"
            ) from error
    if gradients[0] is None:
        raise ValueError(
            "the model's logits do not depend on its input through autograd, so there is no"
            " gradient to climb; does its forward pass detach, or run under torch.no_grad()?"
        )
    return gradients


@contextmanager
def without_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Context manager: inside, the parameters require no gradients."""
    required = [p for p in parameters if p.requires_grad]
    try:
        for p in required:
            p.requires_grad = False
        yield
    finally:
        for p in required:
            p.requires_grad = True


@contextmanager
def uncached_autocast(device_type: str) -> Iterator[None]:
    """The surrounding autocast, if any, without its cache of weights cast to low precision.

    A pass without gradients would cache weights that are detached from their parameters, and the
    caller's training pass would reuse them.
    """
    available = torch.amp.is_autocast_available(device_type)
    if not available or not torch.is_autocast_enabled(device_type):
        yield
        return
    dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, dtype=dtype, cache_enabled=False):
        yield


def _is_compiled(model: nn.Module) -> bool:
    """Whether any part of the model is compiled, by torch.compile or by its compile() method."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
