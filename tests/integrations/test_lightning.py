"""AWP in Lightning, with automatic and manual optimization, equals the loop by hand."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from awp_optim import AWP, frozen_batch_norm
from awp_optim.integrations import StartWhen
from tests.integrations.toolbox import (
    GAMMA,
    assert_equal,
    assert_same_bits,
    data,
    halving,
    network,
    train_by_hand,
)

L = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def optimizers(net: nn.Module) -> tuple[AWP, Any]:
    opt = AWP(net.parameters(), torch.optim.SGD, gamma=GAMMA, lr=0.1, momentum=0.9)
    return opt, halving(opt)


class Automatic(L.LightningModule):
    def __init__(self, *norm: nn.Module) -> None:
        super().__init__()
        self.net = network(*norm)
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
    """The closure runs all batches of an update, which the loader has collected."""

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
    x, y = data()
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


@pytest.mark.parametrize("clip", [None, 0.3])
def test_automatic_optimization(clip):
    module = Automatic()
    trainer = fit(module, max_epochs=2, gradient_clip_val=clip)
    net, losses = train_by_hand(clip=clip, epochs=2)
    assert_equal(module.net, net)
    assert trainer.global_step == 16
    assert module.losses == pytest.approx(losses, rel=1e-9)
    assert trainer.callback_metrics["loss"].item() == pytest.approx(sum(losses[8:]) / 8, rel=1e-6)
    assert not trainer.optimizers[0].is_perturbed


def test_batch_norm_counts_only_the_pass_at_the_perturbed_weights():
    module = Automatic(nn.BatchNorm1d(8))
    fit(module)
    net = network(nn.BatchNorm1d(8))
    opt, schedule = optimizers(net)
    for x, y in zip(*(t.split(4) for t in data())):
        opt.zero_grad()
        with frozen_batch_norm(net):
            F.cross_entropy(net(x), y).backward()
        opt.first_step(zero_grad=True)
        F.cross_entropy(net(x), y).backward()
        opt.second_step()
        schedule.step()
    assert_equal(module.net, net)
    assert module.net[1].num_batches_tracked == 8


def test_mixed_precision_in_bfloat16():
    module = Automatic().float()
    fit(module, precision="bf16-mixed")
    expected, _ = train_by_hand(network().float(), autocast=torch.bfloat16)
    assert_equal(module.net, expected, rtol=1e-5, atol=1e-6)


def test_fp16_is_refused_and_leaves_the_weights():
    """Lightning runs the closure once and steps without it: that would be a plain step."""
    from lightning.pytorch.plugins import MixedPrecision

    module = Automatic()
    before = copy.deepcopy(module.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="plain step"):
        fit(module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert_same_bits(module, before)


@pytest.mark.parametrize("batches", [1, 3])
def test_manual_optimization_with_accumulation_is_the_large_batch(batches):
    """3 does not divide 8: the last update has two batches."""
    module = Manual()
    trainer = fit(module, batch_size=4 * batches)
    assert_equal(module.net, train_by_hand(batches=batches)[0])
    assert trainer.global_step == -(-8 // batches)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_automatic_accumulation_is_refused(clip):
    """Lightning's closure covers the last batch alone and adds it to gradients taken at w."""
    module = Automatic()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="accumulate_grad_batches"):
        fit(module, accumulate_grad_batches=2, gradient_clip_val=clip)
    assert_same_bits(module, before)


@pytest.mark.parametrize("last", ["second_step", "step"])
@pytest.mark.parametrize("half", [False, True])
def test_the_two_steps_through_lightnings_wrapper(last, half):
    """With a scaler, which skips an overflow: float64 data stay float64 under autocast."""
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
    assert_equal(module.net, train_by_hand()[0])
    assert trainer.global_step == 8


def test_a_run_resumed_equals_one_that_was_not_stopped(tmp_path: Path):
    whole, first, second = Automatic(), Automatic(), Automatic()
    fit(whole, max_epochs=3)
    trainer = fit(first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "1.ckpt")
    fit(second, max_epochs=3, ckpt_path=tmp_path / "1.ckpt")
    assert_same_bits(second, whole.state_dict())


def test_callbacks_see_unperturbed_weights_and_a_start_condition_is_one():
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
