"""The paper's runs by name."""

from __future__ import annotations

import pytest

from awp_optim.attacks import PGD
from awp_optim.lab.config import Config
from awp_optim.lab.data import DATASETS
from awp_optim.lab.models import MODELS
from awp_optim.lab.recipes import RECIPES, defaults
from awp_optim.objectives import AT, MART, TRADES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_name_says(name):
    recipe = RECIPES[name]
    method, run = name.split("/")
    dataset, norm, *arch = run.split("-")
    config = recipe.config
    base, _, extra = method.partition("-")
    assert config.method == base
    assert (config.gamma > 0) == (extra == "awp")
    regulariser = {"l1": 5e-6, "l2": 5e-3, "cutout": 14, "mixup": 1.4}
    for field, value in regulariser.items():
        assert getattr(config, field) == (value if extra == field else 0)
    assert (recipe.dataset, config.norm) == (dataset, norm)
    assert dataset in DATASETS
    assert config.arch in MODELS
    arches = {
        "preact_resnet18": "preact18",
        "wide_resnet34_10": "wrn3410",
        "wide_resnet28_10": "wrn2810",
    }
    assert "".join(arch) == arches[config.arch]
    assert config.eps == {"linf": 8 / 255, "l2": 128 / 255}[norm]
    assert (config.epochs, config.schedule) == (
        (50, "cosine") if base == "pretrain" else (200, "piecewise")
    )
    assert config.batch_size == (256 if base == "rst" else 128)
    assert (config.momentum, config.weight_decay) == (0.9, 5e-4)
    assert bool(recipe.needs) == (base in ("rst", "pretrain"))
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
    rst, pretrain = (RECIPES[f"{m}-awp/cifar10-linf-wrn28-10"] for m in ("rst", "pretrain"))
    assert (rst.config.objective, rst.config.unlabeled_share) == (TRADES(beta=6.0), 0.5)
    assert pretrain.config.objective == AT()
    assert (pretrain.config.lr, pretrain.config.gamma) == (0.001, 5e-3)
    assert (rst.paper["AutoAttack"], pretrain.paper["AutoAttack"]) == (60.05, 57.39)


def test_tables_4_and_5():
    assert RECIPES["at-mixup/cifar10-linf-preact18"].paper == {
        "best": 52.87,
        "last": 49.76,
        "natural, best": 78.76,
        "natural, last": 78.50,
    }
    assert RECIPES["at-l2/cifar10-l2-preact18"].paper["last"] == 63.62
    assert [sum(r.table == t for r in RECIPES.values()) for t in (1, 2, 4, 5)] == [12, 10, 4, 4]


def test_defaults_are_those_of_the_data_set():
    assert defaults("cifar10") == Config(gamma=1e-2)
    assert defaults("digits") == defaults("cifar10")
    svhn = defaults("svhn", method="trades")
    assert (svhn.step_size, svhn.lr, svhn.awp_start) == (1 / 255, 0.01, 5)
    assert (svhn.method, svhn.gamma) == ("trades", 5e-3)
    assert defaults("cifar10", method="trades").awp_start == 10
    assert defaults("digits", method="trades").awp_start == 0
    pretrain, rst = (defaults("cifar10", method=m) for m in ("pretrain", "rst"))
    assert (pretrain.epochs, pretrain.lr, pretrain.schedule) == (50, 0.001, "cosine")
    assert (rst.epochs, rst.batch_size, rst.gamma) == (200, 256, 5e-3)
    assert defaults("mine", "l2").eps == 128 / 255
