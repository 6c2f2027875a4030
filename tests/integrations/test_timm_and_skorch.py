"""AWP with timm's models and schedulers and in skorch's estimator equals the loop by hand."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from awp_optim import AWP
from tests.integrations.toolbox import GAMMA, assert_equal, gradients, sgd, step_by_hand


def test_a_timm_model_and_its_scheduler():
    """step_update sets the learning rate on AWP, which the base optimizer steps with."""
    timm = pytest.importorskip("timm")
    from timm.scheduler import create_scheduler_v2

    def make() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("resnet10t", pretrained=False, num_classes=3).double()

    model, hand = make(), make()
    opt = AWP(model.parameters(), torch.optim.SGD, gamma=GAMMA, lr=0.1, momentum=0.9)
    base = sgd(hand)
    settings: dict[str, Any] = {
        "sched": "cosine", "num_epochs": 2, "warmup_epochs": 1, "step_on_epochs": False,
        "updates_per_epoch": 2, "warmup_lr": 1e-3,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        schedules = [create_scheduler_v2(o, **settings)[0] for o in (opt, base)]
        x, y = torch.rand(3, 4, 3, 16, 16).double(), torch.randint(3, (3, 4))
        for i in range(3):
            opt.step(partial(gradients, model, x[i], y[i]))
            step_by_hand(hand.parameters(), partial(gradients, hand, x[i], y[i]), base.step)
            for schedule in schedules:
                schedule.step_update(i + 1)
            assert opt.base_optimizer.param_groups[0]["lr"] == base.param_groups[0]["lr"] != 0.1
    assert_equal(model, hand, rtol=1e-6, atol=1e-9)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def table() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(20, 6)).astype(np.float32)
    return x, generator.integers(3, size=20)


def classifier(**settings: Any) -> Any:
    skorch = pytest.importorskip("skorch")
    return skorch.NeuralNetClassifier(
        Net, criterion=nn.CrossEntropyLoss, optimizer=partial(AWP, base_optimizer=torch.optim.SGD),
        optimizer__gamma=GAMMA, optimizer__momentum=0.9, lr=0.1, batch_size=5, max_epochs=2,
        iterator_train__shuffle=False, train_split=None, verbose=0, **settings,
    )  # fmt: skip


def test_skorch():
    """skorch calls step with a closure that zeroes, computes and backpropagates."""
    x, y = table()
    net = classifier().fit(x, y)
    hand = Net()
    base = sgd(hand)
    losses = []
    for _ in range(2):
        for i in range(0, 20, 5):
            batch = torch.tensor(x[i : i + 5]), torch.tensor(y[i : i + 5])
            f = partial(gradients, hand, *batch)
            losses.append(step_by_hand(hand.parameters(), f, base.step).item())
    assert_equal(net.module_, hand, rtol=1e-5, atol=1e-6)
    assert not net.optimizer_.is_perturbed
    assert net.history[:, "train_loss"] == pytest.approx(
        [sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-5
    )


def test_skorch_in_a_grid_search_and_after_a_copy():
    model_selection = pytest.importorskip("sklearn.model_selection")
    x, y = table()
    search = model_selection.GridSearchCV(
        classifier(), {"optimizer__gamma": [0.0, 0.05]}, cv=2, scoring="neg_log_loss"
    )
    search.fit(x, y)
    scores = search.cv_results_["mean_test_score"]
    assert scores[0] != scores[1]  # gamma reaches AWP
    again = copy.deepcopy(search.best_estimator_)
    assert np.array_equal(again.predict_proba(x), search.best_estimator_.predict_proba(x))
