"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_code_of_the_readme_trains():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.rand(8, 3, 2, 2), torch.randint(3, (8,))

    class Scheduler:
        steps = 0

        def step(self):
            self.steps += 1

    names = {"model": model, "loader": [(x, y)] * 2, "scheduler": Scheduler()}
    names |= {"x": x, "y": y, "loss_fn": F.cross_entropy}
    before = model[1].weight.detach().clone()
    *training, evaluation = blocks
    for block in training:
        exec(block, names)
        assert not torch.equal(model[1].weight, before)
        assert not names["opt"].is_perturbed
        before = model[1].weight.detach().clone()
    assert names["scheduler"].steps == 2
    exec(evaluation, names)
    assert names["r"].n == 16
    assert set(names["r"].robust) == {"pgd20", "cw", "apgd"}


def test_the_readme_names_what_there_is():
    import awp_optim
    import awp_optim.attacks
    import awp_optim.evaluation
    import awp_optim.landscape
    import awp_optim.objectives

    modules = (
        awp_optim,
        awp_optim.attacks,
        awp_optim.evaluation,
        awp_optim.landscape,
        awp_optim.objectives,
    )
    for module in modules:
        for name in module.__all__:
            if name not in ("Attack", "Evaluation", "Finding", "Objective", "Record"):
                assert name in README, f"{name} is not in the README"
