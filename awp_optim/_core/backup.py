"""The unperturbed weights, kept while the model holds perturbed ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Snapshot", "WeightBackup"]


class _Saved(NamedTuple):
    """Tensors that hold w + v, and the buffers that hold their w."""

    params: list[Tensor]
    weights: list[Tensor]
    foreach: bool


class Snapshot(NamedTuple):
    """The state of a :class:`WeightBackup` on the host: all of it but the weights' values."""

    is_perturbed: bool
    weights: dict[Tensor, Tensor]
    saved: list[_Saved]


NOT_PERTURBED = Snapshot(is_perturbed=False, weights={}, saved=[])


class WeightBackup:
    """Whether the weights are perturbed, and the unperturbed weights w if they are.

    Each parameter gets one buffer, allocated when the parameter is first perturbed and reused from
    then on. For a DTensor, the buffer holds the local part.

    Attributes:
        is_perturbed: whether some weights may be at w + v.
        weights: w of each parameter that is currently perturbed, by parameter.
        buffers: the buffer of each parameter that was ever perturbed, by parameter.
    """

    def __init__(self) -> None:
        self.is_perturbed = False
        self.weights: dict[Tensor, Tensor] = {}
        self.buffers: dict[Tensor, Tensor] = {}
        self._saved: list[_Saved] = []
        self._contexts = 0

    @torch.no_grad()
    def save(self, params: list[Tensor], parts: list[Tensor], *, foreach: bool) -> None:
        """Copy the weights of parameters that are not perturbed yet into their buffers.

        Args:
            params: the parameters.
            parts: their local parts if they are DTensors; otherwise the parameters themselves.
            foreach: copy all of them in one call.

        Raises:
            RuntimeError: another optimizer has perturbed one of them.
        """
        self._refuse_shared(params)
        new = [(p, part) for p, part in zip(params, parts, strict=True) if p not in self.weights]
        if not new:
            return
        buffers = [self._buffer(p, part) for p, part in new]
        saved = _Saved([part for _, part in new], buffers, foreach)
        _copy_(saved.weights, saved.params, foreach=foreach)
        _in_use.add(self)
        self._saved.append(saved)
        self.weights.update(zip((p for p, _ in new), buffers, strict=True))

    @torch.no_grad()
    def restore(self) -> None:
        """Copy w back, bit for bit; does nothing if the weights are not perturbed.

        Raises:
            RuntimeError: a parameter changed shape while it was perturbed. All others are restored,
                and this one no longer counts as perturbed.
        """
        if not self.is_perturbed:
            return
        changed: list[str] = []
        for params, weights, foreach in self._saved:
            try:
                _copy_(params, weights, foreach=foreach)
            except RuntimeError:
                changed += _copy_matching(params, weights)
        self.forget()
        torch.clear_autocast_cache()  # it may hold low-precision copies of the perturbed weights
        if changed:
            raise RuntimeError(
                f"parameters changed shape while they were perturbed: {', '.join(changed)}. Their "
                "unperturbed values are lost; all other weights are restored"
            )

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Context manager: an exception inside restores the weights."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    @contextmanager
    def restored_on_exit(self) -> Iterator[None]:
        """Context manager: leaving it (the outermost one, if nested) restores the weights."""
        self._contexts += 1
        try:
            yield
        finally:
            self._contexts -= 1
            if not self._contexts:
                self.restore()

    def snapshot(self) -> Snapshot:
        """The current state on the host, for a later :meth:`reinstate`."""
        return Snapshot(self.is_perturbed, dict(self.weights), list(self._saved))

    def reinstate(self, snapshot: Snapshot) -> None:
        """Set the state on the host. The caller makes sure that the weights match it."""
        self.is_perturbed = snapshot.is_perturbed
        self.weights, self._saved = dict(snapshot.weights), list(snapshot.saved)
        (_in_use.add if self._saved else _in_use.discard)(self)

    def forget(self) -> None:
        """Mark all parameters as unperturbed, without copying any weights."""
        self.reinstate(NOT_PERTURBED)

    def _refuse_shared(self, params: Iterable[Tensor]) -> None:
        for other in list(_in_use):
            if other is not self and any(p in other.weights for p in params):
                raise RuntimeError(
                    "another AWP optimizer has perturbed these parameters: call second_step() or "
                    "restore() on it first"
                )

    def _buffer(self, p: Tensor, part: Tensor) -> Tensor:
        buffer = self.buffers.get(p)
        if (
            buffer is None
            or buffer.dtype is not part.dtype
            or buffer.shape != part.shape
            or buffer.device != part.device
        ):
            with torch.inference_mode(False):  # the buffer outlives an inference mode
                buffer = self.buffers[p] = torch.empty_like(part)
        return buffer


_in_use: weakref.WeakSet[WeightBackup] = weakref.WeakSet()
"""The backups that hold weights, to detect optimizers that perturb the same parameters."""


def _copy_(targets: list[Tensor], sources: list[Tensor], *, foreach: bool) -> None:
    if foreach:
        torch._foreach_copy_(targets, sources)
    else:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def _copy_matching(params: list[Tensor], weights: list[Tensor]) -> list[str]:
    """Copy w where the shapes match; return how the other shapes changed."""
    changed = []
    for p, w in zip(params, weights, strict=True):
        if p.shape == w.shape:
            p.copy_(w)
        else:
            changed.append(f"{tuple(w.shape)} -> {tuple(p.shape)}")
    return changed
