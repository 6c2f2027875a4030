"""AWP in an Accelerate loop, with exact gradient accumulation.

    python examples/accelerate_awp.py                  # or: accelerate launch examples/...
    python examples/accelerate_awp.py --accumulate 1   # the same weights, up to rounding

scikit-learn's digits (no download). Needs `pip install -e ".[lab,frameworks]"`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from awp_optim import AWP

BATCH = 100


def windows(loader: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of the batches of one update, which AWP passes twice."""
    batches = iter(loader)
    while window := list(islice(batches, size)):
        yield window


def train(
    accelerator: Accelerator, gamma: float, epochs: int, accumulate: int
) -> tuple[nn.Module, float]:
    set_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    train_set, test_set = TensorDataset(x[:1000], y[:1000]), TensorDataset(x[1000:], y[1000:])
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    net.append(nn.Linear(128, 10))
    opt = AWP(net.parameters(), torch.optim.AdamW, gamma=gamma, lr=3e-3, weight_decay=1e-2)
    model, opt, train_loader, test_loader = accelerator.prepare(
        net,
        opt,
        DataLoader(train_set, BATCH // accumulate, shuffle=True),
        DataLoader(test_set, BATCH),
    )

    for _ in range(epochs):
        for window in windows(train_loader, accumulate):
            n = sum(len(y) for _, y in window)

            def closure(window: list[Any] = window, n: int = n) -> Tensor:
                """The gradients of one update; AWP calls it at w and at w + v."""
                opt.zero_grad()
                total = torch.zeros((), device=accelerator.device)
                for i, (x, y) in enumerate(window, 1):
                    # Processes exchange gradients once, after the last batch.
                    with nullcontext() if i == len(window) else accelerator.no_sync(model):
                        loss = F.cross_entropy(model(x), y, reduction="sum") / n
                        accelerator.backward(loss)
                    total += loss.detach()
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                return total

            opt.step(closure)

    model.eval()
    right = torch.zeros(2, device=accelerator.device)
    with torch.no_grad():
        for x, y in test_loader:
            logits, labels = accelerator.gather_for_metrics((model(x), y))
            right += torch.stack([(logits.argmax(1) == labels).sum(), torch.tensor(len(labels))])
    return net, (right[0] / right[1]).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--gamma", type=float, default=1e-2, help="(%(default)s)")
    parser.add_argument("--accumulate", type=int, default=4, help="batches an update (%(default)s)")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="(%(default)s)")
    args = parser.parse_args()
    if args.accumulate < 1 or BATCH % args.accumulate:
        parser.error(f"--accumulate must divide {BATCH}")
    if args.epochs < 1 or not 0 <= args.gamma < float("inf"):
        parser.error("--epochs must be at least 1, --gamma at least 0 and finite")
    accelerator = Accelerator(mixed_precision=args.precision)
    accelerator.print(
        f"1,000 digits, {args.epochs} epochs, updates of {BATCH} in {args.accumulate} batches, "
        f"{accelerator.num_processes} process(es), mixed precision: {args.precision}\n"
    )
    for label, gamma in (("AdamW", 0.0), (f"AWP, gamma {args.gamma:g}", args.gamma)):
        net, accuracy = train(accelerator, gamma, args.epochs, args.accumulate)
        size = torch.stack([p.detach().norm() for p in net.parameters()]).norm().item()
        accelerator.print(f"{label:20} test accuracy {accuracy:.2%}   weight norm {size:.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
