"""AWP under Lightning, automatic and manual optimisation, against the loop by hand."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from awp_optim import AWP, frozen_batch_norm
from awp_optim.integrations import StartWhen

L = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

GAMMA = 0.02


def network(batch_norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(8)] if batch_norm else []
    return nn.Sequential(nn.Linear(6, 8), *norm, nn.Tanh(), nn.Linear(8, 5)).double()


def data(n: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 6, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(5, (n, 4), generator=generator)))


def optimizers(net: nn.Module) -> tuple[AWP, Any]:
    opt = AWP(net.parameters(), torch.optim.SGD, gamma=GAMMA, lr=0.1, momentum=0.9)
    return opt, torch.optim.lr_scheduler.StepLR(opt, step_size=3, gamma=0.5)


class Automatic(L.LightningModule):
    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        self.net = network(batch_norm)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        opt = self.optimizers()
        if opt.is_perturbed:
            return F.cross_entropy(self.net(x), y)
        # Only the pass at w + v counts, if there is one.
        with frozen_batch_norm(self.net) if opt.directions else nullcontext():
            loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)  # the loss at w, once
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        assert not self.optimizers().is_perturbed
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> Any:
        opt, schedule = optimizers(self.net)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Manual(Automatic):
    """The closure covers a whole update: here ``accumulate`` batches, collected by the loader."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt = self.optimizers()

        def closure() -> Tensor:
            opt.zero_grad()
            total = torch.zeros(())
            for x, y in zip(*(t.split(4) for t in batch)):
                loss = F.cross_entropy(self.net(x), y) * len(x) / len(batch[0])
                self.manual_backward(loss)
                total = total + loss.detach()
            return total

        opt.step(closure)
        self.lr_schedulers().step()


