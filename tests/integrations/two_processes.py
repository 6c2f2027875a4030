"""Run by torchrun: the Trainer and an Accelerate loop with DDP; the weights go to a file."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from awp_optim import AWP
from awp_optim.integrations.transformers import AWPArguments, AWPTrainerMixin
from tests.integrations.toolbox import GAMMA, data, network


class Net(nn.Module):
    """A classifier with the Trainer's interface."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.layers(x), labels)}


def rows() -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": y} for x, y in zip(*data(batches=12))]


def by_trainer(folder: str) -> Net:
    """Each process takes every second batch of 4; an update has three of each."""
    import transformers

    class AWPTrainer(AWPTrainerMixin, transformers.Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    args = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=4, gradient_accumulation_steps=3,
        num_train_epochs=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
        max_grad_norm=0.0, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, ddp_backend="gloo",
    )  # fmt: skip
    net = Net()
    # Starts at the second update, after the first one has given a loss.
    awp = AWPArguments(gamma=GAMMA, start_loss_below=100.0)
    AWPTrainer(net, args, train_dataset=rows(), awp=awp).train()
    return net


def by_accelerate() -> Net:
    from accelerate import Accelerator

    accelerator, net = Accelerator(cpu=True), Net()
    opt = AWP(net.parameters(), torch.optim.SGD, gamma=GAMMA, lr=0.1)
    model, opt = accelerator.prepare(net, opt)
    batches = [
        {k: torch.stack([row[k] for row in rows()[i : i + 4]]) for k in ("x", "labels")}
        for i in range(0, 48, 4)
    ][accelerator.process_index :: 2]
    for window in (batches[:3], batches[3:]):

        def closure(window: list[Any] = window) -> None:
            opt.zero_grad()
            for i, batch in enumerate(window, 1):
                with nullcontext() if i == len(window) else accelerator.no_sync(model):
                    accelerator.backward(model(**batch)["loss"] / len(window))

        opt.step(closure)
    return net


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = sys.argv[1]
    weights = {
        "accelerate": by_accelerate().state_dict(),
        "trainer": by_trainer(folder).state_dict(),
    }
    torch.save(weights, f"{folder}/{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
