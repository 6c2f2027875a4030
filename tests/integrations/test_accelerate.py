"""AWP inside Accelerate's AcceleratedOptimizer equals the loop by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from awp_optim import AWP
from tests.integrations.toolbox import (
    GAMMA,
    SIZE,
    assert_equal,
    assert_same_bits,
    data,
    gradients,
    halving,
    network,
    sgd,
    step_by_hand,
    train_by_hand,
)

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Any, ...]:
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    net = network().to(dtype)
    opt = AWP(net.parameters(), torch.optim.SGD, gamma=GAMMA, lr=0.1, momentum=0.9)
    x, y = data()
    loader = DataLoader(TensorDataset(x.to(dtype), y), batch_size=SIZE)
    return accelerator, net, *accelerator.prepare(net, opt, halving(opt), loader)


def train(
    prepared: tuple[Any, ...],
    first: int = 0,
    save: tuple[int, Any] | None = None,
    clip: float | None = None,
) -> None:
    """The two steps on the batches from ``first`` on; saves a checkpoint after so many."""
    accelerator, _, model, opt, schedule, loader = prepared
    for i, (x, y) in enumerate(loader):
        if i < first:
            continue
        accelerator.backward(F.cross_entropy(model(x), y))
        opt.optimizer.first_step(zero_grad=True)
        accelerator.backward(F.cross_entropy(model(x), y))
        if clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        opt.zero_grad()
        schedule.step()
        if save is not None and i + 1 == save[0]:
            accelerator.save_state(save[1])


@pytest.mark.parametrize("clip", [None, 0.3])
def test_the_two_steps(clip):
    """first_step is AWP's own; Accelerate's step() is the second step."""
    state = prepared()
    train(state, clip=clip)
    assert_equal(state[1], train_by_hand(clip=clip)[0])


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_closure_with_accumulation_is_the_large_batch(accumulate):
    """The batches of an update are collected and passed twice; 3 leaves a short update."""
    accelerator, net, model, opt, schedule, loader = prepared()
    batches = iter(loader)
    while window := list(islice(batches, accumulate)):
        n = sum(len(x) for x, _ in window)

        def closure(window: list[Any] = window, n: int = n) -> Tensor:
            opt.zero_grad()
            total = torch.zeros(())
            for i, (x, y) in enumerate(window, 1):
                with nullcontext() if i == len(window) else accelerator.no_sync(model):
                    loss = F.cross_entropy(model(x), y) * len(x) / n
                    accelerator.backward(loss)
                total = total + loss.detach()
            return total

        opt.step(closure)
        schedule.step()
    assert_equal(net, train_by_hand(batches=accumulate)[0])


def test_inside_accumulate_a_skipped_step_is_neither_an_update_nor_an_error():
    accelerator, net, model, opt, _, loader = prepared(gradient_accumulation_steps=2)
    before = copy.deepcopy(net.state_dict())
    x, y = next(iter(loader))
    with accelerator.accumulate(model):
        accelerator.backward(F.cross_entropy(model(x), y))
        opt.step()
    assert_same_bits(net, before)


def test_bfloat16():
    state = prepared(torch.float32, mixed_precision="bf16")
    train(state)
    expected, _ = train_by_hand(network().float(), autocast=torch.bfloat16)
    assert_equal(state[1], expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_accelerate(tmp_path):
    whole = prepared()
    train(whole, save=(3, tmp_path))
    resumed = prepared()
    resumed[0].load_state(tmp_path)
    train(resumed, first=3)
    assert_same_bits(resumed[1], whole[1].state_dict())
    assert_equal(whole[1], train_by_hand()[0])


def test_a_scaler_skips_an_overflow_and_the_weights_are_restored():
    """Accelerate makes no scaler on a CPU; this is what it does with one elsewhere."""
    _, net, model, opt, _, loader = prepared()
    inner = opt.optimizer
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    opt = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    expected = network()
    base = sgd(expected)
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
            assert_same_bits(net, before)
        else:
            passes = lambda x=x, y=y: gradients(expected, x, y)  # noqa: E731
            step_by_hand(expected.parameters(), passes, base.step)
    assert_equal(net, expected)