def fit(module: L.LightningModule, batch_size: int = 4, ckpt_path: Any = None, **settings: Any):
    x, y = (torch.cat(t) for t in zip(*data()))
    loader = DataLoader(TensorDataset(x.to(next(module.parameters()).dtype), y), batch_size)
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(**{"max_epochs": 1, **quiet, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*num_workers|.*log_every_n_steps|.*treespec")
        trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return trainer


def gradients(net: nn.Module, x: Tensor, y: Tensor, clip: float | None = None) -> Tensor:
    net.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    return loss


def hand(by_hand: Any, size: int = 4, clip: float | None = None, epochs: int = 1):
    net = network()
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(base, step_size=3, gamma=0.5)
    x, y = (torch.cat(t) for t in zip(*data()))
    losses = []
    for _ in range(epochs):
        for a, b in zip(x.split(size), y.split(size)):
            f = partial(gradients, net, a, b, clip)
            losses.append(by_hand(net.parameters(), f, base.step, GAMMA).item())
            schedule.step()
    return net, losses


def assert_equal(net: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-12}
    for (n, a), b in zip(net.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("clip", [None, 0.3])
def test_automatic_optimisation(by_hand, clip):
    module = Automatic()
    trainer = fit(module, max_epochs=2, gradient_clip_val=clip)
    net, losses = hand(by_hand, clip=clip, epochs=2)
    assert_equal(module.net, net)
    assert trainer.global_step == 16
    assert module.losses == pytest.approx(losses, rel=1e-9)
    assert trainer.callback_metrics["loss"].item() == pytest.approx(sum(losses[8:]) / 8, rel=1e-6)
    assert not trainer.optimizers[0].is_perturbed


def test_batch_norm_counts_the_pass_at_the_perturbed_weights_alone():
    module = Automatic(batch_norm=True)
    fit(module)
    net = network(batch_norm=True)
    opt, schedule = optimizers(net)
    for x, y in data():
        opt.zero_grad()
        with frozen_batch_norm(net):  # equal to 1e-9 with the README's loop
            F.cross_entropy(net(x), y).backward()
        opt.first_step(zero_grad=True)
        F.cross_entropy(net(x), y).backward()
        opt.second_step()
        schedule.step()
    assert_equal(module.net, net)
    assert module.net[1].num_batches_tracked == 8


def test_mixed_precision_in_bfloat16(by_hand):
    module = Automatic().float()
    fit(module, precision="bf16-mixed")
    net = network().float()
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(base, step_size=3, gamma=0.5)
    for x, y in data():

        def f(x: Tensor, y: Tensor) -> Tensor:
            net.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        by_hand(net.parameters(), partial(f, x.float(), y), base.step, GAMMA)
        schedule.step()
    assert_equal(module.net, net, rtol=1e-5, atol=1e-6)


def test_fp16_is_refused_and_leaves_the_weights():
    """Lightning runs the closure once and steps without it: that would be a plain step."""
    from lightning.pytorch.plugins import MixedPrecision

    module = Automatic()
    before = copy.deepcopy(module.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match=r"step\(\) without a closure would be a plain step"):
        fit(module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_fp16_by_manual_optimisation(by_hand):
    from lightning.pytorch.plugins import MixedPrecision

    class Half(Automatic):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            opt, (x, y) = self.optimizers(), batch
            opt.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(x), y))
            opt.optimizer.first_step(zero_grad=True)  # the loss scale cancels
            self.manual_backward(F.cross_entropy(self.net(x), y))
            opt.step()  # the scaler unscales, and skips on an overflow
            self.lr_schedulers().step()

    module = Half()
    trainer = fit(module, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    # float64 data under autocast stay float64: what is compared is the scaler's protocol.
    assert_equal(module.net, hand(by_hand)[0])
    assert trainer.global_step == 8


@pytest.mark.parametrize("batches", [1, 3])
def test_manual_optimisation_with_accumulation_is_the_big_batch(by_hand, batches):
    """3 does not divide 8: the last update has two batches, and its own mean."""
    module = Manual()
    trainer = fit(module, batch_size=4 * batches)
    assert_equal(module.net, hand(by_hand, size=4 * batches)[0])
    assert trainer.global_step == -(-8 // batches)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_automatic_accumulation_is_refused(clip):
    """Lightning's closure covers the last batch alone and adds it to gradients taken at w."""
    module = Automatic()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="accumulate_grad_batches"):
        fit(module, accumulate_grad_batches=2, gradient_clip_val=clip)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


@pytest.mark.parametrize("last", ["second_step", "step"])
@pytest.mark.parametrize("half", [False, True])
def test_the_two_steps_through_lightnings_wrapper(by_hand, last, half):
    from lightning.pytorch.plugins import MixedPrecision

    class TwoSteps(Automatic):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            opt, (x, y) = self.optimizers(), batch
            opt.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(x), y))
            opt.first_step(zero_grad=True)
            assert opt.is_perturbed
            assert opt.optimizer.is_perturbed
            self.manual_backward(F.cross_entropy(self.net(x), y))
            getattr(opt, last)()
            assert not opt.is_perturbed
            assert not opt.optimizer.is_perturbed
            self.lr_schedulers().step()

    module = TwoSteps()
    scaler = torch.amp.GradScaler("cpu")
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if half else []
    trainer = fit(module, plugins=plugins)
    assert_equal(module.net, hand(by_hand)[0])
    assert trainer.global_step == 8


def test_a_run_resumed_equals_one_that_was_not_stopped(tmp_path: Path):
    whole, first, second = Automatic(), Automatic(), Automatic()
    fit(whole, max_epochs=3)
    trainer = fit(first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "1.ckpt")
    fit(second, max_epochs=3, ckpt_path=tmp_path / "1.ckpt")
    for (n, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), n


def test_callbacks_see_the_centre_and_a_start_condition_is_one():
    from lightning.pytorch.callbacks import Callback, EarlyStopping

    start, seen = StartWhen(epoch=1), []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer, module):
            start(trainer.optimizers[0], epoch=trainer.current_epoch)

        def on_train_batch_end(self, trainer, module, *args):
            assert not trainer.optimizers[0].is_perturbed
            seen.append(trainer.optimizers[0].param_groups[0]["gamma"])

    stop = EarlyStopping("loss", patience=1, check_on_train_epoch_end=True, min_delta=100.0)
    trainer = fit(Automatic(), max_epochs=5, callbacks=[Watch(), stop])
    assert trainer.current_epoch == 2  # the loss never falls by 100
    assert seen == [0.0] * 8 + [GAMMA] * 8
