"""Every base optimizer steps as it does in the loop by hand: torch's, and those of others."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, swa_utils

from awp_optim import AWP
from tests.integrations.toolbox import (
    GAMMA,
    assert_equal,
    assert_same_bits,
    gradients,
    step_by_hand,
)


class Tokens(nn.Module):
    """A model all of whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.EmbeddingBag(20, 5, sparse=True, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        return self.rows((x.abs() * 10).long().clamp(max=19))


def network(kind: str = "dense") -> nn.Module:
    torch.manual_seed(0)
    if kind == "sparse":
        return Tokens().double()
    bias = kind != "matrices"
    layers = nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 5, bias=bias)
    return nn.Sequential(*layers).double()


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 16, 6, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(5, (n, 16), generator=generator)))


def assert_equal_training(
    make: Callable[[list[Tensor]], Optimizer], kind: str = "dense", ascent_steps: int = 1
) -> None:
    """The two steps, and step(closure), against the loop by hand with a base optimizer alone."""
    hand, steps, closed = network(kind), network(kind), network(kind)
    base = make(list(hand.parameters()))
    opt = AWP(list(steps.parameters()), make, gamma=GAMMA, ascent_steps=ascent_steps)
    wrapped = AWP.wrap(make(list(closed.parameters())), gamma=GAMMA, ascent_steps=ascent_steps)
    before = copy.deepcopy(hand.state_dict())
    for seed, (x, y) in enumerate(batches(4)):
        torch.manual_seed(seed)
        expected = step_by_hand(
            hand.parameters(), partial(gradients, hand, x, y), base.step, GAMMA, ascent_steps
        )

        torch.manual_seed(seed)
        for _ in range(ascent_steps):
            gradients(steps, x, y)
            opt.first_step()
        gradients(steps, x, y)
        opt.second_step()

        torch.manual_seed(seed)
        loss = wrapped.step(partial(gradients, closed, x, y))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)

    assert all(not torch.equal(p, before[name]) for name, p in hand.state_dict().items())
    for model in (steps, closed):
        assert_equal(model, hand, rtol=1e-8, atol=1e-11)
    assert_states_equal(opt.base_optimizer, base)


def assert_states_equal(ours: Optimizer, theirs: Optimizer) -> None:
    for (p, state), (_, expected) in zip(ours.state.items(), theirs.state.items(), strict=True):
        assert not isinstance(p, Tensor) or state.keys() == expected.keys()
        for key, t in state.items() if isinstance(p, Tensor) else ():
            if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.bfloat16:
                torch.testing.assert_close(t, expected[key], rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------- torch.optim

# What a class needs beside its defaults; one that a later torch adds is tried with them.
TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("dense", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "AdamW": ("dense", {"lr": 1e-2, "amsgrad": True}),
    "Muon": ("matrices", {"lr": 1e-2}),
    "SparseAdam": ("sparse", {"lr": 1e-2}),
}
TORCH_CLASSES = {
    name: c
    for name, c in vars(torch.optim).items()
    if inspect.isclass(c) and issubclass(c, Optimizer) and c not in (Optimizer, torch.optim.LBFGS)
}


@pytest.mark.parametrize("ascent_steps", [1, 2])
@pytest.mark.parametrize("name", sorted(TORCH_CLASSES))
def test_torch(name, ascent_steps):
    kind, settings = TORCH.get(name, ("dense", {}))
    assert_equal_training(partial(TORCH_CLASSES[name], **settings), kind, ascent_steps)


# ---------------------------------------------------------------- schedulefree


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
def test_schedulefree(name):
    """In train mode the weights are y, where the gradients belong: v is a perturbation of y."""
    schedulefree = pytest.importorskip("schedulefree")

    # RAdam's updates are zero at first, by default.
    settings = {"silent_sgd_phase": False} if name.startswith("RAdam") else {}

    def make(params: list[Tensor]) -> Optimizer:
        optimizer = getattr(schedulefree, name)(params, lr=0.05, **settings)
        optimizer.train()
        return optimizer

    assert_equal_training(make)


def test_schedulefree_changes_between_y_and_x_between_steps():
    schedulefree = pytest.importorskip("schedulefree")
    hand, model = network(), network()
    base = schedulefree.SGDScheduleFree(hand.parameters(), lr=0.1)
    opt = AWP(model.parameters(), schedulefree.SGDScheduleFree, gamma=GAMMA, lr=0.1)
    for x, y in batches(4):
        base.train()
        opt.base_optimizer.train()
        at_y = copy.deepcopy(model.state_dict())
        step_by_hand(hand.parameters(), partial(gradients, hand, x, y), base.step)
        gradients(model, x, y)
        opt.first_step()
        for p, v in opt.perturbation().items():
            w = at_y[{id(q): n for n, q in model.named_parameters()}[id(p)]]
            torch.testing.assert_close(v.norm(), GAMMA * w.norm())  # relative to y
        gradients(model, x, y)
        opt.second_step()
        base.eval()
        opt.base_optimizer.eval()
        assert_equal(model, hand)  # x, which is evaluated
    # A step in eval mode is schedulefree's error, and restores the weights.
    at_x = copy.deepcopy(model.state_dict())
    gradients(model, x, y)
    opt.first_step()
    with pytest.raises(Exception, match="not in train mode"):
        opt.second_step()
    assert not opt.is_perturbed
    assert_same_bits(model, at_x)


def test_schedulefree_wrapper_is_no_optimizer():
    schedulefree = pytest.importorskip("schedulefree")
    sgd = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="takes an existing optimizer"):
        AWP.wrap(schedulefree.ScheduleFreeWrapper(sgd))


