"""Curves and surfaces of the loss in weight space, and measures of their sharpness."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["LossCurve", "LossSurface", "Sharpness"]


@dataclass(frozen=True)
class Sharpness:
    """How much the adversarial loss rises at a distance, on both sides if the curve covers them.

    Attributes:
        mean: the mean of g(alpha) - g(0) over directions and sides.
        worst: the maximum of g(alpha) - g(0) over directions and sides.
        relative: the mean of |g(alpha) - g(0)|, the paper's relative landscape.
        stderr: an upper bound for the standard error of ``mean`` over the examples as a random
            sample, with the errors of all directions fully correlated.
    """

    mean: float
    worst: float
    relative: float
    stderr: float


class _Landscape:
    def to_dict(self) -> dict[str, Any]:
        """All values, for ``json.dump``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in values.items()}


@dataclass(frozen=True)
class LossCurve(_Landscape):
    """The loss along directions in weight space; float64 arrays, A alphas and D directions.

    Attributes:
        alphas: distances, shape (A,), in the order given.
        adv_loss: adversarial loss at each distance, mean over the directions, shape (A,).
        nat_loss: the same for the natural examples.
        adv_losses, nat_losses: the losses along each direction, shape (D, A).
        adv_stderr, nat_stderr: their standard errors, with the examples as a random sample; shape
            (D, A). NaN for a single example.
        rise_stderr: standard errors of ``adv_losses - adv_center``, paired by example; (D, A).
        adv_center, nat_center: the losses of the unperturbed model, g(0).
        n: the number of examples.
    """

    alphas: Array
    adv_loss: Array
    nat_loss: Array
    adv_losses: Array = field(repr=False)
    nat_losses: Array = field(repr=False)
    adv_stderr: Array = field(repr=False)
    nat_stderr: Array = field(repr=False)
    rise_stderr: Array = field(repr=False)
    adv_center: float
    nat_center: float
    n: int

    def sharpness(self, alpha: float) -> Sharpness:
        """The sharpness of the adversarial loss at distance ``alpha``, interpolated linearly.

        Args:
            alpha: above 0. If the curve covers alpha and -alpha, both count.

        Raises:
            ValueError: ``alpha`` is not above 0, or the curve covers neither alpha nor -alpha.
        """
        rises, errors = self.rises(alpha), self._on_both_sides(alpha, self.rise_stderr)
        return Sharpness(
            float(rises.mean()), float(rises.max()), float(abs(rises).mean()), float(errors.mean())
        )

    def rises(self, alpha: float) -> Array:
        """g(alpha) - g(0) of the adversarial loss, by direction and side; shape (D, 1 or 2).

        See :meth:`sharpness` for arguments and errors.
        """
        return self._on_both_sides(alpha, self.adv_losses - self.adv_center)

    def _on_both_sides(self, alpha: float, values: Array) -> Array:
        """Interpolate rises or their errors, shape (D, A), at alpha and -alpha where covered."""
        import numpy as np

        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be a distance above 0, got {alpha!r}")
        alphas = self.alphas
        if 0 not in alphas:  # g(0) is known; at 0, both rises and their errors are 0
            alphas, values = np.append(alphas, 0), np.pad(values, ((0, 0), (0, 1)))
        order = np.argsort(alphas, kind="stable")
        x = alphas[order]
        sides = [side for side in (alpha, -alpha) if x[0] <= side <= x[-1]]
        if not sides:
            raise ValueError(
                f"the curve spans {x[0]:g} to {x[-1]:g}, which contains neither {alpha:g} nor "
                f"{-alpha:g}"
            )
        return np.array([[np.interp(side, x, line) for side in sides] for line in values[:, order]])

    def flat_width(self, rise: float = 0.1) -> float:
        """The width of the interval around 0 in which the adversarial loss stays low.

        On either side, it ends where the mean over the directions, interpolated linearly, first
        exceeds ``(1 + rise) * g(0)``.

        Args:
            rise: relative to g(0), above 0.

        Returns:
            The total width of the sides that the curve covers; infinite if the loss on a side does
            not exceed this level.

        Raises:
            ValueError: ``rise`` is not above 0, or the curve has no other alpha than 0.
        """
        import numpy as np

        if not 0 < rise < math.inf:
            raise ValueError(f"rise must be above 0, got {rise!r}")
        widths = []
        for sign in (1, -1):
            side = sign * self.alphas > 0
            order = np.argsort(np.abs(self.alphas[side]), kind="stable")
            distances = np.abs(self.alphas[side])[order].tolist()
            losses = self.adv_loss[side][order].tolist()
            if distances:
                widths.append(self._flat_until((1 + rise) * self.adv_center, distances, losses))
        if not widths:
            raise ValueError("the curve has no nonzero alpha: measure others")
        return sum(widths)

    def _flat_until(self, level: float, distances: list[float], losses: list[float]) -> float:
        """The distance at which the loss first exceeds a level, on one side."""
        before, below = 0.0, self.adv_center
        for distance, loss in zip(distances, losses, strict=True):
            if not loss <= level:  # NaN counts as a rise
                share = (level - below) / (loss - below) if math.isfinite(loss) else 0.0
                return before + share * (distance - before)
            before, below = distance, loss
        return math.inf


@dataclass(frozen=True)
class LossSurface(_Landscape):
    """The loss on a plane in weight space; float64 arrays of shape (A, B).

    Attributes:
        alphas, betas: distances along the two directions, shapes (A,) and (B,).
        adv_loss, nat_loss: the losses at ``w + alphas[i] d + betas[j] e``.
        adv_stderr, nat_stderr: their standard errors.
        rise_stderr: the standard errors of ``adv_loss - adv_center``, paired by example.
        adv_center, nat_center: the losses of the unperturbed model, g(0, 0).
        n: the number of examples.
    """

    alphas: Array
    betas: Array
    adv_loss: Array
    nat_loss: Array
    adv_stderr: Array = field(repr=False)
    nat_stderr: Array = field(repr=False)
    rise_stderr: Array = field(repr=False)
    adv_center: float
    nat_center: float
    n: int

    @property
    def relative(self) -> Array:
        """|g(alpha, beta) - g(0, 0)|, as in Figure 6 of the paper; shape (A, B)."""
        return abs(self.adv_loss - self.adv_center)
