"""AutoAttack, the field's standard of evaluation, from its reference package."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_optim._utils.checks import check_choice, check_int, check_real

from .apgd import APGD
from .balls import BALLS
from .base import Attack, Model, ModelOracle, without_gradients

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
"""What each version runs, in this order."""
PARTS = VERSIONS["plus"]
CLASSES = {"apgd-dlr": 3, "apgd-t": 4, "fab": 2, "fab-t": 2}
"""How many classes a part needs at least."""
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
DOCS = "https://github.com/fra31/auto-attack/blob/master/flags_doc.md"


class AutoAttackWarning(UserWarning):
    """AutoAttack found its own result doubtful, or left out a part; the text says why."""


@dataclass(frozen=True)
class AutoAttack(Attack):
    """An ensemble of attacks without parameters, each on the images that those before left.

    Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks" (ICML 2020, https://arxiv.org/abs/2003.01690). Its parts come from the
    reference implementation, PyPI's ``pyautoattack`` (extra ``eval``), with the reference's
    settings and checks, so that verdicts are the field's own:

    ============  ================================================================
    version       parts
    ============  ================================================================
    "standard"    apgd-ce, apgd-t (9 targets), fab-t, square (5000 queries)
    "plus"        apgd-ce and fab with 5 restarts, apgd-dlr, square, apgd-t, fab-t
    "rand"        apgd-ce, apgd-dlr, gradients averaged over 20 passes
    "custom"      those of ``attacks``; apgd-ce, apgd-dlr and fab with 5 restarts
    ============  ================================================================

    An image comes back misclassified, or as it is. Looking at who still stands waits for the
    device. How to call it: see :meth:`Attack.__call__`; :func:`awp_optim.evaluation.evaluate` runs
    and records the :meth:`parts` one by one.

    Args:
        eps: radius of the ball, at least 0, in the units of the input.
        norm: "linf", "l2" or "l1".
        version: "standard", "plus", "rand" (for randomised defences) or "custom".
        attacks: of "custom", a tuple of parts' names.
        backend: "native" runs apgd-ce, apgd-dlr and apgd-t by this package's :class:`APGD`, which
            drops an image once it is misclassified; not with "rand".
        seed: of every part, on every batch, as in the reference. torch's generators are left as
            they were.
        clip: (0, 1), the only box that the reference knows.
        model_mode: "eval" or "train", the mode in which the model is attacked.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range; when called, the model has a single class.
        ImportError: when called, ``pyautoattack`` is not installed.

    Warns:
        AutoAttackWarning: the reference's own warnings; and a part that is left out, for a model
            has too few classes for it (3 for "apgd-dlr", 4 for "apgd-t") or inputs are no images,
            which Square needs.

    >>> list(AutoAttack().parts())
    ['apgd-ce', 'apgd-t', 'fab-t', 'square']
    """

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
        self._set("eps", check_real("eps", self.eps))
        if self.eps < 0:
            raise ValueError(f"eps must not be negative, got {self.eps!r}")
        check_choice("norm", self.norm, NORMS)
        check_choice("version", self.version, [*VERSIONS, "custom"])
        check_choice("backend", self.backend, ("reference", "native"))
        self._set("seed", check_int("seed", self.seed, least=0))
        if self.clip != (0.0, 1.0):
            raise ValueError(
                f"AutoAttack's reference knows inputs in [0, 1] only, got clip={self.clip!r}: put"
                " the scaling into the model"
            )
        if self.version == "custom":
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
        elif self.attacks is not None:
            raise ValueError(
                f"attacks={self.attacks!r} go with version='custom' alone, not {self.version!r}"
            )
        if self.backend == "native" and self.version == "rand":
            raise ValueError(
                "version='rand' averages gradients over passes, which backend='native' does not:"
                " leave backend at 'reference'"
            )

    def parts(self) -> dict[str, Attack]:
        """The attacks that it consists of, by name, in their order; each is one by itself."""
        names = VERSIONS.get(self.version, self.attacks or ())
        return {
            name: (_BlindPart if name == "square" else _Part)(
                name,
                self.eps,
                self.norm,
                self.version,
                self.backend,
                self.seed,
                self.clip,
                self.model_mode,
            )
            for name in names
        }

    def _perturb(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None  # _check saw to it
        x_adv = x.clone()
        stands = oracle.logits(x).argmax(1) == y
        for part in self.parts().values():
            rows = stands.nonzero().flatten()
            if len(rows) == 0:
                break
            of_rows = oracle.only(rows)
            found = part._perturb(of_rows, x[rows], y[rows])
            fooled = of_rows.logits(found).argmax(1) != y[rows]
            x_adv[rows[fooled]] = found[fooled]
            stands[rows[fooled]] = False
        return x_adv


@dataclass(frozen=True)
class _Part(Attack):
    """One of AutoAttack's attacks, with the settings that it has in a version."""

    name: str
    eps: float
    norm: str
    version: str
    backend: str
    seed: int
    clip: tuple[float, float] | None
    model_mode: str

    def _perturb(self, oracle: ModelOracle, x: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        if self.eps == 0 or len(x) == 0:
            return x.clone()
        classes = oracle.logits(x).shape[1]
        if classes < 2:
            raise ValueError("AutoAttack needs a model of 2 classes or more, this one has 1")
        if classes < CLASSES.get(self.name, 2):
            _warn(
                f"{self.name} is left out: its loss compares {CLASSES[self.name]} classes, the"
                f" model has {classes}. The result is that of the other parts"
            )
            return x.clone()
        if self.name == "square" and x.ndim not in (3, 4):
            _warn(
                "square is left out: it changes squares of an image, shape (N, C, H, W), and x is"
                f" of shape {tuple(x.shape)}. SPSA needs no image"
            )
            return x.clone()
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            if self.backend == "native" and self.name.startswith("apgd"):
                torch.manual_seed(self.seed)
                return self._apgd()._perturb(oracle, x, y)
            return self._reference(oracle, x, y, classes)

    def _apgd(self) -> APGD:
        many = self.name != "apgd-t" and (
            self.version in ("plus", "custom") or (self.norm == "l1" and self.version == "standard")
        )
        losses = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}
        return APGD(
            self.eps,
            100,
            self.norm,
            losses[self.name],
            restarts=5 if many else 1,
            targets=5 if (self.norm, self.version) == ("l1", "standard") else 9,
            drop_fooled=True,
        )

    def _reference(self, oracle: ModelOracle, x: Tensor, y: Tensor, classes: int) -> Tensor:
        try:
            import pyautoattack
            from pyautoattack import checks
        except ImportError as error:
            raise ImportError(
                "AutoAttack needs its reference: pip install 'awp_optim[eval]', or pyautoattack"
            ) from error
        # The package works on float32 images of three dimensions, contiguous ones in places.
        images = (x.float() if x.ndim == 4 else _as_images(x.float())).contiguous()
        height, width = images.shape[2:]
        if self.name == "square" and self.norm != "linf":
            images = _fit_for_square(images)

        def forward(z: Tensor) -> Tensor:
            z = z[..., :height, :width].reshape(-1, *x.shape[1:])
            return oracle.forward(z.to(oracle.dtype)).float()

        def model(z: Tensor) -> Tensor:
            logits: Tensor = _Apart.apply(z, forward, self.name == "fab")
            return logits

        custom = self.version == "custom"
        reference = pyautoattack.AutoAttack(
            model,
            norm=NORMS[self.norm],
            eps=self.eps,
            version=self.version,
            attacks=[self.name] if custom else None,
            seed=self.seed,
            device=x.device,
        )
        reference.attacks_to_run = [self.name]
        for attack in (reference.apgd_targeted, reference.fab):
            attack.n_target_classes = min(attack.n_target_classes, classes - 1)
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # it counts on from model to model
        weights = list(oracle.model.parameters()) if isinstance(oracle.model, nn.Module) else []
        trace = sys.gettrace()  # a debugger's or coverage's; one of its checks sets its own
        try:
            with without_gradients(weights), _log():
                found, _ = reference.run_standard_evaluation(images, y, batch_size=len(x))
        finally:
            sys.settrace(trace)
        project = BALLS[self.norm].projection(x, self.eps, self.clip)  # it overshoots by rounding
        found = project(found[..., :height, :width].reshape(x.shape))
        # A model that gives NaN can lead it there, too.
        finite = found.isfinite().flatten(1).all(1) if x.ndim > 1 else found.isfinite()
        return torch.where(finite.view(-1, *[1] * (x.ndim - 1)), found, x)


