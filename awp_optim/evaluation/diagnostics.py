"""Checks for a robust accuracy that is too good to be true, with advice for each.

Athalye, Carlini & Wagner, "Obfuscated Gradients Give a False Sense of Security" (ICML 2018,
https://arxiv.org/abs/1802.00420), section 3.1; Carlini et al., "On Evaluating Adversarial
Robustness", 2019 (https://arxiv.org/abs/1902.06705), section 4. :func:`probe` examines the model,
:func:`compare` the results of attacks, :func:`remarks` their warnings and invalid outputs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from awp_optim._utils.model_state import in_mode
from awp_optim.attacks import FGSM, PGD, Attack
from awp_optim.attacks.captured import unwrap
from awp_optim.attacks.losses import ce
from awp_optim.attacks.oracle import Model, ModelOracle
from awp_optim.evaluation.journal import Outcome
from awp_optim.evaluation.results import NATURAL, Finding, Record

__all__ = ["compare", "mode_findings", "probe", "remarks"]

PROBED = 64
"""How many examples :func:`probe` examines."""
SHARE = 0.05
"""The fraction of the probed examples that may be affected before a check reports it."""


def mode_findings(model: object) -> list[Finding]:
    """Whether the caller left the model in train mode: the check ``train_mode``."""
    if not isinstance(model, nn.Module) or not model.training:
        return []
    return [
        Finding(
            "train_mode",
            "the model was in train mode, in which BatchNorm and dropout make accuracies depend on "
            "the batch. It was evaluated in eval mode. Call model.eval() before evaluate()",
        )
    ]


def probe(
    model: Model, x: Tensor, y: Tensor, clip: tuple[float, float] = (0.0, 1.0)
) -> list[Finding]:
    """Examine the model at the first 64 examples, in at most 60 forward and backward passes.

    The checks: ``random`` (two passes differ), ``one_class``, ``probabilities`` (softmax inside the
    model), ``not_finite`` (logits or gradients), ``no_gradient`` (cut off), ``vanishing`` (the
    margin's gradient is exactly zero), ``saturated`` (only the cross-entropy's gradient is),
    ``random_gradient``, ``unbounded`` (an attack fails even though any image is allowed).

    Args:
        model: maps inputs in ``clip`` to logits (N, C); a module is examined in eval mode.
        x: inputs, shape (N, ...).
        y: class indices, shape (N,). The last check needs correctly classified examples.
        clip: the box of valid inputs.
    """
    with in_mode(model, "eval"), torch.no_grad(), torch.inference_mode(mode=False):
        x, y = x[:PROBED].detach().clone(), y[:PROBED].detach().clone()
        oracle = ModelOracle(model, x, y)
        logits, again = oracle.logits(x).float(), oracle.logits(x).float()
        found = list(_examine_outputs(logits, again))
        if not bool(logits.isfinite().all()) or logits.shape[1] < 2:
            return found  # no loss to maximize
        gradients = list(_examine_gradients(oracle, x, y))
        found += gradients
        right = logits.argmax(1) == y
        if bool(right.any()) and not any(f.check == "no_gradient" for f in gradients):
            found += _examine_unbounded(model, x[right], y[right], clip)
        return found


def _examine_outputs(logits: Tensor, again: Tensor) -> Iterator[Finding]:
    """Check the logits of two passes over the same examples."""
    n = len(logits)
    if odd := int((~logits.isfinite()).any(1).sum()):
        yield Finding(
            "not_finite",
            f"the model's logits are not finite for {odd} of {n} images without an attack: attacks "
            "fail there. An image whose logits hold NaN counts as misclassified. Look for an "
            "overflow (half precision?) or a division by zero in the model",
        )
        return
    # Sums in a different order differ by rounding.
    differ = (logits - again).abs().amax(1) > 1e-3 * logits.abs().amax(1).clamp_min(1e-6)
    if count := int(differ.sum()):
        yield Finding(
            "random",
            f"two passes over the same image gave different logits for {count} of {n} images: a "
            "randomized defense, or active dropout. Gradients must be averaged over passes: use "
            "AutoAttack(version='rand'), or disable the randomness",
        )
    if logits.shape[1] == 1:
        yield Finding(
            "one_class",
            "the model has a single class, so no attack can change its prediction: evaluate a "
            "model with one output per class, even if there are only two",
        )
    elif bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
        yield Finding(
            "probabilities",
            "the model returns probabilities, not logits. Losses apply a softmax themselves, and a "
            "second one makes gradients small: evaluate the model without its final softmax",
        )


def _examine_gradients(oracle: ModelOracle, x: Tensor, y: Tensor) -> Iterator[Finding]:
    try:
        of_margin = oracle.gradient(x, _smooth_margin, y).flatten(1)
        again = oracle.gradient(x, _smooth_margin, y).flatten(1)
        of_ce = oracle.gradient(x, ce, y).flatten(1)
    except (RuntimeError, ValueError) as error:
        yield Finding(
            "no_gradient",
            f"the model has no gradient ({error}), so gradient attacks say nothing about its "
            "robustness. Replace the non-differentiable part in the attack (BPDA), and attack "
            "without gradients (SPSA, Square)",
        )
        return
    n = len(x)
    if odd := int((~(of_margin.isfinite() & of_ce.isfinite())).any(1).sum()):
        yield Finding(
            "not_finite",
            f"gradients are not finite for {odd} of {n} images, so gradient attacks do not change "
            "them: look for a root, a logarithm or a division at zero in the model, or attack in "
            "float32",
        )
    vanished = ~of_margin.any(1)
    if (count := int(vanished.sum())) > SHARE * n:
        yield Finding(
            "vanishing",
            f"the gradient of the logits' margin is exactly zero for {count} of {n} images: "
            "rounding, thresholds or saturated activations mask it, and the failure of gradient "
            "attacks means nothing. Replace the masking part in the attack (BPDA), and attack "
            "without gradients (SPSA, Square)",
        )
    if (count := int((~of_ce.any(1) & ~vanished).sum())) > SHARE * n:
        yield Finding(
            "saturated",
            f"the cross-entropy's gradient is exactly zero for {count} of {n} images, but the "
            "logits' gradient is not: large logits saturate the softmax. Use losses without a "
            "softmax: APGD(loss='dlr'), CW, AutoAttack",
        )
    if bool(((of_margin - again).norm(dim=1) > 1e-3 * of_margin.norm(dim=1)).any()):
        yield Finding(
            "random_gradient",
            "two backward passes at the same image gave different gradients: average them over "
            "passes with AutoAttack(version='rand'), or disable the randomness",
        )


def _smooth_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The mean logit of the other classes minus the label's, which depends on every logit."""
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    own = z.gather(1, y.unsqueeze(1)).squeeze(1)
    return (z.sum(1) - own) / (z.shape[1] - 1) - own


