"""What docs/migration.md says about other implementations holds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from awp_optim import AWP
from awp_optim.integrations import perturb_only


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 3))


# ---------------------------------------------------------------- the authors' scripts


def test_against_a_proxy_network():
    """Equal to rounding without weight decay; with it, it acts on w + v there, on w here."""
    torch.manual_seed(0)
    theirs, ours = network().double(), network().double()
    x, y = torch.rand(8, 3, 2, 2).double(), torch.randint(3, (8,))
    gamma, lr, decay = 0.05, 0.1, 0.1
    chosen = perturb_only(ours, "weight", gamma=gamma)
    opt = AWP(chosen, torch.optim.SGD, lr=lr, weight_decay=decay)
    base = torch.optim.SGD(theirs.parameters(), lr=lr, weight_decay=decay)

    proxy = copy.deepcopy(theirs)
    (-F.cross_entropy(proxy(x), y)).backward()
    torch.optim.SGD(proxy.parameters(), lr=0.01).step()
    v = {}
    with torch.no_grad():
        for (n, w), u in zip(theirs.named_parameters(), proxy.parameters()):
            if w.ndim > 1:
                v[n] = gamma * w.norm() * (u - w) / (u - w).norm()
                w.add_(v[n])
    F.cross_entropy(theirs(x), y).backward()
    base.step()
    with torch.no_grad():
        for n, w in theirs.named_parameters():
            if n in v:
                w.sub_(v[n])

    F.cross_entropy(ours(x), y).backward()
    opt.first_step(zero_grad=True)
    F.cross_entropy(ours(x), y).backward()
    opt.second_step()
    for (n, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b + lr * decay * v.get(n, 0.0), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- the competition class


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
