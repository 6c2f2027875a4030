"""The settings of a run: their ranges, what they stand for, older versions of them."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import get_args

import pytest

from awp_optim.attacks import NFGSM, PGD
from awp_optim.lab.config import Config, Method
from awp_optim.lab.models import ACTIVATIONS
from awp_optim.objectives import AT, GKL, MART, SCORE, TRADES


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        *((name, "nope", "must be one of") for name in ("method", "schedule", "precision")),
        *((name, "nope", "must be one of") for name in ("activation", "select_on", "norm")),
        *((name, "momentum", "must be one of") for name in ("direction", "ascent")),
        *((name, 0, "at least 1") for name in ("epochs", "batch_size", "alternations")),
        *((name, -1, "at least 0") for name in ("patience", "save_every", "awp_start")),
        *((name, 1.0, r"in \[0, 1\)") for name in ("momentum", "ema", "label_smoothing")),
        ("attack_mode", "both", "must be one of"),
        ("mixup", -1.0, "finite and >= 0"),
        ("alpha", -1.0, "finite and >= 0"),
        ("ascent_below", math.nan, "finite and >= 0"),
        ("lr", math.nan, "finite and >= 0"),
        ("l2", math.inf, "finite and >= 0"),
        ("unlabeled_share", 1.0, r"in \(0, 1\)"),
        *(("bn_momentum", value, r"in \(0, 1\]") for value in (0.0, 1.1)),
        ("seed", 10**20, "2"),
    ],
)
def test_bad_settings_are_named(name, value, match):
    with pytest.raises(ValueError, match=f"{name} must be .*{match}|{name} {match}"):
        Config(**{name: value})


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        Config(nesterov=True, momentum=0.0)


@pytest.mark.parametrize("name", ["ema_start", "ema_warmup"])
def test_settings_of_the_average_need_an_average(name):
    with pytest.raises(ValueError, match="need ema"):
        Config(**{name: 1})


@pytest.mark.parametrize(
    ("name", "size"), [("awp_start", {"gamma": 0.01}), ("ema_start", {"ema": 0.9})]
)
def test_what_never_begins_is_refused(name, size):
    option = f"--{name.replace('_', '-')} 0"
    for epochs in (1, 3):
        with pytest.raises(ValueError, match=rf"{name} \(3\) must be below epochs.*{option}"):
            Config(**size, **{name: 3}, epochs=epochs)
    Config(**size, **{name: 3}, epochs=4)
    Config(awp_start=3, epochs=1)  # as in a recipe whose gamma is set to 0


@pytest.mark.parametrize("change", [{"ascent_below": 1.7}, {"ascent_steps": 2}])
def test_the_gradient_of_the_attack_is_one_and_of_all_examples(change):
    with pytest.raises(ValueError, match="need ascent exact"):
        Config(ascent="attack", alternations=2, **change)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixing_needs_pairs(name):
    with pytest.raises(ValueError, match="batch_size"):
        Config(**{name: 1.0}, batch_size=1)


def test_images_are_mixed_in_one_way():
    with pytest.raises(ValueError, match="mixup and cutmix: give one"):
        Config(mixup=1.0, cutmix=1.0)


def test_each_method_has_its_published_attack_and_objective():
    methods = get_args(Method)
    of = {method: Config(method=method, beta=3.0, label_smoothing=0.1) for method in methods}
    assert {m: c.objective for m, c in of.items()} == {
        "at": AT(label_smoothing=0.1),
        "trades": TRADES(beta=3.0, label_smoothing=0.1),
        "mart": MART(lam=3.0, label_smoothing=0.1),
        "rst": TRADES(beta=3.0, label_smoothing=0.1),
        "pretrain": AT(label_smoothing=0.1),
        "gkl": GKL(alpha=4.0, beta=3.0, label_smoothing=0.1),
        "score": SCORE(beta=3.0, label_smoothing=0.1),
    }
    attacks = {m: c.training_attack for m, c in of.items()}
    assert attacks["at"] == attacks["pretrain"] == PGD(model_mode="train")
    assert attacks["trades"] == attacks["rst"] == PGD(loss="kl", start_std=0.001)
    assert attacks["gkl"] == attacks["trades"]
    assert attacks["score"] == PGD(loss="score")
    assert attacks["mart"] == PGD(start_std=0.001)
    assert {c.test_attack for c in of.values()} == {PGD(steps=20)}
    assert Config(attack_mode="eval").training_attack == PGD()


def test_single_step_training():
    config = Config(train_attack="n-fgsm", eps=0.1, step_size=0.3)
    assert config.training_attack == NFGSM(0.1, model_mode="train")
    assert config.test_attack == PGD(0.1, 0.3, 20)
    trades = replace(config, method="trades")
    assert trades.training_attack == NFGSM(0.1, loss="kl")
    with pytest.raises(ValueError, match="n-fgsm is for norm linf"):
        Config(train_attack="n-fgsm", norm="l2")


def test_every_activation_can_be_chosen():
    assert {Config(activation=name).activation for name in ACTIVATIONS} == set(ACTIVATIONS)


def test_settings_of_an_older_version():
    config = Config(gamma=0.01, epochs=3)
    saved = {**asdict(config), "interval": 1, "dataset": "digits"}
    del saved["precision"]
    assert Config.from_saved(saved) == config
    with pytest.raises(ValueError, match=r"interval=4.*removed"):
        Config.from_saved({**saved, "interval": 4})
    with pytest.raises(ValueError, match="ascent must be one of"):
        Config.from_saved({**saved, "ascent": "momentum"})


def test_it_is_read_from_a_command_line():
    tyro = pytest.importorskip("tyro")
    args = ["--gamma", "0.02", "--attack-mode", "eval", "--no-augment", "--schedule", "cosine"]
    expected = Config(gamma=0.02, attack_mode="eval", augment=False, schedule="cosine", seed=5)
    assert tyro.cli(Config, args=args, default=Config(seed=5)) == expected
    assert tyro.cli(Config, args=[], default=replace(expected)) == expected
