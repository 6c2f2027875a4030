"""Adversarial training with AWP in Lightning, with automatic optimization.

    python examples/lightning_awp.py

Trains on scikit-learn's digits (no download) with PGD-7 at eps 0.15 in L_inf, with AWP and without.
Needs `pip install -e ".[lab,frameworks]"`.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from awp_optim import AWP, frozen_batch_norm
from awp_optim.attacks import PGD
from awp_optim.evaluation import evaluate

EPS = 0.15
TRAIN_ATTACK = PGD(eps=EPS, step_size=EPS / 4, steps=7)
TEST_ATTACK = PGD(eps=EPS, step_size=EPS / 8, steps=20)


class Robust(L.LightningModule):
    """A small convolutional network, trained on adversarial images."""

    def __init__(self, gamma: float, epochs: int) -> None:
        super().__init__()
        self.gamma, self.epochs = gamma, epochs
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 16, 10)),
        )
        self.x_adv = torch.empty(0)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Lightning calls it twice an update, through AWP.step: at w, then at w + v."""
        x, y = batch
        opt = self.optimizers()
        if opt.is_perturbed:
            return F.cross_entropy(self.net(self.x_adv), y)
        self.x_adv = TRAIN_ATTACK(self.net, x, y)  # one attack for both passes
        # BatchNorm counts only the pass at w + v; with gamma 0 there is no such pass.
        with frozen_batch_norm(self.net) if opt.directions else nullcontext():
            loss = F.cross_entropy(self.net(self.x_adv), y)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self) -> Any:
        opt = AWP(self.parameters(), torch.optim.SGD, gamma=self.gamma, lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, self.epochs)
        return {"optimizer": opt, "lr_scheduler": schedule}


def digits(limit: int | None) -> tuple[TensorDataset, TensorDataset]:
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    parts = (slice(1000), slice(1000, None))
    train, test = (TensorDataset(x[part][:limit], y[part][:limit]) for part in parts)
    return train, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=15, help="(%(default)s)")
    parser.add_argument("--gamma", type=float, default=1e-2, help="(%(default)s)")
    parser.add_argument("--limit", type=int, help="use only this many digits")
    parser.add_argument("--seeds", type=int, default=1, help="(%(default)s)")
    args = parser.parse_args()
    if min(args.epochs, args.seeds, 1 if args.limit is None else args.limit) < 1:
        parser.error("--epochs, --seeds and --limit must be at least 1")
    if not 0 <= args.gamma < float("inf"):
        parser.error("--gamma must be at least 0 and finite")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*num_workers|.*log_every_n_steps|.*LeafSpec")

    train, test = digits(args.limit)
    print(f"{len(train)} digits, {args.epochs} epochs, PGD-7 at eps {EPS}; accuracy in %\n")
    print("              seed   natural   robust (PGD-20), test   training   loss at w")
    for seed in range(args.seeds):
        for label, gamma in (("AT", 0.0), ("AT-AWP", args.gamma)):
            L.seed_everything(seed, verbose=False)
            model = Robust(gamma, args.epochs)
            trainer = L.Trainer(
                max_epochs=args.epochs,
                accelerator="auto",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(model, DataLoader(train, batch_size=100, shuffle=True))
            model.eval()
            on_test, on_train = (
                evaluate(model.net, DataLoader(d, 500), {"pgd20": TEST_ATTACK}, progress=False)
                for d in (test, train)
            )
            print(
                f"{label:12} {seed:5} {on_test.natural:9.1%} {on_test.robust['pgd20']:23.1%} "
                f"{on_train.robust['pgd20']:10.1%} {trainer.callback_metrics['loss']:11.3f}"
            )
    print("\nOne small task shows that it runs; for measurements see docs/results.md.")


if __name__ == "__main__":
    main()
