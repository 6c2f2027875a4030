"""Training losses of adversarial training, as functions of logits.

The lower-case functions are means over the batch, differentiable with respect to all logits. The
upper-case classes of the same names combine a loss with its settings and with what a training step
must know about it. They are values: equal if their settings are equal.

Labels are class indices, int64 of shape (N,), or class probabilities, floating-point of shape
(N, C), as from mixup. The loss for probabilities is the expectation, ``sum_k y_k loss(k)``.

Label smoothing s replaces y by ``(1 - s) y + s / C`` in the cross-entropy term -log p_y and nowhere
else (Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR 2016; in
adversarial training: Pang et al., "Bag of tricks for adversarial training", ICLR 2021,
https://arxiv.org/abs/2010.00467). The loss that the attack maximizes is not smoothed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AT", "MART", "TRADES", "Objective", "at", "mart", "trades"]


def at(logits_adv: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of adversarial examples: Eq. (1) of the paper with the loss of Madry et al.

    Args:
        logits_adv: shape (N, C), the logits at the adversarial examples.
        y: class indices, shape (N,), or probabilities, shape (N, C).
        label_smoothing: applied to the cross-entropy, in [0, 1).

    Returns:
        A scalar, the mean over the batch.

    Raises:
        ValueError: probabilities do not have the shape of the logits, or ``label_smoothing`` is out
            of range.

    >>> at(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    tensor(0.6931)
    """
    return _cross_entropy(logits_adv, y, label_smoothing)


def trades(
    logits_adv: Tensor,
    logits_nat: Tensor,
    y: Tensor,
    beta: float = 6.0,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """TRADES (Zhang et al., 2019), Eq. (2): ``CE(f(x), y) + beta KL(f(x) || f(x'))``.

    Args:
        logits_adv: shape (N, C), at the adversarial examples x'.
        logits_nat: shape (N, C), at the natural examples x.
        y: class indices, shape (N,), or probabilities, shape (N, C).
        beta: weight of robustness against natural accuracy, >= 0.
        label_smoothing: applied to the cross-entropy, in [0, 1).

    Returns:
        A scalar, the mean over the batch.

    Raises:
        ValueError: as for :func:`at`.
    """
    natural = _cross_entropy(logits_nat, y, label_smoothing)
    return natural + beta * _kl(logits_nat, logits_adv).mean()


def mart(
    logits_adv: Tensor,
    logits_nat: Tensor,
    y: Tensor,
    lam: float = 6.0,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """MART (Wang et al., 2020), Eq. (3): ``BCE(f(x'), y) + lam KL(f(x) || f(x')) (1 - f(x)_y)``.

    The boosted cross-entropy is ``BCE = -log p_y - log(1 - max_{k != y} p_k)`` with p = f(x'),
    computed from log-probabilities, so that it stays finite if p_k rounds to 1.

    Args:
        logits_adv: shape (N, C), C >= 2, at the adversarial examples x'.
        logits_nat: shape (N, C), at the natural examples x.
        y: class indices, shape (N,), or probabilities, shape (N, C).
        lam: weight of the divergence, >= 0.
        label_smoothing: applied to -log p_y, in [0, 1).

    Returns:
        A scalar, the mean over the batch.

    Raises:
        ValueError: as for :func:`at`.
    """
    _check_smoothing(label_smoothing)
    y = _checked(y, logits_adv)
    log_p, p_nat = F.log_softmax(logits_adv, 1), F.softmax(logits_nat, 1)
    if y.is_floating_point():
        cross_entropy = -(y * log_p).sum(1)
        # The second class rivals the top class; the top class rivals every other one.
        top, second = torch.split(log_p.topk(2, dim=1).indices, 1, dim=1)
        y_top, y_others = y.gather(1, top).squeeze(1), y.scatter(1, top, 0).sum(1)
        log_rest = y_top * _log_rest(log_p, second) + y_others * _log_rest(log_p, top)
        doubt = (y * (1 - p_nat)).sum(1)
    else:
        cross_entropy = F.nll_loss(log_p, y, reduction="none")
        is_y = F.one_hot(y, log_p.shape[1]).bool()
        rival = log_p.masked_fill(is_y, -torch.inf).argmax(1, keepdim=True)
        log_rest = _log_rest(log_p, rival)
        doubt = 1 - p_nat.gather(1, y[:, None]).squeeze(1)
    if label_smoothing:
        cross_entropy = (1 - label_smoothing) * cross_entropy - label_smoothing * log_p.mean(1)
    return (cross_entropy - log_rest + lam * _kl(logits_nat, logits_adv) * doubt).mean()


def _log_rest(log_p: Tensor, k: Tensor) -> Tensor:
    """log(1 - p_k) for class indices k of shape (N, 1), from the sum over the other classes."""
    return log_p.scatter(1, k, -torch.inf).logsumexp(1)


def _cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    _check_smoothing(label_smoothing)
    return F.cross_entropy(logits, _checked(y, logits), label_smoothing=label_smoothing)


def _kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) of each example, shape (N,)."""
    log_p, log_q = F.log_softmax(logits_p, 1), F.log_softmax(logits_q, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def _checked(y: Tensor, logits: Tensor) -> Tensor:
    """Class indices unchanged; probabilities in the dtype of the logits, at least float32."""
    if not y.is_floating_point():
        return y
    if y.shape != logits.shape:
        raise ValueError(
            f"y is floating-point, so it must hold class probabilities, with the shape of the"
            f" logits, {tuple(logits.shape)}, got shape {tuple(y.shape)}; class indices must be"
            f" integers, y.long()"
        )
    return y.to(torch.promote_types(logits.dtype, torch.float32))


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")


class Objective(Protocol):
    """A loss of the logits at the adversarial examples and, if needed, at the natural ones."""

    needs_natural: ClassVar[bool]
    """Whether the loss uses the logits at the natural examples."""

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class AT:
    """Adversarial training (Madry et al., 2018): see :func:`at` for the settings."""

    label_smoothing: float = 0.0

    needs_natural: ClassVar[bool] = False
    attack_loss: ClassVar[str] = "ce"

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor:
        return at(logits_adv, y, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class TRADES:
    """TRADES, whose attack maximizes the divergence, Eq. (16): see :func:`trades`."""

    beta: float = 6.0
    label_smoothing: float = 0.0

    needs_natural: ClassVar[bool] = True
    attack_loss: ClassVar[str] = "kl"

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor:
        assert logits_nat is not None  # needs_natural
        s = self.label_smoothing
        return trades(logits_adv, logits_nat, y, self.beta, label_smoothing=s)


@dataclass(frozen=True)
class MART:
    """MART, which weights misclassified examples; its attack is AT's: see :func:`mart`."""

    lam: float = 6.0
    label_smoothing: float = 0.0

    needs_natural: ClassVar[bool] = True
    attack_loss: ClassVar[str] = "ce"

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor:
        assert logits_nat is not None  # needs_natural
        return mart(logits_adv, logits_nat, y, self.lam, label_smoothing=self.label_smoothing)
