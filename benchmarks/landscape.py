"""A weight loss landscape against the plain loop that scripts usually draw it with.

    python -m benchmarks.landscape
    python -m benchmarks.landscape --arch preact_resnet_small --size 8 --eps 0.2

For every alpha the plain loop copies the model, loads the images again, attacks with a
``loss.backward()`` that also computes every weight's gradient, and reads a number back for every
batch. Both compute the same curve; they are timed in turn. Writes landscape.json and prints a
table.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from awp_optim.attacks import PGD
from awp_optim.lab.models import build_model
from awp_optim.landscape import filter_normalized_direction, loss_curve
from benchmarks.environment import RESULTS, device_slug, environment, write_json
from benchmarks.reference import attack as plain_attack
from benchmarks.report import about, markdown_table
from benchmarks.timing import interleaved, ratios


def plain_curve(
    model: nn.Module,
    dataset: TensorDataset,
    attack: PGD,
    alphas: Sequence[float],
    direction: Mapping[str, Tensor],
    *,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
) -> list[float]:
    """The adversarial loss at each alpha, Algorithm 1 of the paper in the simplest way."""
    losses = []
    for alpha in alphas:
        moved = copy.deepcopy(model).eval()
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p.add_(alpha * direction[name])
        total = 0.0
        for x, y in DataLoader(dataset, batch_size):
            x, y = x.to(device), y.to(device)
            x_adv = plain_attack(
                moved, x, y, eps=attack.eps, step_size=attack.step_size, steps=attack.steps,
                random_start=attack.random_start,
            )  # fmt: skip
            total += F.cross_entropy(moved(x_adv), y, reduction="sum").item()
        losses.append(total / len(dataset))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arch", default="preact_resnet18", help="(%(default)s)")
    add("--size", type=int, default=32, help="side of the random images (%(default)s)")
    add("--images", type=int, default=64, help="(%(default)s)")
    add("--batch-size", type=int, default=32, help="(%(default)s)")
    add("--eps", type=float, default=8 / 255, help="radius of PGD-10 (%(default).3g)")
    add("--alphas", type=int, default=3, help="points of the curve (%(default)s)")
    add("--rounds", type=int, default=5, help="(%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--out", type=Path, help="folder (benchmarks/results/DEVICE)")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build_model(args.arch, num_classes=10, in_channels=3).to(args.device)
    x, y = torch.rand(args.images, 3, args.size, args.size), torch.randint(10, (args.images,))
    attack = PGD(args.eps, args.eps / 4, 10)
    alphas = torch.linspace(-1, 1, args.alphas).tolist()
    generator = torch.Generator().manual_seed(0)
    direction = filter_normalized_direction(model, generator)
    settings = {"batch_size": args.batch_size, "device": args.device}
    seconds = interleaved(
        {
            "plain loop": lambda: plain_curve(
                model, TensorDataset(x, y), attack, alphas, direction, **settings
            ),
            "loss_curve": lambda: loss_curve(
                model, (x, y), attack, alphas, direction, progress=False, **settings
            ),
        },
        rounds=args.rounds,
        device=args.device,
    )
    content = {
        **environment(args.device),
        "seconds": seconds,
        "speedup": ratios(seconds, "plain loop", "loss_curve"),
    }
    write_json((args.out or RESULTS / device_slug(args.device)) / "landscape.json", content)
    print(
        f"A curve of {args.alphas} alphas, {args.images} images, {args.arch}, PGD-10; loss_curve"
        " also measures the natural loss (and the loss at 0 if 0 is not among the alphas).\n\n"
        f"{table(content)}\n\n{about(content)}"
    )


def table(content: dict[str, Any]) -> str:
    """Times of both contestants, and the speed-up over the rounds."""
    low, middle, high = (f(content["speedup"]) for f in (min, statistics.median, max))
    speedups = {"plain loop": "", "loss_curve": f"{middle:.2f} ({low:.2f} to {high:.2f})"}
    return markdown_table(
        {
            "": lambda row: row["name"],
            "seconds, median": lambda row: f"{statistics.median(row['seconds']):.2f}",
            "speed-up (range)": lambda row: speedups[row["name"]],
        },
        [{"name": name, "seconds": each} for name, each in content["seconds"].items()],
    )


if __name__ == "__main__":
    main()
