"""Adversarial weight perturbation (AWP) for PyTorch."""

from awp_optim.batchnorm import frozen_batch_norm
from awp_optim.optimizer import AWP
from awp_optim.step import AdversarialStep

__all__ = ["AWP", "AdversarialStep", "frozen_batch_norm"]
__version__ = "0.2.0"
