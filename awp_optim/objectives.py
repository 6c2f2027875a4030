"""What adversarial training minimises, as functions of logits.

Lower-case functions are the losses, means over the batch, differentiable in all their logits. The
classes of the same name in capitals bundle a loss with its settings and with what a training step
must know about it. Every one is a value: equal if its settings are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AT", "MART", "TRADES", "Objective", "at", "mart", "trades"]


def at(logits_adv: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of adversarial examples: Eq. (1) of the paper with Madry et al.'s loss.

    Args:
        logits_adv: shape (N, C), the logits at the adversarial examples.
        y: shape (N,), class indices.

    Returns:
        A scalar, the mean over the batch.

    Example:
        >>> at(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
        tensor(0.6931)
    """
    return F.cross_entropy(logits_adv, y)


def trades(logits_adv: Tensor, logits_nat: Tensor, y: Tensor, beta: float = 6.0) -> Tensor:
    """TRADES (Zhang et al., 2019), Eq. (2): ``CE(f(x), y) + beta KL(f(x) || f(x'))``.

    Args:
        logits_adv: shape (N, C), at the adversarial examples x'.
        logits_nat: shape (N, C), at the natural examples x.
        y: shape (N,), class indices.
        beta: weight of robustness against natural accuracy, >= 0.

    Returns:
        A scalar, the mean over the batch.
    """
    return F.cross_entropy(logits_nat, y) + beta * _kl(logits_nat, logits_adv).mean()


def mart(logits_adv: Tensor, logits_nat: Tensor, y: Tensor, lam: float = 6.0) -> Tensor:
    """MART (Wang et al., 2020), Eq. (3): ``BCE(f(x'), y) + lam KL(f(x) || f(x')) (1 - f(x)_y)``.

    The boosted cross-entropy is ``BCE = -log p_y - log(1 - max_{k != y} p_k)`` with p = f(x'),
    computed from log-probabilities, so that it stays finite where p_k rounds to 1.

    Args:
        logits_adv: shape (N, C), C >= 2, at the adversarial examples x'.
        logits_nat: shape (N, C), at the natural examples x.
        y: shape (N,), class indices.
        lam: weight of the divergence, >= 0.

    Returns:
        A scalar, the mean over the batch.
    """
    log_p = F.log_softmax(logits_adv, 1)
    is_y = F.one_hot(y, log_p.shape[1]).bool()
    rival = log_p.masked_fill(is_y, -torch.inf).argmax(1, keepdim=True)
    # log(1 - p_k) is the log of what all the other classes have together.
    log_rest = log_p.scatter(1, rival, -torch.inf).logsumexp(1)
    boosted = F.nll_loss(log_p, y, reduction="none") - log_rest
    p_nat_y = F.softmax(logits_nat, 1).gather(1, y[:, None]).squeeze(1)
    return (boosted + lam * _kl(logits_nat, logits_adv) * (1 - p_nat_y)).mean()


def _kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) of each example, shape (N,)."""
    log_p, log_q = F.log_softmax(logits_p, 1), F.log_softmax(logits_q, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


class Objective(Protocol):
    """A loss of the logits at adversarial and, where it needs them, at natural examples."""

    needs_natural: ClassVar[bool]
    """Whether the loss also looks at the logits of the unperturbed inputs."""

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class AT:
    """Adversarial training (Madry et al., 2018): cross-entropy of adversarial examples."""

    needs_natural: ClassVar[bool] = False
    attack_loss: ClassVar[str] = "ce"

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor:
        return at(logits_adv, y)


@dataclass(frozen=True)
class TRADES:
    """TRADES: natural cross-entropy and the divergence that its attack maximises, Eq. (16)."""

    beta: float = 6.0

    needs_natural: ClassVar[bool] = True
    attack_loss: ClassVar[str] = "kl"

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor:
        assert logits_nat is not None  # needs_natural
        return trades(logits_adv, logits_nat, y, self.beta)


@dataclass(frozen=True)
class MART:
    """MART: misclassified examples weigh more; its attack maximises cross-entropy, Eq. (17)."""

    lam: float = 6.0

    needs_natural: ClassVar[bool] = True
    attack_loss: ClassVar[str] = "ce"

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor:
        assert logits_nat is not None  # needs_natural
        return mart(logits_adv, logits_nat, y, self.lam)
