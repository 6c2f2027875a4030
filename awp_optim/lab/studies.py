"""Comparisons as data: settings, what each is a change of, and how to draw them.

Those of Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust Generalization" (NeurIPS
2020): the methods of Table 2, Figure 2 (a), (b) and (d), Figure 3 (c) and (d) with Tables 4 and 5;
and one on a part of CIFAR-10 that a CPU can train on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from awp_optim.attacks.losses import compares_with_clean
from awp_optim.lab.config import Config
from awp_optim.lab.recipes import RECIPES
from awp_optim.lab.reports.plots import ablations, curve_panels, perturbation_sizes
from awp_optim.lab.reports.summary import Runs

__all__ = ["RECIPE_OF", "STUDIES", "Study", "passes"]

# gamma of the paper: Table 1 (AT) and Table 2; no value was chosen by its result.
AT_GAMMA, GAMMA = 1e-2, 5e-3
PAPER_GAMMAS = (
    f"gamma {AT_GAMMA:g} with AT, as in Table 1 of the paper, and {GAMMA:g} with the others, as in "
    "Table 2"
)
GAMMAS = (1e-4, 1e-3, 5e-3, 1e-2, 2e-2)
RWP_GAMMA = 0.3  # the largest that does not lower robust accuracy in Figure 3 (c)
RWP_GAMMAS = (1e-3, 1e-2, 0.1, 0.3, 0.6, 1.0, 2.0)
FINE_TUNING: dict[str, Any] = {"lr": 0.03, "schedule": "cosine"}
"""Settings of fine-tuning on the digits, from pre-trained weights.