class _BlindPart(_Part):
    uses_gradients: ClassVar[bool] = False


class _Apart(torch.autograd.Function):
    """The model, so that a backward pass reaches its input and nothing else.

    The package calls ``backward``, which would add to the weights' gradients, also to those of a
    function's model, which nobody can see; it views gradients as if they were contiguous; and it
    writes to logits, which may be a view of the input.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, model: Model, again: bool) -> Tensor:
        ctx.again = again  # whether several backward passes follow
        with torch.set_grad_enabled(ctx.needs_input_grad[0]):
            ctx.z = z.detach().requires_grad_(ctx.needs_input_grad[0])
            # The view as in ModelOracle.gradient.
            ctx.logits = model(ctx.z.view_as(ctx.z))
        if ctx.needs_input_grad[0] and not ctx.logits.requires_grad:
            raise ValueError(
                "the model's logits do not depend on its input through autograd, so there is no"
                " gradient to climb; does its forward pass detach, or run under torch.no_grad()?"
            )
        return torch.clone(ctx.logits.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (g,) = torch.autograd.grad(ctx.logits, ctx.z, gradients[0], retain_graph=ctx.again)
        return g.clone(memory_format=torch.contiguous_format), None, None


def _fit_for_square(images: Tensor) -> Tensor:
    """Images padded below and to the right until Square can tile them; most are as they are.

    In L2 and L1 it starts from tiles of a fifth of the height, which must not overhang.
    """

    def fits(height: int, width: int) -> bool:
        tile = height // 5
        if tile < 2:  # single pixels cannot overhang
            return tile == 1
        margin = (height - 5 * tile) // 2
        return all(margin + n // tile * tile <= n for n in (height, width))

    height, width = images.shape[2:]
    if fits(height, width):
        return images
    side = max(height, width)
    while not fits(side, side):
        side += 1
    return F.pad(images, (0, side - width, 0, side - height))


def _as_images(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.ndim == 3 else x.reshape(len(x), 1, 1, -1)


def _warn(message: str) -> None:
    warnings.warn(message, AutoAttackWarning, stacklevel=2)


@contextmanager
def _log() -> Iterator[None]:
    """The package's log, quiet, but for its warnings, which become Python's."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("auto-attack"), Keep(logging.WARNING)
    was: tuple[Any, ...] = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = was[0]
        logger.setLevel(was[1])
    for message in dict.fromkeys(messages):
        _warn(message.replace("See flags_doc.md for details.", f"See {DOCS}"))
