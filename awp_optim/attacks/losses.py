"""What an attack climbs: losses of logits, one number an example, larger is worse for the defender.

Each is a pure function ``loss(logits, target)`` with ``logits`` of shape (N, C), returning shape
(N,), in float32 at least. The target is the labels, int64 of shape (N,), except for :func:`kl`;
:func:`ce` also takes probabilities.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .balls import at_least_float32

Loss = Callable[[Tensor, Tensor], Tensor]


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, -log p_y; of labels that are probabilities the mean by them.

    Args:
        logits: shape (N, C).
        y: class indices, shape (N,), or probabilities, floating, shape (N, C): -sum_k y_k log p_k.

    >>> ce(torch.zeros(1, 4), torch.tensor([2]))
    tensor([1.3863])
    """
    z = at_least_float32(logits)
    return F.cross_entropy(z, y.to(z.dtype) if y.is_floating_point() else y, reduction="none")


def kl(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(p_clean || p_adv), what TRADES (Zhang et al., ICML 2019) maximises: Eq. (16).

    Args:
        logits: at the perturbed input, shape (N, C).
        clean_logits: at the clean input, shape (N, C); no gradient flows into them. At
            ``logits == clean_logits`` the loss is at its minimum, so its gradient is zero.
    """
    log_p_adv = at_least_float32(logits).log_softmax(1)
    log_p_clean = at_least_float32(clean_logits).detach().log_softmax(1)
    return F.kl_div(log_p_adv, log_p_clean, reduction="none", log_target=True).sum(1)


def cw(logits: Tensor, y: Tensor) -> Tensor:
    """The margin of Carlini & Wagner (S&P 2017), max_{k != y} z_k - z_y: positive when fooled.

    Raises:
        ValueError: there are fewer than 2 classes.

    >>> cw(torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([1]))
    tensor([-3.])
    """
    _need_classes(logits, 2, "cw")
    z = at_least_float32(logits)
    y = y.unsqueeze(1)
    rival = z.scatter(1, y, -torch.inf).amax(1)
    return rival - z.gather(1, y).squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein, ICML 2020, Eq. 6), which no scaling changes.

    ``-(z_y - max_{k != y} z_k) / (z_pi1 - z_pi3)``, pi sorting the logits from the largest down.

    Raises:
        ValueError: there are fewer than 3 classes.

    >>> dlr(torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([1]))
    tensor([-0.7500])
    """
    _need_classes(logits, 3, "dlr")
    top = at_least_float32(logits).topk(3, dim=1).values
    return cw(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)  # the guard of the authors' code


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The same toward one class t (Croce & Hein, Eq. 7).

    ``-(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2)``, pi sorting the logits from the largest down.

    Args:
        logits: shape (N, C).
        y: class indices, shape (N,).
        target: class indices t, shape (N,).

    Raises:
        ValueError: there are fewer than 4 classes.

    >>> dlr_targeted(torch.tensor([[1.0, 5.0, 2.0, 0.0]]), torch.tensor([1]), torch.tensor([2]))
    tensor([-0.6667])
    """
    _need_classes(logits, 4, "dlr-targeted")
    z = at_least_float32(logits)
    top = z.topk(4, dim=1).values
    own, other = (z.gather(1, c.unsqueeze(1)).squeeze(1) for c in (y, target))
    return (other - own) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def _need_classes(logits: Tensor, least: int, name: str) -> None:
    if logits.shape[1] < least:
        raise ValueError(
            f"loss {name!r} compares {least} classes or more, but the model has"
            f" {logits.shape[1]}; use loss='ce'"
        )


LOSSES: dict[str, Loss] = {"ce": ce, "kl": kl, "cw": cw, "dlr": dlr}
