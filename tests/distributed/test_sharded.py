"""AWP on parameters sharded over processes equals AWP in one process."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from awp_optim import AWP


@pytest.fixture(scope="module")
def figures(launch, tmp_path_factory):
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} has no fully_shard on CPUs")
    return launch("sharded", 4, 2, directory=tmp_path_factory.mktemp("sharded"))


# The figures are relative differences in float64, and 1.0 for what must not be.
@pytest.mark.parametrize(
    ("processes", "scenario"),
    [
        (2, "fsdp2"),
        (4, "fsdp2"),
        (4, "hsdp"),
        (2, "tensor_parallelism"),
        (4, "fsdp2_of_tensor_parallel"),
    ],
)
def test_twenty_steps_equal_those_of_one_process(figures, processes, scenario):
    for way, difference in figures[str(processes)][scenario].items():
        assert difference < 1e-12, way


@pytest.mark.parametrize(
    ("processes", "scenario"),
    [
        (4, "placements"),
        (4, "collectives"),
        (4, "other_gradients"),
        (4, "random_directions"),
        (2, "refusals"),
    ],
)
def test_an_ascent_of_parts(figures, processes, scenario):
    for what, difference in figures[str(processes)][scenario].items():
        assert difference < 1e-12, what


@pytest.mark.parametrize(
    "scenario",
    ["second_forward", "scaled_and_clipped", "closures", "in_one_call", "half_precision"],
)
def test_what_goes_on_around_an_ascent(figures, scenario):
    for what, difference in figures["2"][scenario].items():
        assert difference < 1e-12, what


def test_a_checkpoint_of_four_processes_goes_on_in_two(figures):
    assert len(figures["2"]["checkpoint"]) == 6
    for what, difference in figures["2"]["checkpoint"].items():
        assert difference < 1e-12, what


def zeros(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def test_only_a_step_that_does_nothing_is_let_through_unperturbed():
    """The trial step that torch.distributed.checkpoint takes, and all that look like it."""
    model = nn.Linear(3, 2)

    def fresh(lr=0.0, **kwargs):
        zeros(model)
        return AWP(model.parameters(), torch.optim.Adam, gamma=0.1, lr=lr, **kwargs)

    start = [p.detach().clone() for p in model.parameters()]
    opt = fresh()
    opt.step()
    assert set(opt.state[model.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    refused = [opt, fresh(lr=1e-9)]  # not a second time; not with a learning rate
    refused += [fresh() for _ in range(2)]
    refused[-1].add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.1})
    for opt in refused[:2]:
        with pytest.raises(RuntimeError, match="would be a plain step"):
            opt.step()
    with pytest.raises(RuntimeError, match="would be a plain step"):
        refused[-1].step()
    model.bias.grad[0] = 1e-30
    with pytest.raises(RuntimeError, match="would be a plain step"):
        refused[2].step()
    model.bias.grad = None
    with pytest.raises(RuntimeError, match="would be a plain step"):
        refused[2].step()
    assert all(torch.equal(p, c) for p, c in zip(model.parameters(), start))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_state_dict_helpers_take_awp_itself(base):
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    kwargs = {"momentum": 0.9} if base is torch.optim.SGD else {}
    models = [nn.Linear(3, 2).double() for _ in range(2)]
    opts = [
        AWP(m.parameters(), base, gamma=0.1 + i, lr=0.1, **kwargs) for i, m in enumerate(models)
    ]

    def train(i):
        for step in (opts[i].first_step, opts[i].second_step):
            models[i](torch.ones(4, 3, dtype=torch.float64)).square().sum().backward()
            step(zero_grad=True)

    train(0)
    # Else both optimizers would go on with one momentum: it is handed over, not copied.
    states = copy.deepcopy(state_dict.get_state_dict(models[0], opts[0]))
    names = ("model_state_dict", "optim_state_dict")
    state_dict.set_state_dict(models[1], opts[1], **dict(zip(names, states)))
    assert opts[1].param_groups[0]["gamma"] == 0.1
    assert opts[1].param_groups[0]["lr"] == 0.1
    for i in range(2):
        train(i)
    assert torch.equal(models[0].weight, models[1].weight)
