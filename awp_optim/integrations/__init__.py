"""Which weights AWP perturbs, from when on, and AWP in training frameworks.

Nothing in the core imports this package, and importing it needs torch alone.
"""

from awp_optim.integrations.groups import perturb_only
from awp_optim.integrations.start import StartWhen

__all__ = ["StartWhen", "perturb_only"]
