"""Losses that an attack maximizes: one number per example, larger if worse for the defender.

Each is a pure function ``loss(logits, target)`` that returns a tensor of shape (N,), in float32 or
float64. The logits have shape (N, C). The target holds class indices, int64 of shape (N,); for
:func:`ce` also class probabilities; for :func:`kl` and :func:`score` the clean logits.
A custom loss has the same signature, and its target is what the user passes to the attack as ``y``.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

import torch
import torch.nn.functional as F
from torch import Tensor

from awp_optim._utils.checks import check_choice, describe
from awp_optim.attacks.balls import at_least_float32

Loss = Callable[[Tensor, Tensor], Tensor]


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, -log p_y; for class probabilities, its expectation -sum_k y_k log p_k.

    Args:
        logits: shape (N, C).
        y: class indices, shape (N,), or probabilities, floating-point, shape (N, C).

    >>> ce(torch.zeros(1, 4), torch.tensor([2]))
    tensor([1.3863])
    """
    z = at_least_float32(logits)
    return F.cross_entropy(z, y.to(z.dtype) if y.is_floating_point() else y, reduction="none")


def kl(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(p_clean || p_adv), maximized by the attack of TRADES (Zhang et al., ICML 2019): Eq. (16).

    Args:
        logits: at the adversarial example, shape (N, C).
        clean_logits: at the clean example, shape (N, C); no gradient flows into them. The loss has
            its minimum where both are equal, so its gradient there is zero.
    """
    log_p_adv = at_least_float32(logits).log_softmax(1)
    log_p_clean = at_least_float32(clean_logits).detach().log_softmax(1)
    return F.kl_div(log_p_adv, log_p_clean, reduction="none", log_target=True).sum(1)


def score(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """|p_adv - p_clean|^2, maximized by the attack of SCORE (Pang et al., ICML 2022).

    Args:
        logits: at the adversarial example, shape (N, C).
        clean_logits: at the clean example, shape (N, C), as for :func:`kl`.

    >>> score(torch.tensor([[0.0, 0.0]]), torch.tensor([[100.0, 0.0]]))
    tensor([0.5000])
    """
    p_adv = at_least_float32(logits).softmax(1)
    return (p_adv - at_least_float32(clean_logits).detach().softmax(1)).square().sum(1)


def cw(logits: Tensor, y: Tensor) -> Tensor:
    """The margin of Carlini & Wagner (S&P 2017), max_{k != y} z_k - z_y: positive when fooled.

    Raises:
        ValueError: there are fewer than 2 classes.

    >>> cw(torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([1]))
    tensor([-3.])
    """
    _check_classes(logits, 2, "cw")
    z = at_least_float32(logits)
    y = y.unsqueeze(1)
    rival = z.scatter(1, y, -torch.inf).amax(1)
    return rival - z.gather(1, y).squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein, ICML 2020, Eq. 6), invariant to scaling.

    ``-(z_y - max_{k != y} z_k) / (z_pi1 - z_pi3)``, where pi sorts the logits in descending order.

    Raises:
        ValueError: there are fewer than 3 classes.

    >>> dlr(torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([1]))
    tensor([-0.7500])
    """
    _check_classes(logits, 3, "dlr")
    top = at_least_float32(logits).topk(3, dim=1).values
    return cw(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)  # as in the authors' code


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Difference of logits ratio toward a target class t (Croce & Hein, Eq. 7).

    ``-(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2)``, where pi sorts the logits in descending order.

    Args:
        logits: shape (N, C).
        y: class indices, shape (N,).
        target: class indices t, shape (N,).

    Raises:
        ValueError: there are fewer than 4 classes.

    >>> dlr_targeted(torch.tensor([[1.0, 5.0, 2.0, 0.0]]), torch.tensor([1]), torch.tensor([2]))
    tensor([-0.6667])
    """
    _check_classes(logits, 4, "dlr-targeted")
    z = at_least_float32(logits)
    top = z.topk(4, dim=1).values
    z_y, z_t = (z.gather(1, c.unsqueeze(1)).squeeze(1) for c in (y, target))
    return (z_t - z_y) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def _check_classes(logits: Tensor, least: int, name: str) -> None:
    if logits.shape[1] < least:
        raise ValueError(
            f"loss {name!r} compares {least} classes or more, but the model has"
            f" {logits.shape[1]}; use loss='ce'"
        )


LOSSES: dict[str, Loss] = {"ce": ce, "kl": kl, "score": score, "cw": cw, "dlr": dlr}


class Labels(Enum):
    """The labels that an attack accepts as ``y``."""

    INDICES = auto()  # class indices, (N,)
    CLASSES = auto()  # class indices, (N,), or probabilities, (N, C)
    OPTIONAL = auto()  # the same or None: the loss does not use them
    ANY = auto()  # any tensor with N rows, for a custom loss


_LABELS = {
    "ce": Labels.CLASSES,
    "kl": Labels.OPTIONAL,
    "score": Labels.OPTIONAL,
    "cw": Labels.INDICES,
    "dlr": Labels.INDICES,
}


def labels_of(loss: str | Loss) -> Labels:
    """The labels that a loss accepts as ``y``."""
    return _LABELS.get(loss, Labels.INDICES) if isinstance(loss, str) else Labels.ANY


def compares_with_clean(loss: str | Loss) -> bool:
    """Whether the target is the clean logits; the loss then has its minimum at the clean example.

    Its gradient there is zero, so an attack must start elsewhere.
    """
    return labels_of(loss) is Labels.OPTIONAL


def check_loss(loss: object) -> None:
    """Check a setting that is the name of a loss or a function ``loss(logits, target)``."""
    if not callable(loss):
        check_choice("loss", loss, LOSSES)


def loss_function(loss: str | Loss) -> Loss:
    """The loss with this name; a custom loss, with a check of its return value."""
    if isinstance(loss, str):
        return LOSSES[loss]

    def checked(output: Tensor, target: Tensor) -> Tensor:
        losses = loss(output, target)
        if not isinstance(losses, Tensor) or losses.shape != (len(output),):
            raise ValueError(
                f"loss(logits, target) must return one number for each example, shape"
                f" ({len(output)},), got {describe(losses)}; do not reduce over the batch"
            )
        return losses

    return checked
