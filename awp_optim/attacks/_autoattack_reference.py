"""AutoAttack's reference package, pyautoattack, run on an oracle without side effects."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_optim.attacks.oracle import Model, ModelOracle, input_gradient, without_gradients

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
DOCS = "https://github.com/fra31/auto-attack/blob/master/flags_doc.md"


def run_reference(
    name: str,
    oracle: ModelOracle,
    x: Tensor,
    y: Tensor,
    *,
    norm: str,
    eps: float,
    version: str,
    seed: int,
    classes: int,
) -> tuple[Tensor, list[str]]:
    """Run one part of the reference on ``x``, with its settings in ``version``.

    Returns:
        Adversarial examples (clean ones where the part found none), and its warnings.
    """
    try:
        import pyautoattack
        from pyautoattack import checks
    except ImportError as error:
        raise ImportError(
            "AutoAttack needs its reference package: pip install 'awp_optim[eval]' (pyautoattack)"
        ) from error
    # The package needs float32 images of three dimensions, and some parts contiguous ones.
    images = _as_images(x.float()).contiguous()
    height, width = images.shape[2:]
    if name == "square" and norm != "linf":
        images = _pad_for_square(images)

    def forward(z: Tensor) -> Tensor:
        z = z[..., :height, :width].reshape(-1, *x.shape[1:])
        return oracle.forward(z.to(oracle.x.dtype)).float()

    def model(z: Tensor) -> Tensor:
        logits: Tensor = _InputGradientOnly.apply(z, forward, name == "fab")
        return logits

    reference = pyautoattack.AutoAttack(
        model,
        norm=NORMS[norm],
        eps=eps,
        version=version,
        attacks=[name] if version == "custom" else None,
        seed=seed,
        device=x.device,
    )
    reference.attacks_to_run = [name]
    for attack in (reference.apgd_targeted, reference.fab):
        attack.n_target_classes = min(attack.n_target_classes, classes - 1)
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # else it counts across models
    weights = oracle.model.parameters() if isinstance(oracle.model, nn.Module) else []
    with without_gradients(weights), _trace_restored(), _quiet_log() as messages:
        found, _ = reference.run_standard_evaluation(images, y, batch_size=len(x))
    return found[..., :height, :width].reshape(x.shape), list(dict.fromkeys(messages))


class _InputGradientOnly(torch.autograd.Function):
    """The model, with a backward pass only to its input.

    The package calls ``backward``, which would also accumulate gradients of weights, even inside
    plain functions. It assumes contiguous gradients, and it writes to logits, which may be a view
    of the input.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, model: Model, retain_graph: bool) -> Tensor:  # noqa: FBT001
        ctx.retain_graph = retain_graph  # whether several backward passes follow
        with torch.set_grad_enabled(ctx.needs_input_grad[0]):
            ctx.z = z.detach().requires_grad_(ctx.needs_input_grad[0])
            ctx.logits = model(ctx.z.view_as(ctx.z))  # a view as in ModelOracle.evaluate_point
        return torch.clone(ctx.logits.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (g,) = input_gradient(
            ctx.logits, ctx.z, grad_outputs=gradients[0], retain_graph=ctx.retain_graph
        )
        return g.clone(memory_format=torch.contiguous_format), None, None


def _as_images(x: Tensor) -> Tensor:
    if x.ndim == 4:
        return x
    return x.unsqueeze(1) if x.ndim == 3 else x.reshape(len(x), 1, 1, -1)


def _pad_for_square(images: Tensor) -> Tensor:
    """Pad images at the bottom and right until Square can tile them; most need no padding.

    In L2 and L1, Square starts from tiles of a fifth of the height, which must fit into the image.
    """

    def fits(height: int, width: int) -> bool:
        tile = height // 5
        if tile < 2:  # single pixels always fit
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


@contextmanager
def _trace_restored() -> Iterator[None]:
    """Restore a debugger's or coverage's trace function, which a check of the package replaces."""
    trace = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(trace)


@contextmanager
def _quiet_log() -> Iterator[list[str]]:
    """Silence the package's log, and collect its warnings."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            messages.append(text.replace("See flags_doc.md for details.", f"See {DOCS}"))

    logger, handler = logging.getLogger("auto-attack"), Collector(logging.WARNING)
    propagate, level = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)
