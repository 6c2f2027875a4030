"""Adversarial weight perturbation (AWP) for PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["AWP", "AdversarialStep", "frozen_batch_norm"]
__version__ = "0.2.0"

if TYPE_CHECKING:
    from awp_optim.batchnorm import frozen_batch_norm
    from awp_optim.optimizer import AWP
    from awp_optim.step import AdversarialStep
else:
    # Imported when they are first used, so that ``awp --help`` need not wait for torch (PEP 562).
    _MODULES = {"AWP": "optimizer", "AdversarialStep": "step", "frozen_batch_norm": "batchnorm"}
    _PACKAGES = ("attacks", "evaluation", "integrations", "landscape", "objectives")

    def __getattr__(name):
        if name in _MODULES:
            return getattr(import_module(f"awp_optim.{_MODULES[name]}"), name)
        if name in _PACKAGES:
            return import_module(f"awp_optim.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *_MODULES, *_PACKAGES})
