"""The attacks of an evaluation against torchattacks and the reference implementations.

    python -m benchmarks.evaluation --data-dir data

The network is the naturally trained CIFAR-10 ResNet-18 of PyPI's pyautoattack; the images are the
first of CIFAR-10's test set. Contestants are timed in turn. Writes evaluation.json and prints
tables.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awp_optim.attacks import APGD, CW, FGSM, PGD, SPSA, AutoAttack
from awp_optim.evaluation import evaluate
from awp_optim.lab.data import load_cifar10
from benchmarks.environment import RESULTS, environment, write_json
from benchmarks.report import about, markdown_table
from benchmarks.timing import interleaved, ratios

EPS = 1 / 255
Contestants = dict[str, Callable[[], Tensor]]


def resnet18() -> nn.Module:
    """A naturally trained network: 93.7% right on the first 1,000 test images."""
    resnet = import_module("pyautoattack.examples.resnet")
    weights = Path(resnet.__file__ or "").with_name("model_test.pt")
    model: nn.Module = resnet.ResNet18()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def suites(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Contestants]:
    """The contestants by title and name; the first of each is what the others are compared with."""
    import torchattacks
    from pyautoattack.autopgd_base import APGDAttack

    few = x[:8], y[:8]
    parts = {
        backend: AutoAttack(EPS, backend=backend).parts() for backend in ("reference", "native")
    }
    spsa: dict[str, Any] = {"delta": 0.001, "lr": 0.01}
    theirs = {
        n: torchattacks.SPSA(model, 8 / 255, **spsa, nb_iter=10, nb_sample=32, max_batch_size=n)
        for n in (64, 4)
    }
    ours = {
        drop: SPSA(8 / 255, **spsa, steps=10, samples=32, drop_fooled=drop)
        for drop in (False, True)
    }
    reference = APGDAttack(model, n_iter=20, norm="Linf", eps=EPS, seed=0, device="cpu")
    apgd = torchattacks.APGD(model, eps=EPS, steps=20)
    return {
        f"FGSM, {len(x)} images": {
            "torchattacks": lambda: torchattacks.FGSM(model, eps=EPS)(x, y),
            "awp_optim": lambda: FGSM(EPS)(model, x, y),
        },
        f"PGD-20, {len(x)} images": {
            "torchattacks": lambda: torchattacks.PGD(model, EPS, EPS / 4, 20)(x, y),
            "awp_optim": lambda: PGD(EPS, EPS / 4, 20)(model, x, y),
        },
        f"APGD-20, {len(x)} images": {
            "torchattacks": lambda: apgd(x, y),
            "reference": lambda: reference.perturb(x, y),
            "awp_optim": lambda: APGD(EPS, 20)(model, x, y),
            "awp_optim, drop_fooled": lambda: APGD(EPS, 20, drop_fooled=True)(model, x, y),
        },
        "SPSA, 10 steps of 32 directions, eps 8/255, 8 images": {
            "torchattacks": lambda: theirs[64](*few),
            "torchattacks, 32 images a pass": lambda: theirs[4](*few),
            "awp_optim, drop_fooled=False": lambda: ours[False](model, *few),
            "awp_optim": lambda: ours[True](model, *few),
        },
        "AutoAttack's apgd-t, 8 images": {
            name: partial(attacks["apgd-t"], model, *few) for name, attacks in parts.items()
        },
    }


def compare(model: nn.Module, y: Tensor, contestants: Contestants, rounds: int) -> dict[str, Any]:
    """Times of each contestant, and how many images it leaves classified right."""
    seconds = interleaved(contestants, rounds=rounds, warmup=0)
    base, *_ = contestants
    found = {}
    for name, call in contestants.items():
        torch.manual_seed(0)
        x_adv = call()
        with torch.no_grad():
            right = int((model(x_adv).argmax(1) == y[: len(x_adv)]).sum())
        found[name] = {
            "seconds": seconds[name],
            "speedup": [1 / r for r in ratios(seconds, name, base)],
            "still_right": right,
            "n": len(x_adv),
        }
    return found


def worst_case(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """What four attacks cost on all images, and each on those that the previous ones left."""
    attacks = {
        "fgsm": FGSM(EPS),
        "pgd20": PGD(EPS, EPS / 4, 20),
        "cw20": CW(EPS, steps=20),
        "apgd20": APGD(EPS, 20, drop_fooled=True),
    }
    found = {}
    for skip_broken in (False, True):
        r = evaluate(model, (x, y), attacks, skip_broken=skip_broken, batch_size=32, checks=False)
        passes = {k: (v.passes or 0) * int(v.attacked.sum()) for k, v in r.records.items()}
        found["skip_broken" if skip_broken else "all images"] = {
            "robust": r.robust,
            "worst_case": r.worst_case,
            "seconds": sum(record.seconds for record in r.records.values()),
            "forward_passes": sum(passes.values()),
        }
    return found


def report(content: dict[str, Any]) -> str:
    """The content of the JSON file as Markdown."""
    rows = [
        {"name": f"{suite}: {name}", **row}
        for suite, found in content["suites"].items()
        for name, row in found.items()
    ]

    def speedup(row: dict[str, Any]) -> str:
        low, middle, high = (f(row["speedup"]) for f in (min, statistics.median, max))
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    attacks = markdown_table(
        {
            "": lambda row: row["name"],
            "seconds, median": lambda row: f"{statistics.median(row['seconds']):.2f}",
            "speed-up (range)": speedup,
            "still right": lambda row: f"{row['still_right']} of {row['n']}",
        },
        rows,
    )
    evaluation = markdown_table(
        {
            "FGSM, PGD-20, CW-20 and APGD-20": lambda row: row["name"],
            "forward passes": lambda row: f"{row['forward_passes']:.0f}",
            "seconds": lambda row: f"{row['seconds']:.1f}",
            "worst case": lambda row: f"{row['worst_case']:.1%}",
        },
        [{"name": name, **row} for name, row in content["worst_case"].items()],
    )
    return f"{attacks}\n\n{evaluation}\n\n{about(content)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="(%(default)s)")
    parser.add_argument("--images", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu", help="(%(default)s)")
    args = parser.parse_args()
    data = load_cifar10(args.data_dir)
    x, y = data.x_test[: args.images].float() / 255, data.y_test[: args.images]
    model = resnet18()
    content = {
        **environment(),
        "suites": {
            title: compare(model, y, contestants, args.rounds)
            for title, contestants in suites(model, x, y).items()
        },
        "worst_case": worst_case(model, x, y),
    }
    write_json(args.out / "evaluation.json", content)
    print(report(content))


if __name__ == "__main__":
    main()
