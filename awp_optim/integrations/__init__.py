"""AWP for chosen weights, with a delayed start, and in training frameworks.

The core does not import this package, and importing it needs only torch.
"""

from awp_optim.integrations.groups import perturb_only
from awp_optim.integrations.start import StartWhen

__all__ = ["StartWhen", "perturb_only"]
