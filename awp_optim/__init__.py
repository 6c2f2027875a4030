"""Adversarial weight perturbation (AWP) for PyTorch."""

from awp_optim.optimizer import AWP

__all__ = ["AWP"]
__version__ = "0.1.0"
