"""Our attacks against torchattacks' and ART's: the same images, the same accuracy, in less time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_optim.attacks import FGSM, PGD, Captured
from awp_optim.lab.data import load_digits
from benchmarks.suites import Comparison, Record, Setting, measure

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 20
OURS, CAPTURED, TORCHATTACKS, ART = "awp_optim", "awp_optim, captured", "torchattacks", "ART"
KINDS = ("PGD-20", "FGSM")
TRAINING_STEPS = 40

Run = Callable[[], Any]  # returns the images, as a tensor or as ART's array


class ModelOracle(NamedTuple):
    model: nn.Module
    x: Tensor
    y: Tensor


@pytest.fixture(scope="module")
def oracle(setting: Setting) -> ModelOracle:
    """A network that knows its classes: on another, every attack has the same success.

    It is trained for a moment, without an attack, on scikit-learn's digits, enlarged and in three
    channels; a batch of test images is what is attacked.
    """
    pytest.importorskip("sklearn")
    data = load_digits()
    model = setting.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    g = torch.Generator().manual_seed(0)
    for _ in range(TRAINING_STEPS):
        index = torch.randint(len(data.x_train), (32,), generator=g)
        x, y = images(data.x_train[index], setting.device), data.y_train[index]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y.to(setting.device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    x, y = data.x_test[: setting.batch], data.y_test[: setting.batch]
    return ModelOracle(model.eval(), images(x, setting.device), y.to(setting.device))


def images(x: Tensor, device: str) -> Tensor:
    """uint8 digits of shape (N, 1, 8, 8) as floats of shape (N, 3, 32, 32) in [0, 1]."""
    x = F.interpolate(x.float() / 255, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    return x.to(device).contiguous(memory_format=torch.channels_last)


def ours(kind: str, oracle: ModelOracle, setting: Setting) -> Run:
    attack = {
        "PGD-20": PGD(eps=EPS, step_size=STEP_SIZE, steps=STEPS, random_start=False),
        "FGSM": FGSM(eps=EPS),
    }[kind]
    return partial(attack, *oracle)


def captured(kind: str, oracle: ModelOracle, setting: Setting) -> Run:
    if not setting.device.startswith("cuda"):
        pytest.skip("graphs are captured on CUDA alone")
    attack = ours(kind, oracle, setting).func  # type: ignore[attr-defined]
    return partial(Captured(attack), *oracle)


def torchattacks(kind: str, oracle: ModelOracle, setting: Setting) -> Run:
    module = pytest.importorskip("torchattacks")
    attack = {
        "PGD-20": partial(module.PGD, alpha=STEP_SIZE, steps=STEPS, random_start=False),
        "FGSM": module.FGSM,
    }[kind](oracle.model, eps=EPS)
    return partial(attack, oracle.x, oracle.y)


def art(kind: str, oracle: ModelOracle, setting: Setting) -> Run:
    pytest.importorskip("art")
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        oracle.model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(oracle.x.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="gpu" if setting.device.startswith("cuda") else "cpu",
    )
    n = len(oracle.x)
    attack = {
        "PGD-20": partial(
            ProjectedGradientDescentPyTorch, eps_step=STEP_SIZE, max_iter=STEPS, verbose=False
        ),
        "FGSM": FastGradientMethod,
    }[kind](classifier, eps=EPS, batch_size=n)
    return partial(attack.generate, oracle.x.cpu().numpy(), oracle.y.cpu().numpy())


CONTESTANTS = {OURS: ours, CAPTURED: captured, TORCHATTACKS: torchattacks, ART: art}


class Measured(NamedTuple):
    comparison: Comparison
    about: dict[str, dict[str, float]]
    skipped: dict[str, str]


@pytest.fixture(scope="module", params=KINDS)
def measured(request: pytest.FixtureRequest, oracle: ModelOracle, setting: Setting) -> Measured:
    runs, skipped = {}, {}
    for name, build in CONTESTANTS.items():
        try:
            runs[name] = build(request.param, oracle, setting)
        except pytest.skip.Exception as reason:
            skipped[name] = str(reason)
    made = {name: torch.as_tensor(run(), device=oracle.x.device) for name, run in runs.items()}
    seconds = measure(runs, setting, warmup=5 if CAPTURED in runs else 1)
    about = {
        name: {
            "natural_accuracy": accuracy(oracle, oracle.x),
            "robust_accuracy": accuracy(oracle, x_adv),
            "pixels_as_ours": ((x_adv - made[OURS]).abs() < 1e-5).double().mean().item(),
        }
        for name, x_adv in made.items()
    }
    return Measured(
        Comparison(f"{request.param} without random start: {setting}", OURS, seconds),
        about,
        skipped,
    )


@torch.no_grad()
def accuracy(oracle: ModelOracle, x: Tensor) -> float:
    return float((oracle.model(x).argmax(1) == oracle.y).double().mean())


@pytest.mark.parametrize("name", CONTESTANTS)
def test_attacks(name: str, measured: Measured, replay: Record) -> None:
    if name in measured.skipped:
        pytest.skip(measured.skipped[name])
    replay(measured.comparison, name, suite="attacks", **measured.about[name])