# ---------------------------------------------------------------- pytorch_optimizer

# Not soap: weights that differ by 1e-14 differ by 1e-4 after three of its steps, AWP or not.
PYTORCH_OPTIMIZER = (
    *("adabelief", "adamp", "adan", "ademamix", "adopt", "came", "diffgrad", "laprop", "lion"),
    *("lamb", "madgrad", "prodigy", "ranger", "sgdw", "stableadamw", "tiger", "yogi"),
    "schedulefreeadamw",
)


@pytest.mark.parametrize("name", PYTORCH_OPTIMIZER)
def test_pytorch_optimizer(name):
    library = pytest.importorskip("pytorch_optimizer")

    def make(params: list[Tensor]) -> Optimizer:
        optimizer = library.load_optimizer(name)(params)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    assert_equal_training(make)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("alig", "closure"),  # needs the loss
        ("sam", "closure"),
        ("adahessian", "does not require grad"),  # needs second derivatives at the step's weights
    ],
)
def test_optimizers_that_need_more_than_gradients_say_so(name, error):
    library = pytest.importorskip("pytorch_optimizer")
    model = network()
    sam = partial(library.SAM, base_optimizer=torch.optim.SGD, lr=0.1)
    base = sam if name == "sam" else library.load_optimizer(name)
    opt = AWP(model.parameters(), base, gamma=GAMMA)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Exception, match=error):
        opt.step(partial(gradients, model, *batches(1)[0]))
    assert not opt.is_perturbed
    assert_same_bits(model, before)


# ---------------------------------------------------------------- timm


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "nadamw", "adafactorbv", "cadamw"])
def test_timm(name):
    optim = pytest.importorskip("timm.optim")
    hand, model = network(), network()
    base = optim.create_optimizer_v2(hand, opt=name, lr=1e-2, weight_decay=0.05)
    inner = optim.create_optimizer_v2(model, opt=name, lr=1e-2, weight_decay=0.05)
    opt = AWP.wrap(inner, gamma=GAMMA)
    assert len(opt.param_groups) == 2  # with and without weight decay
    for x, y in batches(4):
        step_by_hand(hand.parameters(), partial(gradients, hand, x, y), base.step)
        opt.step(partial(gradients, model, x, y))
    assert_equal(model, hand, rtol=1e-7, atol=1e-10)


# ---------------------------------------------------------------- quantized state, as bitsandbytes


class EightBit(Optimizer):
    """Momentum in 8 bits, kept beside ``state`` by the parameter's place, with a step of its own.

    The protocol of bitsandbytes: quantized tensors and their scales, ``initialized`` at the first
    step, ``p.data`` written through, and a ``step`` that no ``super().step`` is behind.
    """

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.initialized = False
        self.quantized: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                m = p.grad.data
                if self.initialized:
                    q, scale = self.quantized[g, i]
                    m = m + 0.9 * q.to(m.dtype) * scale
                scale = m.abs().max() / 127
                self.quantized[g, i] = (m / scale).round().to(torch.int8), scale
                p.data.add_(m, alpha=-group["lr"])
        self.initialized = True
        return loss


def test_an_optimizer_with_state_of_its_own():
    assert_equal_training(EightBit)


# ---------------------------------------------------------------- averages of weights


def test_swa_averages_unperturbed_weights():
    """AveragedModel, SWALR and update_bn between steps see weights by hand."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)
        return nn.Sequential(*layers).double()

    def train(model: nn.Module, optimizer: Optimizer, step: Callable[..., object]) -> nn.Module:
        averaged = swa_utils.AveragedModel(model)
        schedule = swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
        for x, y in batches(5):
            step(partial(gradients, model, x, y))
            averaged.update_parameters(model)
            schedule.step()
        swa_utils.update_bn(batches(3), averaged)
        return averaged

    model, hand = make(), make()
    opt = AWP(model.parameters(), torch.optim.SGD, gamma=GAMMA, lr=0.1, momentum=0.9)
    base = torch.optim.SGD(hand.parameters(), lr=0.1, momentum=0.9)
    ours = train(model, opt, lambda f: opt.step(f))
    theirs = train(hand, base, lambda f: step_by_hand(hand.parameters(), f, base.step))
    assert opt.param_groups[0]["lr"] == base.param_groups[0]["lr"] == 0.01
    assert_equal(ours, theirs)
