"""PGD with the margin loss of Carlini & Wagner."""

from __future__ import annotations

from dataclasses import dataclass, field

from awp_optim.attacks.pgd import PGD

STEPS_PER_RADIUS = {"linf": 4, "l2": 8}
"""The default step is 2/255 for a radius of 8/255 in L_inf, and 16/255 for 128/255 in L_2."""


@dataclass(frozen=True, repr=False)
class CW(PGD):
    """PGD on the margin ``max_{k != y} z_k - z_y``, which is above zero once the model is fooled.

    Wu et al., "Adversarial weight perturbation helps robust generalization" (NeurIPS 2020,
    Section 5.2) call it CW_inf, "L_inf version of CW loss optimized by PGD-100"; here it is also
    available in L_2. The margin is from Carlini & Wagner, "Towards evaluating the robustness of
    neural networks" (S&P 2017, f_6 without its threshold), who search for the smallest
    perturbation instead. It is ``PGD(loss="cw")`` with settings for evaluation, at the same cost.
    See :meth:`Attack.__call__` for how to call it; labels are class indices.

    Args:
        eps: radius of the ball, at least 0, in the units of the input. With 0 the clean examples
            are returned and the model is not called.
        step_size: length of a step in the same norm, above 0; None means ``eps / 4`` in L_inf, as
            in the paper, and ``eps / 8`` in L_2.
        steps: at least 0. With 0 the random start is returned.
        norm: "linf" or "l2".
        random_start: start at a random point of the ball, not at the clean example.
        restarts: number of random starts, at least 1. Each example keeps its worst outcome.
        clip: the box (lo, hi) of valid inputs, or None for no box.
        model_mode: "eval" or "train", the mode in which the model is attacked.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or ``random_start=False`` is combined with several
            restarts, which would all be the same; when called, the model has a single class.

    >>> import torch
    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    >>> CW(eps=0.1)(lambda x: x * 3, x, y)
    tensor([[0.4000, 0.6000]])
    """

    step_size: float | None = None  # type: ignore[assignment]
    steps: int = 100
    loss: str = field(default="cw", init=False, repr=False)
    start_std: float | None = field(default=None, init=False, repr=False)

    def _check_step_size(self) -> None:
        if self.step_size is not None:
            super()._check_step_size()

    @property
    def _step_length(self) -> float:
        if self.step_size is None:
            return self.eps / STEPS_PER_RADIUS[self.norm]
        return self.step_size
