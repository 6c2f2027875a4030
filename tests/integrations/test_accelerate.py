"""AWP inside Accelerate's AcceleratedOptimizer against the loop by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from awp_optim import AWP

accelerate = pytest.importorskip("accelerate")

GAMMA = 0.02


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(28, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (28,), generator=generator)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(**settings: Any) -> tuple[Any, ...]:
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    net = network()
    opt = AWP(net.parameters(), torch.optim.SGD, gamma=GAMMA, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=3, gamma=0.5)
    loader = DataLoader(TensorDataset(*data()), batch_size=4)
    return accelerator, net, *accelerator.prepare(net, opt, schedule, loader)


def hand(by_hand: Any, size: int = 4, clip: float | None = None) -> nn.Module:
    net = network()
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(base, step_size=3, gamma=0.5)

    def passes(x: Tensor, y: Tensor) -> Tensor:
        net.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    def update() -> None:
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        base.step()

    for x, y in zip(*(t.split(size) for t in data())):
        by_hand(net.parameters(), partial(passes, x, y), update, GAMMA)
        schedule.step()
    return net


def assert_equal(net: nn.Module, expected: nn.Module) -> None:
    for (n, a), b in zip(net.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")


def test_step_with_a_closure(by_hand):
    accelerator, net, model, opt, schedule, loader = prepared()
    losses: list[float] = []
    for x, y in loader:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss

        losses.append(opt.step(closure))
        schedule.step()
    assert_equal(net, hand(by_hand))


def test_the_two_steps_and_clipping(by_hand):
    """first_step is AWP's, inside; step() is Accelerate's, and at w + v the second step."""
    accelerator, net, model, opt, schedule, loader = prepared()
    for x, y in loader:
        accelerator.backward(F.cross_entropy(model(x), y))
        opt.optimizer.first_step(zero_grad=True)
        accelerator.backward(F.cross_entropy(model(x), y))
        accelerator.clip_grad_norm_(model.parameters(), 0.3)
        opt.step()
        opt.zero_grad()
        schedule.step()
    assert_equal(net, hand(by_hand, clip=0.3))


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_is_the_big_batch(by_hand, accumulate):
    """The batches of an update are collected and passed twice; 7 batches leave a short update."""
    accelerator, net, model, opt, schedule, loader = prepared()
    for window in windows(loader, accumulate):
        n = sum(len(x) for x, _ in window)

        def closure(window: list[Any] = window, n: int = n) -> Tensor:
            opt.zero_grad()
            total = torch.zeros(())
            for x, y in window:
                last = x is window[-1][0]
                with nullcontext() if last else accelerator.no_sync(model):
                    loss = F.cross_entropy(model(x), y) * len(x) / n
                    accelerator.backward(loss)
                total = total + loss.detach()
            return total

        opt.step(closure)
        schedule.step()
    assert_equal(net, hand(by_hand, size=4 * accumulate))


def windows(loader: Any, n: int) -> Iterator[list[Any]]:
    window = []
    for batch in loader:
        window.append(batch)
        if len(window) == n:
            yield window
            window = []
    if window:
        yield window


def test_within_accumulate_a_closure_would_see_one_batch_of_several():
    """accelerator.accumulate steps at the last batch alone: what it skips never reaches AWP."""
    accelerator, net, model, opt, _, loader = prepared(gradient_accumulation_steps=2)
    before = copy.deepcopy(net.state_dict())
    x, y = next(iter(loader))
    with accelerator.accumulate(model):
        accelerator.backward(F.cross_entropy(model(x), y))
        opt.step()  # not its turn: neither an update nor an error
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_bfloat16(by_hand):
    accelerator, net, model, opt, schedule, _ = prepared(mixed_precision="bf16")
    net.float()
    expected = network().float()
    base = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    plan = torch.optim.lr_scheduler.StepLR(base, step_size=3, gamma=0.5)

    def passes(x: Tensor, y: Tensor) -> Tensor:
        expected.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = expected(x)
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        return loss

    for x, y in zip(*(t.split(4) for t in data())):
        x = x.float()
        accelerator.backward(F.cross_entropy(model(x), y))
        opt.optimizer.first_step(zero_grad=True)
        accelerator.backward(F.cross_entropy(model(x), y))
        opt.step()
        opt.zero_grad()
        schedule.step()
        by_hand(expected.parameters(), partial(passes, x, y), base.step, GAMMA)
        plan.step()
    for a, b in zip(net.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_scaler_skips_overflows_and_brings_the_weights_home(by_hand):
    """Accelerate makes no scaler on a CPU; this is what it does with one elsewhere."""
    _, net, model, opt, _, loader = prepared()
    inner = opt.optimizer
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    opt = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    expected, base = network(), None
    base = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for i, (x, y) in enumerate(loader):
        before = copy.deepcopy(net.state_dict())
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        inner.first_step(zero_grad=True)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if i == 2:
            net[0].weight.grad[0, 0] = float("inf")
        opt.step()
        opt.zero_grad()
        assert not inner.is_perturbed
        if i == 2:
            assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
            continue

        def passes(x: Tensor = x, y: Tensor = y) -> Tensor:
            expected.zero_grad()
            loss = F.cross_entropy(expected(x), y)
            loss.backward()
            return loss

        by_hand(expected.parameters(), passes, base.step, GAMMA)
    assert_equal(net, expected)


def test_a_checkpoint_of_accelerate(by_hand, tmp_path):
    def train(saved_after: int | None, start: int = 0) -> nn.Module:
        accelerator, net, model, opt, schedule, loader = prepared()
        if start:
            accelerator.load_state(tmp_path)
        for i, (x, y) in enumerate(loader):
            if i < start:
                continue
            accelerator.backward(F.cross_entropy(model(x), y))
            opt.optimizer.first_step(zero_grad=True)
            accelerator.backward(F.cross_entropy(model(x), y))
            opt.step()
            opt.zero_grad()
            schedule.step()
            if i + 1 == saved_after:
                accelerator.save_state(tmp_path)
        return net

    whole = train(saved_after=3)
    resumed = train(saved_after=None, start=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    assert_equal(whole, hand(by_hand))
