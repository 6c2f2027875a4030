"""The margin of Carlini & Wagner, climbed inside a ball."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .ascent import BallAttack
from .balls import Projection
from .base import ModelOracle
from .pgd import PGD

SHARES = {"linf": 1 / 4, "l2": 1 / 8}
"""The length of a step that is not given, in radii: 2/255 at 8/255, 16/255 at 128/255."""


@dataclass(frozen=True)
class CW(BallAttack):
    """PGD that climbs the margin ``max_{k != y} z_k - z_y``, above zero once the model is fooled.

    The attack that Wu et al., "Adversarial weight perturbation helps robust generalization"
    (NeurIPS 2020, Section 5.2) call CW_inf, "L_inf version of CW loss optimized by PGD-100", and
    the same in L_2. The margin is that of Carlini & Wagner, "Towards evaluating the robustness of
    neural networks" (S&P 2017, f_6 without its threshold), who search for the smallest change
    instead. It is ``PGD(loss="cw")`` with the settings of an evaluation, at the same cost. How to
    call it: see :meth:`Attack.__call__`; labels are class indices.

    Args:
        eps: radius of the ball, at least 0, in the units of the input. At 0 the input is returned
            as it is and the model is not called.
        step_size: length of a step in the same norm, above 0; None for a quarter of ``eps`` in
            L_inf, as in the paper, and an eighth in L_2.
        steps: at least 0. At 0 the random start is returned.
        norm: "linf" or "l2".
        random_start: start at a random point of the ball, not at the input.
        restarts: how many times to start, at least 1. Each example keeps its worst outcome.
        clip: the box (lo, hi) of valid inputs, or None for no box.
        model_mode: "eval" or "train", the mode in which the model is attacked.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or ``random_start=False`` comes with several
            restarts, which would all be the same; when called, the model has a single class.

    >>> import torch
    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    >>> CW(eps=0.1)(lambda x: x * 3, x, y)
    tensor([[0.4000, 0.6000]])
    """

    eps: float = 8 / 255
    step_size: float | None = None
    steps: int = 100
    norm: str = "linf"
    random_start: bool = True
    restarts: int = 1
    clip: tuple[float, float] | None = (0, 1)
    model_mode: str = "eval"
    loss: str = field(default="cw", init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        pgd = self._pgd()  # which checks and normalises what is its own
        self._set("step_size", None if self.step_size is None else pgd.step_size)
        self._set("steps", pgd.steps)
        self._set("restarts", pgd.restarts)

    def _pgd(self) -> PGD:
        step_size = self.step_size
        if step_size is None:
            step_size = self.eps * SHARES[self.norm] or 1.0  # with eps=0 no step is ever made
        return PGD(
            self.eps,
            step_size,
            self.steps,
            self.norm,
            self.loss,
            self.random_start,
            self.restarts,
            self.clip,
            self.model_mode,
        )

    def _search(
        self, oracle: ModelOracle, x: Tensor, y: Tensor | None, project: Projection
    ) -> Tensor:
        return self._pgd()._search(oracle, x, y, project)
