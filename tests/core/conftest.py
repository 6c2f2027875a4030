import pytest
import torch

from tests.core.toolbox import Net


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()
