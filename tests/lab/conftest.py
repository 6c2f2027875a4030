"""What the tests of training share."""

from __future__ import annotations

import pytest

from awp_optim.lab.config import Config
from awp_optim.lab.data import ImageData, load_digits


@pytest.fixture
def config() -> Config:
    """A run of three epochs of three steps on ``data``."""
    return Config(
        arch="preact_resnet_small",
        gamma=0.01,
        eps=0.2,
        step_size=0.1,
        train_steps=2,
        test_steps=2,
        epochs=3,
        batch_size=24,
        train_eval=20,
    )


@pytest.fixture(scope="session")
def data() -> ImageData:
    """60 digits to train on and 40 to test on."""
    return load_digits().limit(60, 40)
