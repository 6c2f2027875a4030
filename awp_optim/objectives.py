"""Training losses of adversarial training, as functions of logits.

The lower-case functions are means over the batch, differentiable with respect to all logits. The
upper-case classes of the same names combine a loss with its settings and with what a training step
must know about it. They are values: equal if their settings are equal.

Labels are class indices, int64 of shape (N,), or class probabilities, floating-point of shape
(N, C), as from mixup. The loss for probabilities is the expectation, ``sum_k y_k loss(k)``.

Label smoothing s replaces y by ``(1 - s) y + s / C`` in the cross-entropy term -log p_y, or in
SCORE's squared error |p - y|^2, and nowhere else (Szegedy et al., "Rethinking the Inception
architecture for computer vision", CVPR 2016; in adversarial training: Pang et al., "Bag of tricks
for adversarial training", ICLR 2021, https://arxiv.org/abs/2010.00467). The loss that the attack
maximizes is not smoothed.

Half-precision logits are converted to float32 first: in bfloat16, the divergence of two close
predictions would be mostly rounding, and could be negative.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "AT",
    "GKL",
    "MART",
    "SCORE",
    "TRADES",
    "Objective",
    "at",
    "gkl",
    "mart",
    "score",
    "trades",
]


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
    logits_adv, logits_nat = _at_least_float32(logits_adv), _at_least_float32(logits_nat)
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


def gkl(
    logits_adv: Tensor,
    logits_nat: Tensor,
    y: Tensor,
    alpha: float = 4.0,
    beta: float = 20.0,
    *,
    class_probs: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """GKL (Cui et al., 2024), ``CE(z, y) + alpha CE(z', p) + beta/2 S(z - z')``.

    The generalized Kullback-Leibler loss, which extends "Decoupled Kullback-Leibler divergence
    loss" (NeurIPS 2024, https://arxiv.org/abs/2305.13948) by weights of classes. z are the natural
    logits, z' the adversarial ones. In the second term p = softmax(z) is constant: no gradient
    flows into z there. The third compares all pairs of classes j, k, with q the weights of the
    example's class::

        S(d) = sum_i sum_jk q_ij q_ik (d_ij - d_ik)^2 / 2 / sum_i s_i^2,    s_i = sum_k q_ik

    If each q sums to 1, this is the mean over the batch of the variance of d under q. It is
    computed from that variance, without the N x C x C differences.

    Args:
        logits_adv: shape (N, C), at the adversarial examples x'.
        logits_nat: shape (N, C), at the natural examples x.
        y: class indices, shape (N,), or probabilities, shape (N, C), which mix the weights q.
        alpha: weight of the cross-entropy with p, >= 0.
        beta: weight of the differences of logits, >= 0.
        class_probs: shape (C, C), row c holds the weights q of class c, >= 0 and not all 0. The
            authors use the mean of softmax(z / 4) over the class in the previous epoch. None means
            1 / C, as in the first epoch.
        label_smoothing: applied to the cross-entropy with y, in [0, 1).

    Returns:
        A scalar, the mean over the batch.

    Raises:
        ValueError: as for :func:`at`, or ``class_probs`` is not of shape (C, C).
    """
    natural = _cross_entropy(logits_nat, y, label_smoothing)
    z_adv, z_nat = _at_least_float32(logits_adv), _at_least_float32(logits_nat)
    imitation = F.cross_entropy(z_adv, z_nat.detach().softmax(1))
    d = z_nat - z_adv
    q = _class_weights(class_probs, y, d)
    s = q.sum(1, keepdim=True)
    from_mean = d - (q * d).sum(1, keepdim=True) / s
    spread = (s * q * from_mean.square()).sum() / s.square().sum()
    return natural + alpha * imitation + beta / 2 * spread


def score(
    logits_adv: Tensor,
    logits_nat: Tensor,
    y: Tensor,
    beta: float = 4.0,
    c: float = 0.0,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """SCORE (Pang et al., 2022), ``|p - y|^2 + beta max(|p' - p|^2 - c, 0)``.

    "Robustness and accuracy could be reconcilable by (proper) definition" (ICML 2022,
    https://arxiv.org/abs/2202.10103) with the squared error, a proper score, in place of
    cross-entropy and divergence; p = f(x), p' = f(x').

    Args:
        logits_adv: shape (N, C), at the adversarial examples x'.
        logits_nat: shape (N, C), at the natural examples x.
        y: class indices, shape (N,), or probabilities, shape (N, C), from which the error is taken
            as it is: the expectation over the labels is larger by a constant.
        beta: weight of robustness against natural accuracy, >= 0.
        c: differences of predictions up to this size are not penalized, >= 0.
        label_smoothing: applied to y, in [0, 1). The authors' smoothing by s is C / (C - 1) s here.

    Returns:
        A scalar, the mean over the batch.

    Raises:
        ValueError: as for :func:`at`.
    """
    _check_smoothing(label_smoothing)
    y = _checked(y, logits_nat)
    p_adv, p = (_at_least_float32(z).softmax(1) for z in (logits_adv, logits_nat))
    target = y if y.is_floating_point() else F.one_hot(y, p.shape[1]).to(p.dtype)
    target = (1 - label_smoothing) * target + label_smoothing / p.shape[1]
    natural = (p - target).square().sum(1).mean()
    return natural + beta * F.relu((p_adv - p).square().sum(1) - c).mean()


def _class_weights(class_probs: Tensor | None, y: Tensor, like: Tensor) -> Tensor:
    """The weights q of each example's class, for probabilities their mean, in ``like``'s shape."""
    classes = like.shape[1]
    if class_probs is None:
        return torch.full_like(like, 1 / classes)
    if class_probs.shape != (classes, classes):
        raise ValueError(
            f"class_probs must have a row of weights for each of the {classes} classes, shape"
            f" ({classes}, {classes}), got shape {tuple(class_probs.shape)}"
        )
    if not y.is_floating_point():
        return class_probs[y].to(like.dtype)
    with torch.autocast(like.device.type, enabled=False):  # it would multiply in low precision
        return y.to(like.dtype) @ class_probs.to(like.dtype)


def _log_rest(log_p: Tensor, k: Tensor) -> Tensor:
    """log(1 - p_k) for class indices k of shape (N, 1), from the sum over the other classes."""
    return log_p.scatter(1, k, -torch.inf).logsumexp(1)


def _cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    _check_smoothing(label_smoothing)
    y = _checked(y, logits)
    return F.cross_entropy(_at_least_float32(logits), y, label_smoothing=label_smoothing)


def _kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) of each example, shape (N,)."""
    log_p, log_q = (F.log_softmax(_at_least_float32(z), 1) for z in (logits_p, logits_q))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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


@dataclass(frozen=True)
class GKL:
    """GKL, whose attack is that of TRADES: see :func:`gkl` for the settings.

    ``class_probs`` may be written to during training, also between steps that are replayed as a
    CUDA graph: they read its current values. It is not compared.
    """

    alpha: float = 4.0
    beta: float = 20.0
    label_smoothing: float = 0.0
    class_probs: Tensor | None = field(default=None, compare=False, repr=False)

    needs_natural: ClassVar[bool] = True
    attack_loss: ClassVar[str] = "kl"

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor:
        assert logits_nat is not None  # needs_natural
        s, probs = self.label_smoothing, self.class_probs
        return gkl(
            logits_adv, logits_nat, y, self.alpha, self.beta, class_probs=probs, label_smoothing=s
        )


@dataclass(frozen=True)
class SCORE:
    """SCORE, whose attack maximizes ``|p' - p|^2``: see :func:`score` for the settings."""

    beta: float = 4.0
    c: float = 0.0
    label_smoothing: float = 0.0

    needs_natural: ClassVar[bool] = True
    attack_loss: ClassVar[str] = "score"

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def __call__(self, logits_adv: Tensor, logits_nat: Tensor | None, y: Tensor) -> Tensor:
        assert logits_nat is not None  # needs_natural
        s = self.label_smoothing
        return score(logits_adv, logits_nat, y, self.beta, self.c, label_smoothing=s)
