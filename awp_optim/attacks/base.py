"""The base classes of all attacks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from awp_optim._utils.batches import plain
from awp_optim._utils.checks import check_choice, check_real, is_integer
from awp_optim._utils.model_state import in_mode
from awp_optim.attacks._inputs import check_box, check_inputs, check_labels
from awp_optim.attacks.balls import BALLS, Ball, Projection, at_least_float32
from awp_optim.attacks.losses import Labels
from awp_optim.attacks.oracle import MODEL_MODES, Model, ModelOracle

__all__ = ["Attack", "BallAttack"]


class Attack(ABC):
    """An immutable attack: ``x_adv = attack(model, x, y)``.

    A subclass is a frozen dataclass that implements :meth:`run`. It declares the two fields below
    itself, so that it decides on the order of its arguments.

    Attributes:
        clip: the box (lo, hi) of valid inputs, or None for no box.
        model_mode: "eval" or "train", the mode in which the model is attacked.
    """

    clip: tuple[float, float] | None
    model_mode: str

    def __post_init__(self) -> None:
        """Check and normalize the settings; subclasses extend this."""
        check_choice("model_mode", self.model_mode, MODEL_MODES)
        if self.clip is not None:
            self._set("clip", check_box(self.clip))

    @property
    def uses_gradients(self) -> bool:
        """Whether the attack uses gradients of the model."""
        return True

    @property
    def labels(self) -> Labels:
        """What the attack accepts as ``y``."""
        return Labels.INDICES

    def __call__(self, model: Model, x: Tensor, y: Tensor | None) -> Tensor:
        """Compute adversarial examples for a batch.

        The attack differentiates the loss, summed over the batch, with respect to the input only.
        An example's perturbation does not depend on the other examples, unless the model mixes
        them, as BatchNorm does in train mode. No value is read back from an accelerator. A
        surrounding autocast applies; a surrounding ``no_grad`` or ``inference_mode`` does not.

        Args:
            model: maps inputs in ``clip`` to logits of shape (N, C). Normalization is one of its
                layers. A module is put in ``model_mode`` during the call. Afterwards, also after an
                exception, the mode of each submodule, ``requires_grad``, ``.grad``, hooks, and in
                eval mode the buffers are as before. In train mode, BatchNorm updates its running
                statistics in every forward pass. The mode of any other callable is not set.
            x: the clean examples, float64, float32, bfloat16 or float16, shape (N, ...). They are
                not modified.
            y: on the device of ``x``. Class indices of any integer dtype, shape (N,); or class
                probabilities, as from mixup, of any dtype that ``x`` may have, shape (N, C), for
                which the expected loss is used. ``loss="cw"`` and "dlr" need indices, "kl" and
                "score" need no labels (None). A custom loss gets ``y`` unchanged, any tensor with N
                rows.

        Returns:
            The adversarial examples, detached, with the shape, dtype, device and memory format of
            ``x``.

        Raises:
            TypeError: ``x``, ``y`` or the model's output is of the wrong type.
            ValueError: their shapes or devices do not match; or (checked only on the CPU, where
                reading values is free) ``x`` is outside ``clip``, a label is not among the model's
                classes, or probabilities are negative, not finite or do not sum to 1.
        """
        with self._access(model, x, y) as oracle:
            return self._attack(oracle)

    def check_inputs(self, x: Tensor, y: Tensor | None) -> None:
        """Raise the errors that :meth:`__call__` raises for an invalid batch."""
        check_inputs(x, self.clip)
        check_labels(y, x, self.labels)

    @contextmanager
    def _access(self, model: Model, x: Tensor, y: Tensor | None) -> Iterator[ModelOracle]:
        """Yield an oracle: the model in ``model_mode``, and the batch as detached tensors."""
        self.check_inputs(x, y)
        with torch.inference_mode(mode=False), torch.no_grad(), in_mode(model, self.model_mode):
            x, y = plain(x), None if y is None else plain(y)
            if y is not None and is_integer(y) and self.labels is not Labels.ANY:
                y = y.long()
            yield ModelOracle(model, x, y, self.labels)

    def _attack(self, oracle: ModelOracle) -> Tensor:
        x = oracle.x
        if x.numel() == 0:
            return x.clone()
        return oracle.as_input(self.run(oracle, at_least_float32(x), oracle.y))

    @abstractmethod
    def run(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the adversarial examples, a new tensor; called under ``no_grad``.

        ``x`` is not empty, and is float32 or float64, because half precision would lose short
        steps. The result is rounded toward the caller's ``x``.
        """

    def _set(self, name: str, value: Any) -> None:
        """Assign a normalized setting of the frozen dataclass, in ``__post_init__``."""
        object.__setattr__(self, name, value)


class BallAttack(Attack):
    """An attack within the ball of radius ``eps`` around the clean example and the box ``clip``.

    A subclass declares the fields below along with its own and implements :meth:`_search`.

    Attributes:
        eps: radius of the ball, in the units of the input.
        norm: one of ``norms``.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    eps: float
    norm: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if callable(self.eps):  # a model: the class was called like an attack
            name = type(self).__name__
            raise TypeError(
                f"{name} takes its settings first, then the model: {name}(eps=...)(model, x, y)"
            )
        self._set("eps", check_real("eps", self.eps))
        if self.eps < 0:
            raise ValueError(f"eps must not be negative, got {self.eps!r}")
        check_choice("norm", self.norm, self.norms)
        if self.norm == "linf" and self.clip and self.eps > self.clip[1] - self.clip[0]:
            raise ValueError(
                f"eps={self.eps:g} is more than the width of the box clip={self.clip}; eps is in"
                f" the units of the input: for images in [0, 1], 8 of 255 levels are eps=8/255"
            )

    @property
    def _ball(self) -> Ball:
        return BALLS[self.norm]

    def _projection(self, x: Tensor) -> Projection:
        """The projection onto the ball around ``x`` and the box."""
        return self._ball.projection(x, self.eps, self.clip)

    def run(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        return x.clone() if self.eps == 0 else self._search(oracle, x, y)

    @abstractmethod
    def _search(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the adversarial examples, like :meth:`Attack.run`, for a positive ``eps``."""
