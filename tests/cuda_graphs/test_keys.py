"""Whatever decides which kernels run, on which memory, is part of the key."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from awp_optim._cuda_graphs.keys import module_key, object_key
from tests.toolbox import network

CHANGES = {
    "mode": lambda m: m[1].eval(),
    "momentum": lambda m: setattr(m[1], "momentum", None),
    "tracking": lambda m: setattr(m[1], "track_running_stats", False),
    "dropout": lambda m: setattr(m[5], "p", 0.5),
    "frozen": lambda m: m[0].weight.requires_grad_(False),
    "data": lambda m: setattr(m[0].weight, "data", m[0].weight.data.clone()),
    "parameter": lambda m: setattr(m[4], "weight", nn.Parameter(m[4].weight.detach())),
    "buffer": lambda m: m[1].register_buffer("running_mean", m[1].running_mean.clone()),
    "no parameter": lambda m: setattr(m[4], "bias", None),
    "new parameter": lambda m: m[2].register_parameter("slope", nn.Parameter(torch.ones(1))),
    "new module": lambda m: m.append(nn.Tanh()),
    "other module": lambda m: m.__setitem__(2, nn.Tanh()),
    "module in a module": lambda m: m[2].add_module("inner", nn.Tanh()),
    "assigned": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    "dtype": lambda m: m.float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_the_module_changes_its_key(change):
    model = network().append(nn.Dropout(0.0))
    key = module_key(model)
    assert module_key(model) == key
    change(model)
    changed = module_key(model)
    assert changed != key
    assert module_key(model) == changed
    hash(changed)


def test_what_a_graph_reads_anew_is_not_part_of_the_key():
    model = network()
    key = module_key(model)
    with torch.no_grad():
        model[0].weight.mul_(2)
    model[1].running_mean.add_(1)
    model(torch.rand(2, 1, 6, 6, dtype=torch.float64))
    assert module_key(model) == key


def test_a_module_like_another_has_its_own_key():
    model = network()
    assert module_key(model) != module_key(copy.deepcopy(model))
    assert module_key(nn.Sequential(model)) != module_key(nn.Sequential(model))


def test_settings_that_cannot_be_hashed():
    model = nn.Sequential(nn.ReLU())
    model[0].p = [0.5]
    key = module_key(model)
    hash(key)
    model[0].p[0] = 0.25
    assert module_key(model) != key


def test_a_module_without_keys_is_not_kept():
    model = network()
    module_key(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.factor = 1.0


def test_objects_are_known_by_their_attributes():
    class Objective:
        factor = 1.0

    objective = Objective()
    key = object_key(objective)
    assert object_key(objective) == key
    objective.factor = 0.5
    assert object_key(objective) != key
    module = Weighted()
    key = object_key(module)
    module.weight = nn.Parameter(torch.ones(3))
    assert object_key(module) != key
    hash(object_key(lambda: None))
