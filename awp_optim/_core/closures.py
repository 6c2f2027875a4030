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
    """Context manager: what remains in ``p.grad`` on exit may not include an earlier gradient.

    Backward passes inside may add to one that is then zeroed, such as those of an attack.

    Raises:
        GradientsNotZeroedError: on exit.
    """
    gradients = ((p, p.grad) for p in params if p.requires_grad)
    checks = [_Check(p, g) for p, g in gradients if g is not None and not g.is_inference()]
    try:
        yield
    finally:
        for check in checks:
            check.remove()
    if any(check.fails() for check in checks):
        raise GradientsNotZeroedError


class _Check:
    """Whether ``p.grad`` includes the gradient that it held at first.

    Hooks run before and after autograd accumulates a gradient. The first kind also runs if
    ``torch.autograd.grad`` differentiates by p, which does not accumulate.
    """

    def __init__(self, p: Tensor, grad: Tensor) -> None:
        self._p, self._grad = p, grad
        self._version = _version(grad)
        self._is_met = self._was_added_to = self._was_called = False
        before = p.register_hook(self._before)  # type: ignore[no-untyped-call]
        after = p.register_post_accumulate_grad_hook(self._after)  # type: ignore[no-untyped-call]
        self._hooks = before, after

    def _before(self, _: Tensor) -> None:
        self._was_called = True
        self._is_met = self._p.grad is self._grad and _version(self._grad) == self._version
        self._was_added_to &= self._is_met  # else it has been zeroed in the meantime

    def _after(self, p: Tensor) -> None:
        if self._is_met and p.grad is not None:
            self._was_added_to = True
            self._grad, self._version = p.grad, _version(p.grad)  # create_graph makes a new tensor

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def fails(self) -> bool:
        return self._p.grad is self._grad and (self._was_added_to or self._was_bypassed())

    def _was_bypassed(self) -> bool:
        """Whether something other than autograd, ``fully_shard``, has written to the gradient."""
        is_written = _version(self._grad) != self._version
        return is_dtensor(self._grad) and not self._was_called and is_written


def _version(grad: Tensor) -> int:
    """How often a gradient was written to in place, zeroing included."""
    return local_part(grad)._version
