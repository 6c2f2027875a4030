"""Adversarial attacks on the input: immutable values, called as ``x_adv = attack(model, x, y)``."""

from awp_optim.attacks.apgd import APGD
from awp_optim.attacks.autoattack import AutoAttack, AutoAttackWarning
from awp_optim.attacks.base import Attack
from awp_optim.attacks.captured import Captured
from awp_optim.attacks.cw import CW
from awp_optim.attacks.fgsm import FGSM
from awp_optim.attacks.nfgsm import NFGSM
from awp_optim.attacks.pgd import PGD
from awp_optim.attacks.spsa import SPSA

__all__ = [
    "APGD",
    "CW",
    "FGSM",
    "NFGSM",
    "PGD",
    "SPSA",
    "Attack",
    "AutoAttack",
    "AutoAttackWarning",
    "Captured",
]
