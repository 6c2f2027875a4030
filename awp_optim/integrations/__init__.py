"""AWP where its users train: which weights to perturb, from when on, and in which framework.

Nothing here is imported by the core, and importing it needs torch alone.
"""

from awp_optim.integrations.groups import perturb_only
from awp_optim.integrations.start import StartWhen

__all__ = ["StartWhen", "perturb_only"]
