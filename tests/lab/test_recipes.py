"""The paper's runs by name."""

from __future__ import annotations

import pytest
import torch

from awp_optim.attacks import PGD
from awp_optim.lab.config import Config
from awp_optim.lab.data import DATASETS
from awp_optim.lab.models import build_model
from awp_optim.lab.recipes import PAPER, RECIPES, defaults
from awp_optim.lab.training_set import split_batch
from awp_optim.objectives import AT, GKL, MART, SCORE, TRADES

ARCHES = {
    "preact18": "preact_resnet18",
    "wrn34-10": "wide_resnet34_10",
    "wrn28-10": "wide_resnet28_10",
}
REGULARIZERS = {"l1": 5e-6, "l2": 5e-3, "cutout": 14, "mixup": 1.4}
TABLES = {"preact18": ("Table 1", "Table 4", "Table 5"), "wrn34-10": ("Table 2",)}
TABLES["wrn28-10"] = TABLES["wrn34-10"]


@pytest.mark.parametrize("name", PAPER)
def test_a_run_of_the_paper_is_what_its_name_says(name):
    recipe = PAPER[name]
    method, run = name.split("/")
    dataset, norm, arch = run.split("-", 2)
    config = recipe.config
    base, _, extra = method.partition("-")
    assert config.method == base
    assert (config.gamma > 0) == (extra == "awp")
    for field, value in REGULARIZERS.items():
        assert getattr(config, field) == (value if extra == field else 0)
    assert (recipe.dataset, config.norm, config.arch) == (dataset, norm, ARCHES[arch])
    assert dataset in DATASETS
    assert recipe.source in TABLES[arch]
    assert config.eps == {"linf": 8 / 255, "l2": 128 / 255}[norm]
    schedule = (50, "cosine") if base == "pretrain" else (200, "piecewise")
    assert (config.epochs, config.schedule) == schedule
    assert config.batch_size == (256 if base == "rst" else 128)
    assert (config.momentum, config.weight_decay) == (0.9, 5e-4)
    assert bool(recipe.needs) == (base in ("rst", "pretrain"))
    assert all(0 < value < 100 for value in recipe.reported.values())


def test_the_case_study_of_section_4_4():
    recipe = RECIPES["at-awp/cifar10-linf-preact18"]
    assert recipe.config == Config(gamma=1e-2)
    assert recipe.config.training_attack == PGD(8 / 255, 2 / 255, 10, model_mode="train")
    assert recipe.config.test_attack == PGD(8 / 255, 2 / 255, 20)
    assert recipe.config.objective == AT()
    assert recipe.reported == {"best": 55.39, "last": 54.73}
    l2 = RECIPES["at/cifar100-l2-preact18"]
    assert l2.config.training_attack == PGD(128 / 255, 15 / 255, 10, norm="l2", model_mode="train")
    svhn = RECIPES["at-awp/svhn-linf-preact18"].config
    assert (svhn.step_size, svhn.lr, svhn.awp_start, svhn.gamma) == (1 / 255, 0.01, 5, 1e-2)


@pytest.mark.parametrize(
    ("name", "objective", "start", "autoattack"),
    [
        ("trades-awp/cifar10-linf-wrn34-10", TRADES(beta=6.0), 10, 56.17),
        ("mart-awp/cifar10-linf-wrn34-10", MART(lam=6.0), 0, 54.23),
        ("rst-awp/cifar10-linf-wrn28-10", TRADES(beta=6.0), 0, 60.05),
        ("pretrain-awp/cifar10-linf-wrn28-10", AT(), 0, 57.39),
    ],
)
def test_table_2(name, objective, start, autoattack):
    recipe = RECIPES[name]
    assert recipe.config.objective == objective
    assert (recipe.config.gamma, recipe.config.awp_start) == (5e-3, start)
    assert recipe.reported["AutoAttack"] == autoattack


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_built(name):
    recipe = RECIPES[name]
    config = recipe.config
    assert recipe.dataset in DATASETS
    with torch.device("meta"):
        build_model(config.arch, num_classes=10, in_channels=3, activation=config.activation)
    assert (config.gamma > 0) == ("awp" in name.split("/")[0])
    assert isinstance(config.objective.attack_loss, str)
    if "edm1m" in name:
        assert recipe.needs


def test_a_growing_radius():
    gkl = RECIPES["gkl-awp/cifar10-linf-wrn34-10"].config
    attack = {"loss": "kl", "model_mode": "eval", "start_std": 0.001}
    assert gkl.training_attack_in(99) == PGD(4 / 255, 2 / 255, 5, **attack)
    assert gkl.training_attack_in(199) == PGD(8 / 255, 4 / 255, 5, **attack)
    assert gkl.objective == GKL(alpha=4.0, beta=20.0)
    assert gkl.test_attack.eps == 8 / 255


def test_generated_images():
    config = RECIPES["rst-awp/cifar10-linf-wrn28-10-edm1m"].config
    assert split_batch(config.batch_size, config.unlabeled_share) == (154, 358)
    assert config.objective == TRADES(5.0, label_smoothing=0.1)
    assert config.ema_start == 0.025 * config.epochs  # where the schedule has its peak


def test_defaults_are_those_of_the_data_set():
    assert defaults("cifar10") == defaults("digits") == Config(gamma=1e-2)
    svhn = defaults("svhn", method="trades")
    assert (svhn.step_size, svhn.lr, svhn.awp_start) == (1 / 255, 0.01, 5)
    assert (svhn.method, svhn.gamma) == ("trades", 5e-3)
    assert defaults("cifar10", method="trades").awp_start == 10
    assert defaults("digits", method="trades").awp_start == 0
    assert defaults("cifar10", method="gkl").objective == GKL(4.0, 20.0)
    assert defaults("cifar10", method="score").objective == SCORE(4.0)
    pretrain, rst = (defaults("cifar10", method=m) for m in ("pretrain", "rst"))
    assert (pretrain.epochs, pretrain.lr, pretrain.schedule) == (50, 0.001, "cosine")
    assert (rst.epochs, rst.batch_size, rst.gamma) == (200, 256, 5e-3)
    assert defaults("mine", "l2").eps == 128 / 255
