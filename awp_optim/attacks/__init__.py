"""Adversarial attacks on the input: immutable values, called as ``x_adv = attack(model, x, y)``."""

from .apgd import APGD
from .autoattack import AutoAttack, AutoAttackWarning
from .base import Attack
from .captured import Captured
from .cw import CW
from .fgsm import FGSM
from .pgd import PGD
from .spsa import SPSA

__all__ = [
    "APGD",
    "CW",
    "FGSM",
    "PGD",
    "SPSA",
    "Attack",
    "AutoAttack",
    "AutoAttackWarning",
    "Captured",
]
