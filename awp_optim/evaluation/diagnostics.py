"""Signs that a robust accuracy is too good to be true, and what to do about each.

Athalye, Carlini & Wagner, "Obfuscated Gradients Give a False Sense of Security" (ICML 2018,
https://arxiv.org/abs/1802.00420), section 3.1; Carlini et al., "On Evaluating Adversarial
Robustness", 2019 (https://arxiv.org/abs/1902.06705), section 4. :func:`probe` asks the model,
:func:`compare` looks at what attacks did to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from awp_optim.attacks import FGSM, PGD, Attack
from awp_optim.attacks.base import Model, ModelOracle, in_mode
from awp_optim.attacks.captured import unwrap
from awp_optim.attacks.losses import ce

__all__ = ["Finding", "Outcome", "compare", "probe"]

SHARE = 0.05
"""Of the examples probed, how many may be odd before it is said."""


@dataclass(frozen=True)
class Finding:
    """Something that makes an evaluation doubtful.

    Attributes:
        check: its name, one of those that :func:`probe` and :func:`compare` list.
        message: what was seen, what it may mean and what to do.
    """

    check: str
    message: str


class Outcome(Protocol):
    """What an attack did, each a bool tensor of shape (N,)."""

    @property
    def attacked(self) -> Tensor:
        """Which examples it was run on."""

    @property
    def fooled(self) -> Tensor:
        """Which of them it made the model misclassify."""


def probe(
    model: Model, x: Tensor, y: Tensor, clip: tuple[float, float] = (0.0, 1.0)
) -> list[Finding]:
    """Ask the model itself, at a few examples, for 60 forward and backward passes at most.

    The checks: ``random`` (two passes disagree), ``one_class``, ``probabilities`` (softmax inside
    the model), ``not_finite`` (logits or gradients), ``no_gradient`` (cut off), ``vanishing`` (the
    margin's gradient is exactly zero), ``saturated`` (the cross-entropy's alone is),
    ``random_gradient``, ``unbounded`` (an attack that may turn an image into any other fails).

    Args:
        model: maps inputs in ``clip`` to logits (N, C); a module is put in eval mode meanwhile.
        x: inputs, shape (N, ...).
        y: class indices, shape (N,). The last check needs some that the model gets right.
        clip: the box of valid inputs.
    """
    with in_mode(model, "eval"), torch.no_grad(), torch.inference_mode(False):
        x, y = x.detach().clone(), y.detach().clone()
        found, logits = _probe_outputs(model, x, y)
        if not bool(logits.isfinite().all()) or logits.shape[1] < 2:
            return found  # nothing to climb
        right = logits.argmax(1) == y
        gradients = _probe_gradients(ModelOracle(model, x, y), x, y)
        found += gradients
        if not any(f.check == "no_gradient" for f in gradients) and bool(right.any()):
            found += _probe_unbounded(model, x[right], y[right], clip)
        return found


def _probe_outputs(model: Model, x: Tensor, y: Tensor) -> tuple[list[Finding], Tensor]:
    oracle = ModelOracle(model, x, y)
    logits, again = oracle.logits(x).float(), oracle.logits(x).float()
    found = []
    if bool(logits.isnan().any()) or bool(logits.isinf().any()):
        odd = int((~logits.isfinite()).any(1).sum())
        found.append(
            Finding(
                "not_finite",
                f"the model's logits are not finite for {odd} of {len(x)} images as they are: "
                "attacks cannot climb there. An image whose logits hold NaN counts as wrong; look "
                "for an overflow (half precision?) or a division by zero in the model",
            )
        )
        return found, logits
    # Sums in another order differ by rounding.
    apart = (logits - again).abs().amax(1) > 1e-3 * logits.abs().amax(1).clamp_min(1e-6)
    if bool(apart.any()):
        found.append(
            Finding(
                "random",
                f"two passes over the same image gave different logits for {int(apart.sum())} of "
                f"{len(x)} images: a randomised defence, or dropout left on. Gradients must be "
                "averaged over passes, so use AutoAttack(version='rand'), or switch the "
                "randomness off",
            )
        )
    if logits.shape[1] == 1:
        found.append(
            Finding(
                "one_class",
                "the model has a single class, so no attack can change its answer: evaluate a "
                "model with an output for every class, also if there are two",
            )
        )
    sums_to_one = bool(((logits.sum(1) - 1).abs() < 1e-3).all())
    if logits.shape[1] > 1 and sums_to_one and bool((logits >= 0).all()):
        found.append(
            Finding(
                "probabilities",
                "the model returns probabilities, not logits: losses take a softmax of their own, "
                "and gradients fade. Evaluate the model without its last softmax",
            )
        )
    return found, logits


def _probe_gradients(oracle: ModelOracle, x: Tensor, y: Tensor) -> list[Finding]:
    try:
        of_margin = oracle.gradient(x, _smooth_margin, y)
        again = oracle.gradient(x, _smooth_margin, y)
        of_ce = oracle.gradient(x, ce, y)
    except (RuntimeError, ValueError) as error:
        return [
            Finding(
                "no_gradient",
                f"the model gives no gradient ({error}): gradient attacks cannot work, and say "
                "nothing of its robustness. Attack a differentiable stand-in for what cuts the "
                "gradient off (BPDA), and without gradients (SPSA, Square)",
            )
        ]
    n = len(x)
    found = []
    odd = int((~(of_margin.isfinite() & of_ce.isfinite())).flatten(1).any(1).sum())
    if odd:
        found.append(
            Finding(
                "not_finite",
                f"gradients are not finite for {odd} of {n} images, where gradient attacks stand "
                "still: look for a root, a logarithm or a division at zero in the model, or attack "
                "in float32",
            )
        )
    vanished = ~of_margin.flatten(1).any(1)
    if int(vanished.sum()) > SHARE * n:
        found.append(
            Finding(
                "vanishing",
                f"the gradient of the logits' margin is exactly zero for {int(vanished.sum())} of "
                f"{n} images: something masks it (rounding, thresholds, saturated activations), "
                "and gradient attacks only look as if they failed. Attack a differentiable "
                "stand-in for it (BPDA), and without gradients (SPSA, Square)",
            )
        )
    saturated = ~of_ce.flatten(1).any(1) & ~vanished
    if int(saturated.sum()) > SHARE * n:
        found.append(
            Finding(
                "saturated",
                f"the cross-entropy's gradient is exactly zero for {int(saturated.sum())} of {n} "
                "images, though the logits' is not: logits are so large that the softmax is "
                "saturated. Use losses that no scaling changes: APGD(loss='dlr'), CW, AutoAttack",
            )
        )
    length = of_margin.flatten(1).norm(dim=1)
    # Where the logits themselves are random, that was said.
    if bool(((of_margin - again).flatten(1).norm(dim=1) > 1e-3 * length).any()):
        found.append(
            Finding(
                "random_gradient",
                "two backward passes at the same image gave different gradients: average them over "
                "passes, AutoAttack(version='rand'), or switch the randomness off",
            )
        )
    return found


def _smooth_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The other classes' mean logit over that of the label: it depends on every logit."""
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    own = z.gather(1, y.unsqueeze(1)).squeeze(1)
    return (z.sum(1) - own) / (z.shape[1] - 1) - own


