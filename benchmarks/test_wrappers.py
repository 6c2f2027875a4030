"""AWP against others' wrappers: pytorch_optimizer's SAM, and ART's trainer for AWP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import Tensor, nn
from torch.optim import SGD

from awp_optim import AWP
from benchmarks.comparison import AddRow, Comparison, Setting
from benchmarks.steps import EXACT, GAMMA, SGD_SETTINGS, training_step

PLAIN, SAM, OURS = "SGD", "SAM of pytorch_optimizer", "AWP"
STEP, ART = "AdversarialStep", "AWP trainer of ART"


def natural_step(
    model: nn.Module, x: Tensor, y: Tensor, first: Callable[[], Any] | None, last: Callable[[], Any]
) -> None:
    """A training step without an attack: one pass before ``last``, with ``first`` one more."""
    for update in (first, last):
        if update is not None:
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            update()


@pytest.fixture(scope="module")
def natural(setting: Setting) -> Comparison:
    """Two forward and backward passes with a wrapper, one without."""
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    data = setting.data()
    plain, sam, awp = (setting.model() for _ in range(3))
    sgd = SGD(plain.parameters(), **SGD_SETTINGS)
    theirs = pytorch_optimizer.SAM(sam.parameters(), SGD, rho=0.05, **SGD_SETTINGS)
    ours = AWP(awp.parameters(), SGD, gamma=GAMMA, **SGD_SETTINGS)
    steps = {
        PLAIN: partial(natural_step, plain, *data, None, sgd.step),
        SAM: partial(natural_step, sam, *data, theirs.first_step, theirs.second_step),
        OURS: partial(natural_step, awp, *data, ours.first_step, ours.second_step),
    }
    return setting.measure(f"natural training step: {setting}", PLAIN, steps)


@pytest.mark.parametrize("name", [PLAIN, SAM, OURS])
def test_natural_step(name: str, natural: Comparison, add_times: AddRow) -> None:
    add_times(natural, name, suite="wrappers")


def art_step(setting: Setting) -> Callable[[], Any]:
    """A step of ART's trainer: its ``fit`` on one batch, with its own PGD-10."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.defences.trainer import AdversarialTrainerAWPPyTorch
    from art.estimators.classification import PyTorchClassifier

    def classifier(model: nn.Module) -> Any:
        return PyTorchClassifier(
            model,
            loss=nn.CrossEntropyLoss(),
            optimizer=SGD(model.parameters(), **SGD_SETTINGS),
            input_shape=(3, 32, 32),
            nb_classes=10,
            clip_values=(0.0, 1.0),
            device_type="gpu" if setting.on_gpu else "cpu",
        )

    model = classifier(setting.model())
    attack = ProjectedGradientDescentPyTorch(
        model,
        eps=8 / 255,
        eps_step=2 / 255,
        max_iter=10,
        num_random_init=1,
        batch_size=setting.batch,
        verbose=False,
    )
    trainer = AdversarialTrainerAWPPyTorch(
        model, classifier(setting.model()), attack, mode="PGD", gamma=GAMMA, beta=6.0, warmup=0
    )
    x, y = (t.cpu().numpy() for t in setting.data())
    return partial(trainer.fit, x, y, batch_size=setting.batch, nb_epochs=1)


@pytest.fixture(scope="module")
def adversarial(setting: Setting) -> Comparison:
    pytest.importorskip("art")
    x, y = setting.data()
    steps: dict[str, Callable[[], Any]] = {
        STEP: partial(training_step(EXACT, setting.model()), x, y),
        ART: art_step(setting),
    }
    return setting.measure(f"AT-AWP training step, PGD-10: {setting}", STEP, steps)


@pytest.mark.parametrize("name", [STEP, ART])
def test_adversarial_step(name: str, adversarial: Comparison, add_times: AddRow) -> None:
    add_times(adversarial, name, suite="wrappers")