def _examine_unbounded(
    model: Model, x: Tensor, y: Tensor, clip: tuple[float, float]
) -> Iterator[Finding]:
    lo, hi = clip
    if not (bool((x >= lo).all()) and bool((x <= hi).all())):
        return  # attacks reject such inputs with their own error
    width = hi - lo  # allows any image
    attack = PGD(width, width / 20, 50, loss="cw", random_start=False, clip=clip)
    x_adv = attack(model, x, y)
    robust = int((ModelOracle(model, x, y).logits(x_adv).argmax(1) == y).sum())
    if robust > max(2, SHARE * len(x)):
        yield Finding(
            "unbounded",
            f"{robust} of {len(x)} images are still classified correctly after PGD-50 with an "
            "unbounded perturbation. Either gradients are masked, or the model's output does not "
            "depend on the image. Attack without gradients (SPSA, Square), with adversarial "
            "examples of other models (transfer), or a differentiable approximation (BPDA)",
        )


def compare(attacks: Mapping[str, object], records: Mapping[str, Record]) -> list[Finding]:
    """Look for attacks that beat stronger ones on the same examples, within the same radius.

    The checks: ``one_step`` (a single step breaks examples that no iterative attack does),
    ``black_box`` (an attack without gradients breaks examples that none with gradients does),
    ``steps`` and ``restarts`` (more of them still help a lot). A check reports if more than two
    examples and more than 1% are affected.

    Args:
        attacks: by name; those that are not from this package are ignored.
        records: the results of each attack, by the same names.
    """
    known = {k: a for k, a in ((k, unwrap(a)) for k, a in attacks.items()) if isinstance(a, Attack)}
    found: list[Finding] = []
    for name, attack in known.items():
        if _one_step(attack) or not attack.uses_gradients:
            found += _beats_iterated(name, known, records)
    for setting in ("steps", "restarts"):
        found += _more_helps(setting, known, records)
    return found


