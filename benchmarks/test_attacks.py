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
from benchmarks.comparison import AddRow, Comparison, Setting

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 20
OURS, CAPTURED, TORCHATTACKS, ART = "awp_optim", "awp_optim, captured", "torchattacks", "ART"
KINDS = ("PGD-20", "FGSM")
TRAINING_STEPS = 40

Run = Callable[[], Any]  # returns the images, as a tensor or as ART's array


class Target(NamedTuple):
    model: nn.Module
    x: Tensor
    y: Tensor


@pytest.fixture(scope="module")
def target(setting: Setting) -> Target:
    """A network that has learned its classes, and a batch of test images to attack.

    On an untrained network every attack has the same success. It is trained for a moment, without
    an attack, on scikit-learn's digits, enlarged and in three channels.
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
    return Target(model.eval(), images(x, setting.device), y.to(setting.device))


def images(x: Tensor, device: str) -> Tensor:
    """uint8 digits of shape (N, 1, 8, 8) as floats of shape (N, 3, 32, 32) in [0, 1]."""
    x = F.interpolate(x.float() / 255, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    return x.to(device).contiguous(memory_format=torch.channels_last)


def ours(kind: str, target: Target, setting: Setting) -> Run:
    attack = {
        "PGD-20": PGD(eps=EPS, step_size=STEP_SIZE, steps=STEPS, random_start=False),
        "FGSM": FGSM(eps=EPS),
    }[kind]
    return partial(attack, *target)


def captured(kind: str, target: Target, setting: Setting) -> Run:
    if not setting.on_gpu:
        pytest.skip("CUDA graphs need a GPU")
    attack = ours(kind, target, setting).func  # type: ignore[attr-defined]
    return partial(Captured(attack), *target)


def torchattacks(kind: str, target: Target, setting: Setting) -> Run:
    module = pytest.importorskip("torchattacks")
    attack = {
        "PGD-20": partial(module.PGD, alpha=STEP_SIZE, steps=STEPS, random_start=False),
        "FGSM": module.FGSM,
    }[kind](target.model, eps=EPS)
    return partial(attack, target.x, target.y)


def art(kind: str, target: Target, setting: Setting) -> Run:
    pytest.importorskip("art")
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        target.model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(target.x.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="gpu" if setting.on_gpu else "cpu",
    )
    n = len(target.x)
    attack = {
        "PGD-20": partial(
            ProjectedGradientDescentPyTorch, eps_step=STEP_SIZE, max_iter=STEPS, verbose=False
        ),
        "FGSM": FastGradientMethod,
    }[kind](classifier, eps=EPS, batch_size=n)
    return partial(attack.generate, target.x.cpu().numpy(), target.y.cpu().numpy())


CONTESTANTS = {OURS: ours, CAPTURED: captured, TORCHATTACKS: torchattacks, ART: art}


class Measured(NamedTuple):
    comparison: Comparison
    about: dict[str, dict[str, float]]
    skipped: dict[str, str]


@pytest.fixture(scope="module", params=KINDS)
def measured(request: pytest.FixtureRequest, target: Target, setting: Setting) -> Measured:
    runs, skipped = {}, {}
    for name, build in CONTESTANTS.items():
        try:
            runs[name] = build(request.param, target, setting)
        except pytest.skip.Exception as reason:
            skipped[name] = str(reason)
    made = {name: torch.as_tensor(run(), device=target.x.device) for name, run in runs.items()}
    title = f"{request.param} without random start: {setting}"
    comparison = setting.measure(title, OURS, runs)
    about = {
        name: {
            "natural_accuracy": accuracy(target, target.x),
            "robust_accuracy": accuracy(target, x_adv),
            "pixels_as_ours": ((x_adv - made[OURS]).abs() < 1e-5).double().mean().item(),
        }
        for name, x_adv in made.items()
    }
    return Measured(comparison, about, skipped)


@torch.no_grad()
def accuracy(target: Target, x: Tensor) -> float:
    return float((target.model(x).argmax(1) == target.y).double().mean())


@pytest.mark.parametrize("name", CONTESTANTS)
def test_attacks(name: str, measured: Measured, add_times: AddRow) -> None:
    if name in measured.skipped:
        pytest.skip(measured.skipped[name])
    add_times(measured.comparison, name, suite="attacks", **measured.about[name])
