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


RUNS = ["fsdp2", "tensor_parallelism"]
AROUND = ["second_forward", "scaled_and_clipped", "closures", "in_one_call", "half_precision"]
OF_PARTS = ["placements", "collectives", "other_gradients", "random_directions"]


# The figures are relative differences in float64, and 1.0 for what must not be.
@pytest.mark.parametrize(
    ("processes", "scenario"),
    [
        *((2, name) for name in [*RUNS, "refusals", *AROUND, "checkpoint"]),
        *((4, name) for name in ["fsdp2", "hsdp", "fsdp2_of_tensor_parallel", *OF_PARTS]),
    ],
)
def test_sharded_equals_one_process(figures, processes, scenario):
    assert figures[str(processes)][scenario]
    for what, difference in figures[str(processes)][scenario].items():
        assert difference < 1e-12, what


def test_only_a_step_that_does_nothing_is_let_through_unperturbed():
    """The trial step that torch.distributed.checkpoint takes, and all that look like it."""
    model = nn.Linear(3, 2)

    def fresh(lr=0.0, **kwargs):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return AWP(model.parameters(), torch.optim.Adam, gamma=0.1, lr=lr, **kwargs)

    def with_group():
        opt = fresh()
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.1})
        return opt

    def with_gradient(value):
        opt = fresh()
        model.bias.grad = value
        return opt

    start = [p.detach().clone() for p in model.parameters()]
    opt = fresh()
    opt.step()
    assert set(opt.state[model.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    for make in (
        lambda: opt,  # not a second time
        lambda: fresh(lr=1e-9),
        with_group,
        lambda: with_gradient(torch.tensor([1e-30, 0.0])),
        lambda: with_gradient(None),
    ):
        with pytest.raises(RuntimeError, match="plain step"):
            make().step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start))


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
    # Without a copy both optimizers would share one momentum.
    states = copy.deepcopy(state_dict.get_state_dict(models[0], opts[0]))
    names = ("model_state_dict", "optim_state_dict")
    state_dict.set_state_dict(models[1], opts[1], **dict(zip(names, states)))
    assert opts[1].param_groups[0]["gamma"] == 0.1
    assert opts[1].param_groups[0]["lr"] == 0.1
    for i in range(2):
        train(i)
    assert torch.equal(models[0].weight, models[1].weight)
