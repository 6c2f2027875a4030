"""Adversarial attacks on the input: immutable values, called as ``x_adv = attack(model, x, y)``."""

from .base import Attack
from .captured import Captured
from .fgsm import FGSM
from .pgd import PGD

__all__ = ["FGSM", "PGD", "Attack", "Captured"]
