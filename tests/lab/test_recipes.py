"""The paper's runs by name."""

from __future__ import annotations

import pytest

from awp_optim.attacks import PGD
from awp_optim.lab.data import DATASETS
from awp_optim.lab.models import MODELS
from awp_optim.lab.recipes import RECIPES, defaults
from awp_optim.lab.trainer import Config
from awp_optim.objectives import AT, MART, TRADES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_name_says(name):
    recipe = RECIPES[name]
    method, run = name.split("/")
    dataset, norm, *arch = run.split("-")
    config = recipe.config
    assert config.method == method.removesuffix("-awp")
    assert (config.gamma > 0) == method.endswith("-awp")
    assert (recipe.dataset, config.norm) == (dataset, norm)
    assert dataset in DATASETS
    assert config.arch in MODELS
    assert (
        "".join(arch) == {"preact_resnet18": "preact18", "wide_resnet34_10": "wrn3410"}[config.arch]
    )
    assert (config.eps, config.epochs, config.batch_size) == (
        {"linf": 8 / 255, "l2": 128 / 255}[norm],
        200,
        128,
    )
    assert (config.momentum, config.weight_decay, config.schedule) == (0.9, 5e-4, "piecewise")
    assert all(0 < value < 100 for value in recipe.paper.values())


def test_the_case_study_of_section_4_4():
    recipe = RECIPES["at-awp/cifar10-linf-preact18"]
    assert recipe.config == Config(gamma=1e-2)
    assert recipe.config.training_attack == PGD(8 / 255, 2 / 255, 10, model_mode="train")
    assert recipe.config.test_attack == PGD(8 / 255, 2 / 255, 20)
    assert recipe.config.objective == AT()
    assert recipe.paper == {"best": 55.39, "last": 54.73}
    l2 = RECIPES["at/cifar100-l2-preact18"]
    assert l2.config.training_attack == PGD(128 / 255, 15 / 255, 10, norm="l2", model_mode="train")
    svhn = RECIPES["at-awp/svhn-linf-preact18"].config
    assert (svhn.step_size, svhn.lr, svhn.awp_start, svhn.gamma) == (1 / 255, 0.01, 5, 1e-2)


def test_table_2():
    trades, mart = (RECIPES[f"{m}-awp/cifar10-linf-wrn34-10"] for m in ("trades", "mart"))
    assert trades.config.objective == TRADES(beta=6.0)
    assert trades.config.training_attack == PGD(loss="kl", start_std=0.001)
    assert (trades.config.gamma, trades.config.awp_start) == (5e-3, 10)
    assert trades.paper["AutoAttack"] == 56.17
    assert mart.config.objective == MART(lam=6.0)
    assert (mart.config.gamma, mart.config.awp_start) == (5e-3, 0)
    assert len(RECIPES) == 18


def test_defaults_are_those_of_the_data_set():
    assert defaults("cifar10") == Config(gamma=1e-2)
    assert defaults("digits") == defaults("cifar10")
    svhn = defaults("svhn", method="trades")
    assert (svhn.step_size, svhn.lr, svhn.awp_start) == (1 / 255, 0.01, 5)
    assert (svhn.method, svhn.gamma) == ("trades", 5e-3)
    assert defaults("mine", "l2").eps == 128 / 255
