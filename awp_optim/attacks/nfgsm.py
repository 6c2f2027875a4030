"""FGSM from a noisy point without a projection, for single-step adversarial training."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from awp_optim._utils.checks import check_positive, check_real
from awp_optim.attacks.balls import Projection, limits
from awp_optim.attacks.gradient_ascent import GradientAscentAttack
from awp_optim.attacks.losses import Loss, compares_with_clean
from awp_optim.attacks.oracle import ModelOracle


@dataclass(frozen=True, repr=False)
class NFGSM(GradientAscentAttack):
    """N-FGSM, to train with and not to evaluate with: its examples leave the ball of radius eps.

    de Jorge et al., "Make some noise: reliable and efficient single-step adversarial training"
    (NeurIPS 2022, https://arxiv.org/abs/2202.01181), in L_inf. From ``x' = x + u`` with u uniform
    in ``[-noise * eps, noise * eps]``, one step ``x' + step_size * sign(g)``. Both points are
    clipped to the box, as in the authors' code, but neither is projected onto the ball: an example
    is up to ``noise * eps + step_size`` away from x, 3 eps by default. That is what prevents the
    catastrophic overfitting of FGSM, and why a model must be evaluated with another attack. It
    costs one forward and one backward pass, and one forward pass more for "kl" and "score". See
    :meth:`Attack.__call__` for how to call it.

    Args:
        eps: radius of the ball to be robust in, at least 0, in the units of the input. With 0 the
            clean examples are returned and the model is not called.
        step_size: alpha, length of the step, above 0; None means eps, as in the paper.
        noise: k, half the width of the noise in units of eps, at least 0.
        loss: the loss to maximize, as in :class:`PGD`.
        clip: the box (lo, hi) of valid inputs, or None for no box.
        model_mode: "eval" or "train", the mode in which the model is attacked. The authors train
            with "train".

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or ``noise=0`` is combined with "kl" or
            "score", whose gradient is zero at the clean example.

    >>> import torch
    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    >>> x_adv = NFGSM(eps=0.1)(lambda x: x * 3, x, y)
    >>> bool(((x_adv - x).abs() <= 0.3).all())
    True
    """

    eps: float = 8 / 255
    step_size: float | None = None
    noise: float = 2.0
    loss: str | Loss = "ce"
    clip: tuple[float, float] | None = (0, 1)
    model_mode: str = "eval"
    norm: str = field(default="linf", init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None:
            self._set("step_size", check_positive("step_size", self.step_size))
        self._set("noise", check_real("noise", self.noise))
        if self.noise < 0:
            raise ValueError(f"noise must not be negative, got {self.noise!r}")
        if compares_with_clean(self.loss) and self.noise == 0:
            raise ValueError(
                f"loss={self.loss!r} has a zero gradient at the clean example; set noise=2"
            )

    @property
    def gradient_passes(self) -> int:
        return 1

    def _search(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        lo, hi = limits(oracle.x.dtype, self.clip)

        def project(z: Tensor) -> Tensor:
            return z.clamp(lo, hi)

        target, start = self._target(oracle, x, y), self._start(x, project)
        step_size = self.eps if self.step_size is None else self.step_size
        return self._ascend(oracle, start, target, project, step_size, steps=1)

    def _start(self, x: Tensor, project: Projection) -> Tensor:
        return project(x + self._ball.random(x, self.noise * self.eps))