def _probe_unbounded(
    model: Model, x: Tensor, y: Tensor, clip: tuple[float, float]
) -> list[Finding]:
    lo, hi = clip
    if not (bool((x >= lo).all()) and bool((x <= hi).all())):
        return []  # attacks refuse it with a message of their own
    width = hi - lo  # enough to turn any image into one of another class
    attack = PGD(width, width / 20, 50, loss="cw", random_start=False, clip=clip)
    x_adv = attack(model, x, y)
    stood = int((ModelOracle(model, x, y).logits(x_adv).argmax(1) == y).sum())
    if stood <= max(2, SHARE * len(x)):
        return []
    return [
        Finding(
            "unbounded",
            f"{stood} of {len(x)} images are still classified right after PGD-50 that may turn "
            "them into any other image: the attack fails, so gradients must be masked, unless the "
            "model says the same of every image. Attack without gradients (SPSA, Square), from "
            "other models (transfer), or a differentiable stand-in",
        )
    ]


def compare(attacks: Mapping[str, object], outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """Look for attacks that did better than stronger ones, at the same examples and radius.

    The checks: ``one_step`` (FGSM breaks what no iterated attack does), ``black_box`` (an attack
    without gradients breaks what none with gradients does), ``steps`` and ``restarts`` (more of
    them still help a lot). Three examples and one in a hundred must be affected.

    Args:
        attacks: by name; those that are none of this package's are passed over.
        outcomes: under the same names.
    """
    known: dict[str, Attack] = {}
    for name, attack in attacks.items():
        inner = unwrap(attack)
        if isinstance(inner, Attack) and name in outcomes:
            known[name] = inner
    found = []
    for name, attack in known.items():
        rivals = {k: a for k, a in known.items() if a.uses_gradients and not _one_step(a)}
        rivals = {k: a for k, a in rivals.items() if k != name and _ball(a) == _ball(attack)}
        if not rivals or not (_one_step(attack) or not attack.uses_gradients):
            continue
        n, alone = _alone(outcomes[name], [outcomes[rival] for rival in rivals])
        if not _notable(alone, n):
            continue
        others = ", ".join(rivals)
        if _one_step(attack):
            found.append(
                Finding(
                    "one_step",
                    f"{name}, a single step, breaks {alone} of {n} images that {others} did not: "
                    "iterating should only help, so the loss is too rough to climb or gradients "
                    "are masked. Try smaller steps, more of them, restarts, and attacks without "
                    "gradients (SPSA, Square)",
                )
            )
        else:
            found.append(
                Finding(
                    "black_box",
                    f"{name}, which sees no gradients, breaks {alone} of {n} images that {others} "
                    "did not: gradients are masked, or the other attacks are too weak. Trust the "
                    "worst case alone, run AutoAttack, and look for what hides the gradient",
                )
            )
    for setting in ("steps", "restarts"):
        found += _more_helps(setting, known, outcomes)
    return found


def _more_helps(
    setting: str, attacks: Mapping[str, Attack], outcomes: Mapping[str, Outcome]
) -> list[Finding]:
    """Pairs of attacks that differ in one setting only."""
    found = []
    for a, less in attacks.items():
        for b, more in attacks.items():
            few, many = getattr(less, setting, None), getattr(more, setting, None)
            if few is None or many is None or not few < many or type(less) is not type(more):
                continue
            if dataclasses.replace(less, **{setting: many}) != more:  # type: ignore[type-var]
                continue
            if setting == "steps" and _one_step(less):
                continue  # of course a second step helps
            one, other = outcomes[a], outcomes[b]
            both = one.attacked & other.attacked
            gain = int((other.fooled & both).sum()) - int((one.fooled & both).sum())
            n = int(both.sum())
            if gain >= 3 and gain > 0.02 * n:
                found.append(
                    Finding(
                        setting,
                        f"{b}, with {many} {setting}, breaks {gain} of {n} images more than {a} "
                        f"with {few}: neither may be at the end. Add {setting} until it no longer "
                        "helps, or use APGD, which shortens its steps by itself",
                    )
                )
    return found


def _alone(outcome: Outcome, rivals: list[Outcome]) -> tuple[int, int]:
    """How many examples an attack was run on, and how many it broke that all rivals failed at."""
    alone = outcome.fooled.clone()
    for rival in rivals:
        alone &= rival.attacked & ~rival.fooled
    return int(outcome.attacked.sum()), int(alone.sum())


def _notable(count: int, n: int) -> bool:
    return count >= 3 and count > 0.01 * n


def _one_step(attack: Attack) -> bool:
    return isinstance(attack, FGSM) or getattr(attack, "steps", None) == 1


def _ball(attack: Attack) -> tuple[object, object]:
    return getattr(attack, "norm", None), getattr(attack, "eps", None)
