"""Attacks by their names on the command line, with the paper's settings."""

from __future__ import annotations

import re
from collections.abc import Callable

from awp_optim.attacks import APGD, CW, FGSM, PGD, SPSA, Attack, AutoAttack

__all__ = ["NAMES", "make_attack", "make_attacks"]

NAMES = (
    "fgsm, pgdN (pgd20, pgd100), pgdNxR with R restarts (pgd50x10), cw, spsa, apgd, apgd-dlr, "
    "apgd-t, fab-t, square, autoattack (or aa), autoattack-plus, autoattack-rand"
)

_AUTOATTACKS = {"autoattack": "standard", "autoattack-plus": "plus", "autoattack-rand": "rand"}
_ATTACKS: dict[str, Callable[[float, str], Attack]] = {
    "fgsm": lambda eps, norm: FGSM(eps, norm),
    "cw": lambda eps, norm: CW(eps, norm=norm),
    "spsa": lambda eps, norm: SPSA(eps, norm=norm),
    "apgd": lambda eps, norm: APGD(eps, norm=norm, loss="ce", drop_fooled=True),
    "apgd-dlr": lambda eps, norm: APGD(eps, norm=norm, loss="dlr", drop_fooled=True),
    "apgd-t": lambda eps, norm: APGD(eps, norm=norm, loss="dlr-targeted", drop_fooled=True),
    "fab-t": lambda eps, norm: AutoAttack(eps, norm, "custom", ("fab-t",)),
    "square": lambda eps, norm: AutoAttack(eps, norm, "custom", ("square",)),
}


def make_attack(name: str, eps: float, norm: str, backend: str = "reference") -> Attack:
    """An attack by its name.

    Args:
        name: one of :data:`NAMES`.
        eps: the radius.
        norm: "linf", "l2" or "l1".
        backend: AutoAttack's, "reference" or "native".

    Raises:
        ValueError: there is no such attack, or it does not exist in this norm.
    """
    if pgd := re.fullmatch(r"pgd([1-9]\d*)(?:x([1-9]\d*))?", name):
        step_size = eps / (4 if norm == "linf" else 8) or 1.0  # with eps=0 there are no steps
        return PGD(eps, step_size, int(pgd[1]), norm, restarts=int(pgd[2] or 1))
    if name in _AUTOATTACKS:
        return AutoAttack(eps, norm, _AUTOATTACKS[name], backend=backend)
    if name in _ATTACKS:
        return _ATTACKS[name](eps, norm)
    raise ValueError(f"no attack {name!r}; there are: {NAMES}")


def make_attacks(names: str, eps: float, norm: str, backend: str) -> dict[str, Attack]:
    """Attacks from their names, separated by commas."""
    attacks: dict[str, Attack] = {}
    for name in names.split(","):
        name = re.sub(r"^aa(?=-|$)", "autoattack", name.strip())
        if name in attacks:
            raise ValueError(f"--attacks names {name} twice")
        try:
            attacks[name] = make_attack(name, eps, norm, backend)
        except ValueError as error:
            raise ValueError(f"--attacks {name}: {error}") from error
    return attacks
