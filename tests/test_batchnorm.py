"""frozen_batch_norm: the outputs of training, no trace in the statistics."""

import copy

import pytest
import torch
from torch import nn

from awp_optim import frozen_batch_norm


@pytest.mark.parametrize("momentum", [0.1, None])
def test_normalizes_by_the_batch_and_leaves_the_statistics(momentum):
    norm = nn.BatchNorm2d(3, momentum=momentum)
    x = torch.randn(4, 3, 5, 5) * 3 + 1
    norm(x)
    before = copy.deepcopy(norm.state_dict())
    expected = copy.deepcopy(norm)(x)
    with frozen_batch_norm(norm):
        y = norm(x)
        norm(torch.full_like(x, float("inf")))  # would turn any running mean into NaN
    assert torch.equal(y, expected)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])
    norm(x)
    assert norm.num_batches_tracked == before["num_batches_tracked"] + 1


def test_leaves_eval_mode_and_untracked_layers_as_they_are():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    model[0](torch.randn(8, 3) + 2)
    model[0].eval()
    x = torch.randn(8, 3)
    expected = model(x)
    with frozen_batch_norm(model):
        assert torch.equal(model(x), expected)
    assert [m.track_running_stats for m in model] == [True, False]
    assert [m.training for m in model] == [False, True]


def test_the_statistics_move_again_after_an_exception():
    norm = nn.BatchNorm1d(3)
    with pytest.raises(RuntimeError, match="inside"), frozen_batch_norm(norm):
        raise RuntimeError("inside")
    assert norm.track_running_stats


class Own(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x):
        pass


@pytest.mark.parametrize(
    "norm",
    [
        Own(3),
        nn.SyncBatchNorm(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
    ],
)
def test_all_that_keep_running_statistics_are_frozen(norm):
    with frozen_batch_norm(norm):
        norm(torch.randn(4, 3, 5, 5) + 5)
    assert norm.num_batches_tracked == 0
    assert norm.running_mean.eq(0).all()
    norm(torch.randn(4, 3, 5, 5) + 5)
    assert norm.running_mean.abs().min() > 0.1
