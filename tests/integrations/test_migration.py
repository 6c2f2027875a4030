"""The code of docs/migration.md runs as it stands, and what it says of the others is so."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from awp_optim import AWP
from awp_optim.attacks import PGD
from awp_optim.integrations import perturb_only

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "migration.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# (before|after)\n(.*?)```", TEXT, re.S)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def names() -> dict[str, Any]:
    model = network()
    x, y = torch.rand(16, 3, 2, 2), torch.randint(3, (16,))
    return {
        "torch": torch,
        "model": model,
        "loader": [(x[:8], y[:8]), (x[8:], y[8:])],
        "attack": PGD(eps=0.1, step_size=0.05, steps=2),
        "loss_fn": F.cross_entropy,
        "epochs": 2,
        "awp_warmup": 1,
    }


def test_every_before_has_its_after():
    assert [kind for kind, _ in BLOCKS] == ["before", "after"] * 4
    assert TEXT.count("```python") == 8


@pytest.mark.parametrize("code", [code for kind, code in BLOCKS if kind == "after"])
def test_the_code_runs_and_perturbs(code):
    space = names()
    before = copy.deepcopy(space["model"].state_dict())
    steps: list[bool] = []
    first_step = AWP.first_step

    def counted(self: AWP, *args: Any, **kwargs: Any) -> None:
        first_step(self, *args, **kwargs)
        steps.append(any(v.any() for v in self.perturbation().values()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AWP, "first_step", counted)
        exec(code, space)
    assert any(steps)
    assert not space["opt"].is_perturbed
    assert all(not torch.equal(p, before[n]) for n, p in space["model"].named_parameters())
    if "StartWhen(epoch=" in code:  # nothing in the first of the two epochs
        assert sum(steps) == 2


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