def _beats_iterated(
    name: str, attacks: Mapping[str, Attack], records: Mapping[str, Record]
) -> Iterator[Finding]:
    """Whether a weak attack breaks examples that all iterative attacks with gradients did not."""
    attack, record = attacks[name], records[name]
    rivals = [k for k, a in attacks.items() if k != name and _is_stronger(a, attack)]
    alone = record.fooled.copy()
    for rival in rivals:
        alone &= records[rival].attacked & ~records[rival].fooled
    count, n = int(alone.sum()), int(record.attacked.sum())
    if not rivals or count <= max(2, 0.01 * n):
        return
    others = ", ".join(rivals)
    if _one_step(attack):
        yield Finding(
            "one_step",
            f"{name}, a single step, breaks {count} of {n} images that {others} did not: more "
            "steps should only help, so the loss is too rough or gradients are masked. Try smaller "
            "steps, more steps, restarts, and attacks without gradients (SPSA, Square)",
        )
    else:
        yield Finding(
            "black_box",
            f"{name}, which uses no gradients, breaks {count} of {n} images that {others} did not: "
            "gradients are masked, or the other attacks are too weak. Trust only the worst case, "
            "run AutoAttack, and look for the cause of the masking",
        )


def _more_helps(
    setting: str, attacks: Mapping[str, Attack], records: Mapping[str, Record]
) -> Iterator[Finding]:
    """Whether more steps or restarts, all else being equal, break many more examples."""
    for (a, less), (b, more) in itertools.permutations(attacks.items(), 2):
        few, many = getattr(less, setting, None), getattr(more, setting, None)
        if few is None or many is None or not few < many or type(less) is not type(more):
            continue
        second_step = setting == "steps" and few == 1  # which always helps
        if second_step or not _differ_only_in(setting, less, more):
            continue
        both = records[a].attacked & records[b].attacked
        n = int(both.sum())
        gain = int((records[b].fooled & both).sum()) - int((records[a].fooled & both).sum())
        if gain > max(2, 0.02 * n):
            yield Finding(
                setting,
                f"{b}, with {many} {setting}, breaks {gain} of {n} images more than {a} with "
                f"{few}: neither may have converged. Increase {setting} until this no longer "
                "helps, or use APGD, which adapts its step size",
            )


def _differ_only_in(setting: str, a: Attack, b: Attack) -> bool:
    if not dataclasses.is_dataclass(a):
        return False
    others = [f.name for f in dataclasses.fields(a) if f.name != setting]
    return all(getattr(a, name) == getattr(b, name) for name in others)


def _is_stronger(attack: Attack, weak: Attack) -> bool:
    """Whether an attack iterates with gradients, in the same ball as a weak one."""

    def ball(attack: Attack) -> tuple[object, object]:
        return getattr(attack, "norm", None), getattr(attack, "eps", None)

    return attack.uses_gradients and not _one_step(attack) and ball(attack) == ball(weak)


def _one_step(attack: Attack) -> bool:
    return isinstance(attack, FGSM) or getattr(attack, "steps", None) == 1


def remarks(batches: Sequence[Mapping[str, Outcome]]) -> Iterator[Finding]:
    """Report the warnings of attacks, and their outputs that did not count.

    The checks: ``outside`` (an attack left its ball or box), ``not_finite`` (NaN logits), and an
    attack's name for its own warnings.

    Args:
        batches: the outcomes of each batch by attack.
    """
    for name in batches[0]:
        outcomes = [batch[name] for batch in batches]
        if outside := sum(outcome.outside for outcome in outcomes):
            yield Finding(
                "outside",
                f"{name} returned {outside} examples outside its ball or box, or not finite, which "
                "do not count as broken. This is a bug in the attack",
            )
        if nan := sum(outcome.nan for outcome in outcomes):
            without = "without an attack" if name == NATURAL else f"under {name}"
            yield Finding(
                "not_finite",
                f"logits hold NaN for {nan} images {without}, which count as misclassified. Look "
                "for an overflow in the model",
            )
        notes = itertools.chain.from_iterable(outcome.notes for outcome in outcomes)
        yield from (Finding(name, note) for note in dict.fromkeys(notes))
