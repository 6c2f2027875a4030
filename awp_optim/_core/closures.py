"""A check that a closure zeroes the gradients, so that several passes do not add up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from awp_optim._core.dtensors import is_dtensor, local_part

__all__ = ["GradientsNotZeroedError", "refuse_accumulation"]


class GradientsNotZeroedError(RuntimeError):
    """A closure added its gradients to existing ones."""

    def __init__(self) -> None:
        super().__init__(
            "the closure did not zero the gradients, so those at w and at w + v would add up: call "
            "zero_grad() in it. To accumulate gradients, as with Lightning's "
            "accumulate_grad_batches, call first_step() and second_step() yourself, or let the "
            "closure process all batches of the update. The weights are not perturbed, and the "
            "gradients have been cleared"
        )


@contextmanager
def refuse_accumulation(params: Iterable[Tensor]) -> Iterator[None]:
    """Context manager: a backward pass inside may not add to gradients that existed before.

    Raises:
        GradientsNotZeroedError: before a backward pass adds to such a gradient; or on exit for
            parameters sharded by ``fully_shard``, whose gradients autograd does not accumulate.
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
    """How often a gradient was written to in place, zeroing included."""
    return local_part(grad)._version
