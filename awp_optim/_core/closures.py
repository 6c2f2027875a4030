"""A check that a closure zeroes the gradients, so that those of several passes do not add up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from awp_optim._core.dtensors import is_dtensor, local_part

__all__ = ["GradientsNotZeroedError", "refuse_accumulation"]


class GradientsNotZeroedError(RuntimeError):
    """A closure adds its gradients to those that were there before."""

    def __init__(self) -> None:
        super().__init__(
            "the closure did not zero the gradients, so that those at w and at w + v would add up: "
            "call zero_grad() in it. If it accumulates gradients on purpose, as with Lightning's "
            "accumulate_grad_batches, call first_step() and second_step() yourself, or let the "
            "closure go over all batches of the update. The weights are not perturbed, the "
            "gradients are cleared"
        )


@contextmanager
def refuse_accumulation(params: Iterable[Tensor]) -> Iterator[None]:
    """Inside, a backward pass may not add to the gradients that the parameters have on entry.

    Raises:
        GradientsNotZeroedError: from the backward pass that would, before it does; of parameters
            sharded by ``fully_shard``, which autograd does not see, on leaving.
    """
    gradients = ((p, p.grad) for p in params if p.requires_grad)
    checks = [_Check(p, g) for p, g in gradients if g is not None and not g.is_inference()]
    try:
        yield
    finally:
        for check in checks:
            check.hook.remove()
    if any(check.was_bypassed() for check in checks):
        raise GradientsNotZeroedError


class _Check:
    """A hook that autograd calls before it adds to ``p.grad``."""

    def __init__(self, p: Tensor, grad: Tensor) -> None:
        self._p, self._grad = p, grad
        self._version = _version(grad)
        self._was_called = False
        self.hook = p.register_hook(self)  # type: ignore[no-untyped-call]

    def __call__(self, _: Tensor) -> None:
        self._was_called = True
        if self._p.grad is self._grad and _version(self._grad) == self._version:
            raise GradientsNotZeroedError

    def was_bypassed(self) -> bool:
        """Whether something other than autograd has written to the gradient of a DTensor."""
        is_same = is_dtensor(self._grad) and self._p.grad is self._grad
        return is_same and not self._was_called and _version(self._grad) != self._version


def _version(grad: Tensor) -> int:
    """How often a gradient was written to; zeroing it in place counts."""
    return (local_part(grad) if is_dtensor(grad) else grad)._version
