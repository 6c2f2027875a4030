from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before a test imports what would look for a network


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass
