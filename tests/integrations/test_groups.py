"""Which weights are perturbed, and when."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from awp_optim import AWP
from awp_optim.integrations import StartWhen, perturb_only
from awp_optim.integrations.transformers import AWPArguments


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 3))


def step(model: nn.Module, opt: AWP) -> dict[str, torch.Tensor]:
    """One step of AWP; the perturbation by name."""
    x, y = torch.arange(6).view(2, 3), torch.tensor([0, 2])
    v: dict[str, torch.Tensor] = {}

    def closure() -> torch.Tensor:
        opt.zero_grad()
        names = {id(p): n for n, p in model.named_parameters()}
        v.update({names[id(p)]: t for p, t in opt.perturbation().items()})
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    opt.step(closure)
    return v


@pytest.mark.parametrize(
    ("names", "settings", "expected"),
    [
        ("^0", {}, {"0.weight"}),
        (["0.weight", "3"], {}, {"0.weight", "3.weight"}),
        ("weight", {"min_ndim": 1}, {"0.weight", "1.weight", "3.weight"}),
        ("", {"min_ndim": 1}, {"0.weight", "1.weight", "1.bias", "3.weight", "3.bias"}),
    ],
)
def test_only_the_chosen_are_perturbed_and_all_are_trained(names, settings, expected):
    model = net()
    groups = perturb_only(model, names, gamma=0.02, **settings)
    before = copy.deepcopy(model.state_dict())
    v = step(model, AWP(groups, torch.optim.SGD, lr=0.1))
    assert set(v) == expected
    for name, t in v.items():
        torch.testing.assert_close(t.norm(), 0.02 * before[name].norm())
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_tied_weight_has_two_names():
    """As the embedding and the output layer of a language model."""
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embedding"].weight
    for name in ("embedding", "head"):
        (group,) = perturb_only(model, name, gamma=0.02)
        assert group["gamma"] == 0.02
        assert [id(p) for p in group["params"]] == [id(model["head"].weight)]


def test_groups_keep_their_settings_when_they_are_split():
    model = net()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    given = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    groups = perturb_only(model, "^3", gamma=0.02, groups=given, norm="l1")
    shape = [([tuple(p.shape) for p in g.pop("params")], g) for g in groups]
    on = {"gamma": 0.02, "min_ndim": 2, "norm": "l1"}
    assert shape == [
        ([(3, 12)], {"weight_decay": 0.1, **on}),
        ([(7, 4)], {"weight_decay": 0.1, "gamma": 0.0}),
        ([(3,)], {"weight_decay": 0.0, **on}),
        ([(4,), (4,)], {"weight_decay": 0.0, "gamma": 0.0}),
    ]
    assert set(given[0]) == {"params", "weight_decay"}


def test_groups_may_hold_names():
    model = net()
    given = [{"params": list(model.named_parameters()), "lr": 0.2}]
    for groups in (given, torch.optim.SGD(given, lr=0.1).param_groups):
        opt = AWP(perturb_only(model, "^3", gamma=0.02, groups=groups), torch.optim.SGD, lr=0.1)
        named = [g["param_names"] for g in opt.param_groups]
        assert named == [["3.weight", "3.bias"], ["0.weight", "1.weight", "1.bias"]]
        assert [g["lr"] for g in opt.param_groups] == [0.2, 0.2]
        assert set(step(model, opt)) == {"3.weight"}


def test_names_that_perturb_nothing_are_an_error():
    with pytest.raises(ValueError, match="the groups hold none"):
        perturb_only(net(), "^3", groups=[{"params": list(net().parameters())}])
    with pytest.raises(ValueError, match=r"'embeding'.*0\.weight"):
        perturb_only(net(), "embeding")
    with pytest.raises(ValueError, match="min_ndim=2"):
        perturb_only(net(), "bias")
    frozen = net()
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the names"):
        perturb_only(frozen, "^0")


@pytest.mark.parametrize(
    "choose", [lambda n: perturb_only(net(), n), lambda n: AWPArguments(perturb=n)]
)
def test_a_name_that_is_no_regular_expression_is_named(choose):
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        choose(["weight", "("])


def test_until_the_start_it_is_the_base_optimizer():
    model, plain = net(), net()
    opt = AWP(model.parameters(), torch.optim.SGD, gamma=0.02, lr=0.1)
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    start = StartWhen(step=3)
    for i in range(5):
        assert start(opt, step=i) == (i >= 3)
        assert bool(step(model, opt)) == (i >= 3)
        if i < 3:
            base.zero_grad()
            x, y = torch.arange(6).view(2, 3), torch.tensor([0, 2])
            nn.functional.cross_entropy(plain(x), y).backward()
            base.step()
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                assert torch.equal(p, q)


def test_all_conditions_hold_at_once_and_the_start_stays():
    opt = AWP(net().parameters(), torch.optim.SGD, gamma=0.02, lr=0.1)
    start = StartWhen(epoch=1, loss_below=0.5)
    calls = [(0, 0.1), (1, None), (1, float("nan")), (1, 0.5), (1, 0.4), (1, 9.0)]
    assert [start(opt, epoch=e, loss=v) for e, v in calls] == [False] * 4 + [True] * 2
    assert opt.param_groups[0]["gamma"] == 0.02


@pytest.mark.parametrize("started", [False, True])
def test_a_checkpoint_remembers_the_start(started, tmp_path):
    model = net()
    groups = perturb_only(model, "^3", gamma=0.02)
    opt = AWP(groups, torch.optim.SGD, lr=0.1)
    StartWhen(loss_below=1.0)(opt, loss=0.5 if started else 2.0)
    torch.save(opt.state_dict(), tmp_path / "opt.pt")

    fresh = AWP(perturb_only(model, "^3", gamma=0.02), torch.optim.SGD, lr=0.1)
    fresh.load_state_dict(torch.load(tmp_path / "opt.pt"))
    # After the start a loss above the threshold does not stop it; before, it still waits.
    assert StartWhen(loss_below=1.0)(fresh, loss=3.0) is started
    assert [g["gamma"] for g in fresh.param_groups] == [0.02 if started else 0.0, 0.0]
    assert StartWhen(loss_below=1.0)(fresh, loss=0.5)
    assert [g["gamma"] for g in fresh.param_groups] == [0.02, 0.0]


def test_misuse_is_an_error():
    model = net()
    with pytest.raises(TypeError, match="takes an AWP, got SGD"):
        StartWhen(epoch=1)(torch.optim.SGD(model.parameters(), lr=0.1), epoch=1)
    opt = AWP(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="pass epoch="):
        StartWhen(epoch=1)(opt, step=1)
    assert opt.param_groups[0]["gamma"] == 5e-3
    model(torch.arange(3)[None]).sum().backward()
    opt.first_step()
    with pytest.raises(RuntimeError, match="unperturbed"):
        StartWhen(epoch=1)(opt, epoch=1)
    opt.restore()
