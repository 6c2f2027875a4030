"""What RobustBench asks for with a new entry of its leaderboards, filled in from an evaluation.

Croce et al., "RobustBench: a standardized adversarial robustness benchmark", 2021
(https://arxiv.org/abs/2010.09670): the JSON that its repository keeps of every entry, in
``model_info``, and the text of its form for new models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from awp_optim.attacks import Attack, AutoAttack
from awp_optim.evaluation import Evaluation
from awp_optim.lab.reports.tables import radius

__all__ = ["BLANK", "check_test_set", "leaderboard_attack", "model_info", "submission_form"]

BLANK = "FILL IN: "
"""How everything begins that an evaluation cannot know."""
LEADERBOARDS = {("cifar10", "linf"): 8 / 255, ("cifar10", "l2"): 0.5, ("cifar100", "linf"): 8 / 255}
"""The eps of each leaderboard, by data set and norm."""
TEST_IMAGES = 10_000


def leaderboard_attack(dataset: str, norm: str, eps: float, attacks: Mapping[str, Attack]) -> str:
    """The name of the attack whose result a leaderboard lists.

    Raises:
        ValueError: There is no leaderboard for this threat, or AutoAttack's standard version by its
            authors' package is not among the attacks.
    """
    expected = LEADERBOARDS.get((dataset, norm))
    if expected is None or not math.isclose(eps, expected):
        known = "; ".join(f"{d}, {n}, eps {radius(e)}" for (d, n), e in LEADERBOARDS.items())
        raise ValueError(
            f"RobustBench has no leaderboard for {dataset}, {norm}, eps {radius(eps)}; it has: "
            f"{known}"
        )
    for name, attack in attacks.items():
        if not isinstance(attack, AutoAttack):
            continue
        if (attack.version, attack.backend) == ("standard", "reference"):
            return name
    raise ValueError(
        "RobustBench lists the accuracy under the standard version of AutoAttack by its authors' "
        "package: evaluate with --attacks autoattack, without --backend native"
    )


def check_test_set(images: int) -> None:
    """Raise ValueError unless all test images are evaluated."""
    if images != TEST_IMAGES:
        raise ValueError(
            f"RobustBench lists accuracies on all {TEST_IMAGES} test images, not on {images}"
        )


def model_info(
    r: Evaluation,
    attack: str,
    *,
    dataset: str,
    eps: float,
    arch: str | None,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """An entry of RobustBench's ``model_info``; what is not known begins with :data:`BLANK`.

    Args:
        r: The evaluation.
        attack: The name that :func:`leaderboard_attack` gave.
        dataset: The name of the data set.
        eps: The radius.
        arch: The name of the network, ours or as in papers; None if it is not known.
        run: The settings of the run that trained it; empty if they are not known.
    """
    robust = f"{100 * r.robust[attack]:.2f}"
    return {
        "link": f"{BLANK}URL of the paper",
        "name": f"{BLANK}title of the paper",
        "authors": f"{BLANK}authors of the paper",
        "additional_data": _additional_data(run, dataset),
        "number_forward_passes": 1 if arch else f"{BLANK}forward passes of a prediction",
        "dataset": dataset,
        "venue": f"{BLANK}venue and year",
        "architecture": _published(arch) if arch else f"{BLANK}name of the network",
        "eps": radius(eps),
        "clean_acc": f"{100 * r.natural:.2f}",
        "reported": robust,
        "autoattack_acc": robust,
        "footnote": f"{BLANK}such as the number of synthetic images in training, or null",
        "unreliable": bool(r.warnings),
    }


def submission_form(
    info: Mapping[str, Any], r: Evaluation, *, norm: str, method: str, checkpoint: str
) -> str:
    """The text of RobustBench's form for a new model.

    Args:
        info: What :func:`model_info` returned.
        r: The evaluation.
        norm: "linf" or "l2".
        method: How the evaluation was made.
        checkpoint: The file of the weights and its digest, or "".
    """
    extra = info["additional_data"]
    findings = "".join(f"\n  - {f.check}: {f.message}" for f in r.warnings)
    url = f"{BLANK}URL of {checkpoint}" if checkpoint else f"{BLANK}URL"
    return f"""\
Title: [New Model] {BLANK}<NameYearFirstWordOfTitle>

# Paper Information

- **Paper Title**: {info["name"]}
- **Paper URL**: {info["link"]}
- **Paper authors**: {info["authors"]}

# Leaderboard Claim(s)

## Model 1

- **Architecture**: {info["architecture"]}
- **Dataset**: {info["dataset"]}
- **Threat Model**: {norm.capitalize()}
- **eps**: {info["eps"]}
- **Clean accuracy**: {info["clean_acc"]}%
- **Robust accuracy**: {info["autoattack_acc"]}%
- **Additional data**: {extra if isinstance(extra, str) else str(extra).lower()}
- **Evaluation method**: AutoAttack (standard version, pyautoattack {version("pyautoattack")})
  on all {r.n} test images: `{method}`{findings}
- **Checkpoint and code**: {url}

# Model Zoo:

- [ ] I want to add my models to the Model Zoo (check if true)
- [ ] I use an architecture that is **not** included among those in
  robustbench/model_zoo/architectures (check if true)
- [ ] I agree to release my model(s) under MIT license (check if true) **OR**
- [ ] I want my models to be released under a custom license, located here: (URL of the license)
"""


def _additional_data(run: Mapping[str, Any], dataset: str) -> bool | str:
    """False if the run had the data set's images alone and began with no weights."""
    expected = {"dataset": dataset, "unlabeled_images": 0, "init": None}
    if run and all(run.get(name) == value for name, value in expected.items()):
        return False
    return f"{BLANK}true if it was trained on other real images, else false"


def _published(arch: str) -> str:
    """A network's name as leaderboards spell it.

    >>> _published("dm_wide_resnet28_10"), _published("preact_resnet18"), _published("WRN-28-10")
    ('WideResNet-28-10', 'PreActResNet-18', 'WRN-28-10')
    """
    if parts := re.fullmatch(r"(?:dm_)?(wide|preact)_resnet(\d+)(?:_(\d+))?", arch):
        family = {"wide": "WideResNet", "preact": "PreActResNet"}[parts[1]]
        return "-".join(filter(None, (family, parts[2], parts[3])))
    return arch.removeprefix("torchvision/")