The rate is the best of 0.001 (the paper's), 0.01, 0.03 and 0.1 for plain pre-training, without AWP:
robust test accuracy 20.1, 59.6, 69.3 and 68.9%, on a seed that is not among those reported.
"""


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        title: what is compared.
        configs: the settings by label.
        compared_with: for the label of each change, the label of what was changed.
        draw: draws the runs of all labels to a file, under a title.
        note: what a reader of the tables must know about the settings.
    """

    title: str
    configs: dict[str, Config]
    compared_with: dict[str, str]
    draw: Callable[[Mapping[str, Runs], Path, str], None]
    note: str


def methods(base: Config, *, digits: bool) -> Study:
    """Each method with and without AWP."""
    plain = {
        "AT": base,
        "TRADES": replace(base, method="trades"),
        "MART": replace(base, method="mart"),
    }
    note = f"{PAPER_GAMMAS}."
    if digits:
        plain["RST"] = replace(base, method="rst")
        plain["Pre-training"] = replace(base, method="pretrain", **FINE_TUNING)
        note += (
            " RST: adds the other training images, labeled by a classifier that was trained"
            " naturally on the labeled ones. Pre-training: adversarial, without AWP, on the other"
            " images with the classes odd and even; then fine-tuning with a cosine schedule from"
            f" {FINE_TUNING['lr']:g}."
        )
    else:
        rst, pretrain = (RECIPES[f"{m}/cifar10-linf-wrn28-10"].needs for m in ("rst", "pretrain"))
        note += f" Left out, see awp train: RST needs {rst}; pre-training needs {pretrain}."
    configs = {}
    for name, config in plain.items():
        configs[name] = config
        configs[f"{name}-AWP"] = replace(config, gamma=AT_GAMMA if name == "AT" else GAMMA)

    def draw(runs: Mapping[str, Runs], file: Path, title: str) -> None:
        pairs = {n: {"without AWP": runs[n], "with AWP": runs[f"{n}-AWP"]} for n in plain}
        curve_panels(pairs, file, title)

    return Study(
        "Methods with and without AWP", configs, {f"{n}-AWP": n for n in plain}, draw, note
    )


def figure2(base: Config, *, digits: bool) -> Study:
    """How often the weights are perturbed, how far, and in which norm."""
    configs = {"AT": base, "TRADES": replace(base, method="trades")}
    changed = {"AT-AWP": base, "TRADES-AWP": configs["TRADES"]}
    changed["AT-AWP, L1"] = replace(base, awp_norm="l1")
    sizes = {name: {gamma: f"{name}, gamma {gamma:g}" for gamma in GAMMAS} for name in changed}
    for name, labels in sizes.items():
        configs |= {label: replace(changed[name], gamma=g) for g, label in labels.items()}
    one = sizes["AT-AWP"][AT_GAMMA]
    steps = {"K2": {"1": one}, "A": {"1": one}}
    for name, field, values in (("K2", "ascent_steps", (5, 10)), ("A", "alternations", (2, 3))):
        for value in values:
            label = steps[name][str(value)] = f"{one}, {name} = {value}"
            change: dict[str, Any] = {field: value}
            configs[label] = replace(configs[one], **change)
    sizes["AT-AWP"][0.0], sizes["TRADES-AWP"][0.0] = "AT", "TRADES"

    def draw(runs: Mapping[str, Runs], file: Path, title: str) -> None:
        cost = {label: passes(config) / passes(base) for label, config in configs.items()}
        bars = {n: {v: (runs[k], cost[k]) for v, k in of.items()} for n, of in steps.items()}
        ablations(bars, _by_gamma(runs, sizes), file, title)

    compared_with = {label: label.split("-AWP")[0] for label in configs if "-AWP" in label}
    note = f"K2 and A are varied at gamma {AT_GAMMA:g}; where they are not given they are 1."
    return Study("The perturbation's steps, size and norm", configs, compared_with, draw, note)


def regularizers(base: Config, *, digits: bool) -> Study:
    """AWP, other regularization of weights, and data augmentation."""
    changes: dict[str, dict[str, Any]] = {
        "AT-AWP": {"gamma": AT_GAMMA},
        "RWP": {"gamma": RWP_GAMMA, "direction": "random"},
        "L1": {"l1": 5e-6},
        "L2": {"l2": 5e-3},
        "Cutout": {"cutout": 4 if digits else 14},  # of 8 and of 32 pixels
        "Mixup": {"mixup": 1.4},
        "Label smoothing": {"label_smoothing": 0.1},
    }
    configs = {"AT": base} | {name: replace(base, **change) for name, change in changes.items()}

    def draw(runs: Mapping[str, Runs], file: Path, title: str) -> None:
        curve_panels({n: {"AT": runs["AT"], "with it": runs[n]} for n in changes}, file, title)

    values = "; ".join(
        f"{name}: {', '.join(f'{k} {v}' for k, v in change.items())}"
        for name, change in changes.items()
    )
    note = f'{values}. Early stopping is AT\'s "best". Label smoothing is not in the paper.'
    return Study("AWP and other regularization", configs, dict.fromkeys(changes, "AT"), draw, note)


def rwp(base: Config, *, digits: bool) -> Study:
    """Adversarial and random perturbation of every size."""
    kinds = {"AWP": (base, GAMMAS), "RWP": (replace(base, direction="random"), RWP_GAMMAS)}
    configs, sizes = {"AT": base}, {}
    for name, (config, gammas) in kinds.items():
        labels = {gamma: f"{name}, gamma {gamma:g}" for gamma in gammas}
        configs |= {label: replace(config, gamma=g) for g, label in labels.items()}
        sizes[name] = {0.0: "AT", **labels}

    def draw(runs: Mapping[str, Runs], file: Path, title: str) -> None:
        perturbation_sizes(_by_gamma(runs, sizes), file, title)

    compared_with = {label: "AT" for label in configs if label != "AT"}
    note = "RWP: along a random direction, of length gamma |w| in every layer."
    return Study("Adversarial and random weight perturbation", configs, compared_with, draw, note)


def cifar10_small(base: Config, *, digits: bool) -> Study:
    """AT, TRADES and MART with and without AWP, and AT with random perturbation."""
    configs = {
        "AT": base,
        "AT-AWP": replace(base, gamma=AT_GAMMA),
        "AT-RWP": replace(base, gamma=RWP_GAMMA, direction="random"),
    }
    for name, config in (
        ("TRADES", replace(base, method="trades")),
        ("MART", replace(base, method="mart")),
    ):
        configs |= {name: config, f"{name}-AWP": replace(config, gamma=GAMMA)}
    compared_with = {label: label.split("-")[0] for label in configs if "-" in label}

    def draw(runs: Mapping[str, Runs], file: Path, title: str) -> None:
        pairs = {
            f"{of} and {label}": {"without perturbation": runs[of], "with it": runs[label]}
            for label, of in compared_with.items()
        }
        curve_panels(pairs, file, title)

    note = (
        f"{PAPER_GAMMAS}. RWP: a random direction, gamma {RWP_GAMMA:g}, the largest that does not"
        " lower robust accuracy in Figure 3 (c) of the paper."
    )
    return Study("A part of CIFAR-10", configs, compared_with, draw, note)


STUDIES: dict[str, Callable[..., Study]] = {
    study.__name__.replace("_", "-"): study
    for study in (methods, figure2, regularizers, rwp, cifar10_small)
}
"""By name: a function of the settings of plain adversarial training, and of whether these are the
quickstart's (``digits``)."""
RECIPE_OF = {"cifar10-small": "at/cifar10-small"}
"""The recipe of a study that is not for the quickstart's task, where no other is given."""


def _by_gamma(
    runs: Mapping[str, Runs], labels: Mapping[str, Mapping[float, str]]
) -> dict[str, dict[float, Runs]]:
    return {name: {g: runs[label] for g, label in of.items()} for name, of in labels.items()}


def passes(config: Config) -> int:
    """The cost of a training step with an exact v: 23 for AT with PGD-10, 26 for AT-AWP.

    A forward pass, a backward pass to the inputs and one to the weights count 1 each; an objective
    of natural and adversarial images makes two of each.
    """
    attack = 2 * config.training_attack.gradient_passes + compares_with_clean(
        config.training_attack.loss
    )
    update = 6 if config.objective.needs_natural else 3
    if not config.gamma:
        return attack + update
    ascents = config.ascent_steps * update if config.direction == "gradient" else 0
    return config.alternations * (attack + ascents) + update
