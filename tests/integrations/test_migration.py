"""What docs/migration.md says about the competition class; for proxies see core/test_algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from awp_optim import AWP
from awp_optim.integrations import perturb_only


def competition_step(w: Tensor, g: Tensor, adv_lr: float, adv_eps: float) -> Tensor:
    """Their v of one tensor."""
    move = adv_lr * w.norm() * g / g.norm()
    box = adv_eps * w.abs()
    return move.clamp(-box, box)


@pytest.mark.parametrize(
    ("adv_lr", "adv_eps", "size", "cosine"),
    [
        # lowest and highest length over min(adv_lr, adv_eps) |w|, lowest and highest cosine
        (1e-4, 1e-2, (0.95, 1.0), (0.98, 1.0)),
        (1e-3, 1e-2, (0.8, 1.0), (0.9, 1.0)),
        (1.0, 1e-2, (0.9, 1.0), (0.4, 0.85)),
    ],
)
def test_what_the_competition_settings_become(adv_lr, adv_eps, size, cosine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 64), nn.GELU(), nn.Linear(64, 3))
    x, y = torch.randn(64, 3, 2, 2), torch.randint(3, (64,))
    F.cross_entropy(model(x), y).backward()
    gamma = min(adv_lr, adv_eps)
    opt = AWP(perturb_only(model, "weight", gamma=gamma), torch.optim.SGD, lr=0.1)
    theirs = {
        p: competition_step(p.detach().clone(), p.grad.clone(), adv_lr, adv_eps)
        for p in model.parameters()
    }
    opt.first_step()
    ours = opt.perturbation()
    opt.restore()
    assert len(ours) == 2
    for p, v in ours.items():
        t = theirs[p]
        assert size[0] <= (t.norm() / (gamma * p.norm())).item() <= size[1] + 1e-4
        cos = F.cosine_similarity(t.flatten(), v.flatten(), 0).item()
        assert cosine[0] <= cos <= cosine[1] + 1e-4
