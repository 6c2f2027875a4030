"""The paper's comparisons: the settings they are made of, their costs and their pictures."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from awp_optim import AWP, AdversarialStep
from awp_optim.lab.config import Config
from awp_optim.lab.recipes import QUICKSTART, RECIPES
from awp_optim.lab.studies import STUDIES, passes

BASE = replace(QUICKSTART, epoch_images=450)


def changes(config, base=BASE):
    return {k: v for k, v in asdict(config).items() if v != asdict(base)[k]}


# --- What a step costs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "cost"),
    [
        ({}, 23),
        ({"gamma": 0.01}, 26),
        ({"gamma": 0.01, "direction": "random"}, 23),
        ({"gamma": 0.01, "ascent_steps": 10}, 53),
        ({"gamma": 0.01, "alternations": 3}, 72),
        ({"gamma": 0.0, "alternations": 3}, 23),  # without AWP there are no alternations
        ({"train_steps": 1}, 5),
        ({"method": "trades", "gamma": 0.01}, 33),
        ({"method": "mart"}, 26),
        ({"method": "gkl", "gamma": 0.01}, 33),
        ({"method": "score", "gamma": 0.01, "ascent_below": 1.7}, 33),
        ({"train_attack": "n-fgsm"}, 5),
        ({"train_attack": "n-fgsm", "gamma": 0.01}, 8),
        ({"train_attack": "n-fgsm", "method": "trades"}, 9),
    ],
)
def test_passes(settings, cost):
    assert passes(Config(**settings)) == cost


class Counting(TorchDispatchMode):
    """Passes through the convolutions with a given number of output channels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default and len(args[1]) == 3:
            self.count += 1
        elif func is torch.ops.aten.convolution_backward.default and len(args[2]) == 3:
            self.count += sum(args[-1][:2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["at", "trades", "mart", "gkl", "score"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gamma": 0.01},
        {"gamma": 0.01, "direction": "random"},
        {"gamma": 0.01, "ascent_steps": 2, "alternations": 3},
        {"gamma": 0.01, "train_attack": "n-fgsm"},
    ],
)
def test_passes_are_those_that_a_step_makes(method, settings):
    config = Config(method=method, train_steps=3, **settings)
    # The second layer is counted: there is one below it for its gradient to reach.
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    optimizer = AWP(
        net.parameters(),
        torch.optim.SGD,
        gamma=config.gamma,
        direction=config.direction,
        ascent_steps=config.ascent_steps * config.alternations,
        lr=0.1,
    )
    alternations = {"alternations": config.alternations}
    step = AdversarialStep(net, optimizer, config.training_attack, config.objective, **alternations)
    x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    with Counting() as counting:
        step(x, y)
    assert counting.count == passes(config)


# --- Settings ---------------------------------------------------------------------------------


def test_methods():
    study = STUDIES["methods"](BASE, digits=True)
    plain = ["AT", "TRADES", "MART", "RST", "Pre-training"]
    assert list(study.configs) == [label for name in plain for label in (name, f"{name}-AWP")]
    assert study.compared_with == {f"{name}-AWP": name for name in plain}
    for name in plain:
        with_awp = changes(study.configs[f"{name}-AWP"], study.configs[name])
        assert with_awp == {"gamma": 0.01 if name == "AT" else 0.005}
        assert study.configs[name].epoch_images == 450
    assert changes(study.configs["RST"]) == {"method": "rst"}
    assert changes(study.configs["Pre-training"]).keys() == {"method", "lr", "schedule"}


def test_methods_elsewhere_say_what_is_left_out():
    study = STUDIES["methods"](RECIPES["at/cifar10-linf-preact18"].config, digits=False)
    assert list(study.configs) == ["AT", "AT-AWP", "TRADES", "TRADES-AWP", "MART", "MART-AWP"]
    assert "RST needs --unlabeled FILE" in study.note
    assert "pre-training needs --init FILE" in study.note


def test_figure2():
    study = STUDIES["figure2"](BASE, digits=True)
    gammas = (1e-4, 1e-3, 5e-3, 1e-2, 2e-2)
    expected = [{}, {"method": "trades"}]
    expected += [{"gamma": g} for g in gammas]
    expected += [{"gamma": g, "method": "trades"} for g in gammas]
    expected += [{"gamma": g, "awp_norm": "l1"} for g in gammas]
    expected += [{"gamma": 1e-2, "ascent_steps": k} for k in (5, 10)]
    expected += [{"gamma": 1e-2, "alternations": a} for a in (2, 3)]
    assert [changes(config) for config in study.configs.values()] == expected
    for label, other in study.compared_with.items():
        assert other == ("TRADES" if study.configs[label].method == "trades" else "AT")
    assert study.compared_with.keys() == study.configs.keys() - {"AT", "TRADES"}


@pytest.mark.parametrize(("digits", "side"), [(True, 4), (False, 14)])
def test_regularizers(digits, side):
    study = STUDIES["regularizers"](BASE, digits=digits)
    assert [changes(config) for config in study.configs.values()] == [
        {},
        {"gamma": 0.01},
        {"gamma": 0.3, "direction": "random"},
        {"l1": 5e-6},
        {"l2": 5e-3},
        {"cutout": side},
        {"mixup": 1.4},
        {"label_smoothing": 0.1},
    ]
    assert study.compared_with == dict.fromkeys(list(study.configs)[1:], "AT")


def test_regularizers_are_those_of_the_paper():
    base = RECIPES["at/cifar10-linf-preact18"].config
    configs = STUDIES["regularizers"](base, digits=False).configs
    for label in ("AT-AWP", "L1", "L2", "Cutout", "Mixup"):
        name = "at-" + label.lower().removeprefix("at-")
        assert configs[label] == RECIPES[f"{name}/cifar10-linf-preact18"].config


def test_rwp():
    study = STUDIES["rwp"](BASE, digits=True)
    found = [changes(config) for config in study.configs.values()]
    awp = [{"gamma": g} for g in (1e-4, 1e-3, 5e-3, 1e-2, 2e-2)]
    random = [{"gamma": g, "direction": "random"} for g in (1e-3, 1e-2, 0.1, 0.3, 0.6, 1.0, 2.0)]
    assert found == [{}, *awp, *random]
    assert set(study.compared_with.values()) == {"AT"}


# --- Pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("digits", [True, False])
def test_pictures_show_every_run(tmp_path, name, digits):
    study = STUDIES[name](BASE, digits=digits)
    asked = set()

    class Runs(dict):
        def __getitem__(self, label):
            asked.add(label)
            return super().__getitem__(label)

    row = {"epoch": 0.0, "test_natural_acc": 0.9, "test_robust_acc": 0.6, "train_robust_acc": 0.8}
    study.draw(
        Runs({label: [[row], [row]] for label in study.configs}), tmp_path / "p.png", "title"
    )
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert asked == study.configs.keys()
