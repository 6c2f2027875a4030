"""The fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from awp_optim.attacks.gradient_ascent import GradientAscentAttack
from awp_optim.attacks.losses import Loss, compares_with_clean
from awp_optim.attacks.oracle import ModelOracle


@dataclass(frozen=True, repr=False)
class FGSM(GradientAscentAttack):
    """One step of length eps from the clean example: x + eps * sign(g), or eps * g/|g| in L_2.

    Goodfellow et al., "Explaining and harnessing adversarial examples" (ICLR 2015); Eq. (13) of
    Wu et al., "Adversarial weight perturbation helps robust generalization" (NeurIPS 2020). It
    costs one forward and one backward pass. See :meth:`Attack.__call__` for how to call it.

    Args:
        eps: radius of the ball, at least 0, in the units of the input.
        norm: "linf" or "l2".
        loss: the loss to maximize, "ce", "cw", "dlr" or a function ``loss(logits, target)``, as in
            :class:`PGD`. Not "kl" or "score", whose gradient is zero at the clean
            example.
        clip: the box (lo, hi) of valid inputs, or None for no box.
        model_mode: "eval" or "train", the mode in which the model is attacked.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    >>> import torch
    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    >>> FGSM(eps=0.1)(lambda x: x * 3, x, y)
    tensor([[0.4000, 0.6000]])
    """

    eps: float = 8 / 255
    norm: str = "linf"
    loss: str | Loss = "ce"
    clip: tuple[float, float] | None = (0, 1)
    model_mode: str = "eval"

    def __post_init__(self) -> None:
        super().__post_init__()
        if compares_with_clean(self.loss):
            raise ValueError(
                f"FGSM starts at the clean example, where the gradient of loss={self.loss!r} is"
                " zero; use PGD, which starts at a random point"
            )

    @property
    def gradient_passes(self) -> int:
        return 1

    def _search(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        target, project = self._target(oracle, x, y), self._projection(x)
        start = self._start(x, project)
        return self._ascend(oracle, start, target, project, step_size=self.eps, steps=1)
