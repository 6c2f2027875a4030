"""AutoAttack, the standard evaluation, built from the parts of its reference package."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from awp_optim._utils.batches import generators_restored, set_seed
from awp_optim._utils.checks import check_choice, check_int
from awp_optim.attacks._autoattack_reference import run_reference
from awp_optim.attacks.apgd import APGD
from awp_optim.attacks.base import Attack, BallAttack
from awp_optim.attacks.oracle import ModelOracle

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
"""The parts that each version runs, in this order."""
PARTS = VERSIONS["plus"]
LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
"""The number of classes that a part needs, if more than 2."""
APGD_LOSSES = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}


class AutoAttackWarning(UserWarning):
    """AutoAttack's result is doubtful, or a part was left out; the message says why."""


@dataclass(frozen=True)
class AutoAttack(BallAttack):
    """An ensemble of parameter-free attacks, each run on images that no previous one has broken.

    Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks" (ICML 2020, https://arxiv.org/abs/2003.01690). Its parts come from the
    reference implementation, PyPI's ``pyautoattack`` (extra ``eval``), with the reference's
    settings and checks, so that results are comparable with published ones:

    ============  ================================================================
    version       parts
    ============  ================================================================
    "standard"    apgd-ce, apgd-t (9 targets), fab-t, square (5000 queries)
    "plus"        apgd-ce and fab with 5 restarts, apgd-dlr, square, apgd-t, fab-t
    "rand"        apgd-ce, apgd-dlr, gradients averaged over 20 passes
    "custom"      those in ``attacks``; apgd-ce, apgd-dlr and fab with 5 restarts
    ============  ================================================================

    Images are returned misclassified or unchanged. After each part, the attack waits for the device
    to read which images remain. See :meth:`Attack.__call__` for how to call it;
    :func:`awp_optim.evaluation.evaluate` runs and records the :meth:`parts` one by one.

    Args:
        eps: radius of the ball, at least 0, in the units of the input.
        norm: "linf", "l2" or "l1".
        version: "standard", "plus", "rand" (for randomized defenses) or "custom".
        attacks: for "custom", a tuple of part names.
        backend: "native" runs apgd-ce, apgd-dlr and apgd-t with this package's :class:`APGD`, which
            drops an image once it is misclassified; not available for "rand".
        seed: used for every part and every batch, as in the reference. torch's generators are
            restored.
        clip: (0, 1), the only box that the reference supports.
        model_mode: "eval" or "train", the mode in which the model is attacked.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range; when called, the model has a single class.
        ImportError: when called, ``pyautoattack`` is not installed.

    Warns:
        AutoAttackWarning: for the reference's own warnings, and if a part is left out because the
            model has too few classes ("apgd-dlr" needs 3, "apgd-t" 4) or because the inputs are not
            images, which Square needs.

    >>> list(AutoAttack().parts())
    ['apgd-ce', 'apgd-t', 'fab-t', 'square']
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    eps: float = 8 / 255
    norm: str = "linf"
    version: str = "standard"
    attacks: tuple[str, ...] | None = None
    backend: str = "reference"
    seed: int = 0
    clip: tuple[float, float] | None = (0, 1)
    model_mode: str = "eval"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("version", self.version, [*VERSIONS, "custom"])
        check_choice("backend", self.backend, ("reference", "native"))
        self._set("seed", check_int("seed", self.seed, least=0))
        if self.clip != (0.0, 1.0):
            raise ValueError(
                f"AutoAttack's reference only supports inputs in [0, 1], got clip={self.clip!r};"
                f" make the scaling a layer of the model"
            )
        if self.version == "custom":
            self._check_custom()
        elif self.attacks is not None:
            raise ValueError(f"attacks={self.attacks!r} needs version='custom'")
        if self.backend == "native" and self.version == "rand":
            raise ValueError(
                "version='rand' averages gradients over passes, but backend='native' does not;"
                " leave backend at 'reference'"
            )

    def _check_custom(self) -> None:
        if isinstance(self.attacks, str) or not self.attacks:
            raise ValueError(
                f"version='custom' needs attacks, a tuple of {', '.join(map(repr, PARTS))}, got"
                f" {self.attacks!r}"
            )
        self._set("attacks", tuple(self.attacks))
        for name in self.attacks:
            check_choice("attacks", name, PARTS)
        if len(set(self.attacks)) < len(self.attacks):
            raise ValueError(f"attacks must differ, got {self.attacks!r}")

    def parts(self) -> dict[str, Attack]:
        """The attacks of the ensemble by name, in order; each can be run on its own."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        names = VERSIONS.get(self.version) or settings["attacks"]
        del settings["attacks"]
        return {name: _Part(name, **settings) for name in names}

    def _search(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None  # checked
        x_adv = x.clone()
        left = oracle.logits(x).argmax(1) == y
        for part in self.parts().values():
            rows = left.nonzero().flatten()
            if len(rows) == 0:
                break
            part_oracle = oracle.subset(rows)
            found = part.run(part_oracle, x[rows], y[rows])
            fooled = part_oracle.logits(found).argmax(1) != y[rows]
            x_adv[rows[fooled]] = found[fooled]
            left[rows[fooled]] = False
        return x_adv


@dataclass(frozen=True)
class _Part(BallAttack):
    """One of AutoAttack's attacks, with the settings that it has in a version."""

    norms: ClassVar[tuple[str, ...]] = AutoAttack.norms

    name: str
    eps: float
    norm: str
    version: str
    backend: str
    seed: int
    clip: tuple[float, float] | None
    model_mode: str

    @property
    def uses_gradients(self) -> bool:
        return self.name != "square"

    def _search(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None  # checked
        classes = oracle.logits(x).shape[1]
        if classes < 2:
            raise ValueError("AutoAttack needs a model with 2 classes or more, but this one has 1")
        if reason := self._reason_to_leave_out(x, classes):
            _warn(f"{self.name} is left out: {reason}")
            return x.clone()
        with generators_restored(x.device):
            if self.backend == "native" and self.name in APGD_LOSSES:
                set_seed(x.device, self.seed)
                return self.native().run(oracle, x, y)
            found, messages = run_reference(
                self.name,
                oracle,
                x,
                y,
                norm=self.norm,
                eps=self.eps,
                version=self.version,
                seed=self.seed,
                classes=classes,
            )
        for message in messages:
            _warn(message)
        found = self._projection(x)(found)  # the reference overshoots by rounding
        # If the model returns NaN, the reference can return NaN, too.
        finite = found.isfinite().reshape(len(x), -1).all(1)
        return torch.where(finite.view(-1, *[1] * (x.ndim - 1)), found, x)

    def _reason_to_leave_out(self, x: Tensor, classes: int) -> str:
        least = LEAST_CLASSES.get(self.name, 2)
        if classes < least:
            return (
                f"its loss compares {least} classes, but the model has {classes}; the result comes"
                f" from the other parts"
            )
        if self.name == "square" and x.ndim not in (3, 4):
            return (
                f"it changes squares in images of shape (N, C, H, W), but x has shape"
                f" {tuple(x.shape)}; SPSA does not need images"
            )
        return ""

    def native(self) -> APGD:
        """This package's APGD with the reference's settings."""
        many = self.name != "apgd-t" and (
            self.version in ("plus", "custom") or (self.norm == "l1" and self.version == "standard")
        )
        return APGD(
            self.eps,
            steps=100,
            norm=self.norm,
            loss=APGD_LOSSES[self.name],
            restarts=5 if many else 1,
            targets=5 if (self.norm, self.version) == ("l1", "standard") else 9,
            drop_fooled=True,
        )


def _warn(message: str) -> None:
    warnings.warn(message, AutoAttackWarning, stacklevel=2)
