"""AWP on tabular data, with and without adversarial inputs, over several seeds.

    python examples/tabular.py                  # breast cancer: 569 rows, 30 columns, 2 classes
    python examples/tabular.py --data wine      # 178 rows, 13 columns, 3 classes

The data come with scikit-learn (no download). The columns are standardized, and a small MLP is
trained on half of the rows. The attack moves every column by up to eps standard deviations.

Needs `pip install -e ".[lab]"`.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from awp_optim import AWP, AdversarialStep
from awp_optim.attacks import PGD
from awp_optim.evaluation import evaluate

LOADERS = {"breast-cancer": load_breast_cancer, "wine": load_wine}


@dataclass(frozen=True)
class Split:
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load(name: str, seed: int) -> Split:
    """Half of the rows for training; their mean and deviation standardize both halves."""
    x, y = LOADERS[name](return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.5, stratify=y, random_state=seed)
    scaler = StandardScaler().fit(x)
    rows = (torch.tensor(scaler.transform(a), dtype=torch.float32) for a in (x, x_test))
    x, x_test = rows
    return Split(x, torch.tensor(y), x_test, torch.tensor(y_test))


def train(data: Split, eps: float, gamma: float, epochs: int, seed: int) -> nn.Module:
    """Train a network; eps 0 is training without an attack, gamma 0 without AWP."""
    generator = torch.manual_seed(seed)
    classes = int(data.y.max()) + 1
    model = nn.Sequential(nn.Linear(data.x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, classes))
    opt = AWP(
        model.parameters(), torch.optim.SGD, gamma=gamma, lr=0.05, momentum=0.9, weight_decay=5e-4
    )
    attack = PGD(eps=eps, step_size=(eps or 1.0) / 3, steps=5, clip=None)
    step = AdversarialStep(model, opt, attack)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.x), generator=generator).split(32):
            step(data.x[rows], data.y[rows])
    return model.eval()


def main() -> None:
    args = parse()
    found = measure(args)
    print(
        f"{args.data}, {args.seeds} seeds, gamma {args.gamma:g}, eps {args.eps:g}; mean ± standard "
        "deviation over seeds\n"
    )
    print(f"{'':14}{'accuracy %':>14}{'under PGD-20 %':>18}{'test loss':>18}")
    for name, runs in found.items():
        print(f"{name:14}{row(runs)}")
    for name, base in (("AWP", "SGD"), ("PGD-5 + AWP", "PGD-5")):
        pairs = zip(found[name], found[base], strict=True)
        differences = [tuple(a - b for a, b in zip(*pair, strict=True)) for pair in pairs]
        print(f"{'difference':14}{row(differences, sign='+')}   {name} minus {base}, by seed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", choices=sorted(LOADERS), default="breast-cancer", help="(%(default)s)")
    add("--seeds", type=int, default=5, help="splits and initial weights (%(default)s)")
    add("--epochs", type=int, default=30, help="(%(default)s)")
    add("--gamma", type=float, default=1e-2, help="(%(default)s)")
    add("--eps", type=float, default=0.2, help="radius of the attack (%(default)s)")
    args = parser.parse_args()
    if args.seeds < 1 or args.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")
    if not (0 <= args.gamma < float("inf") and 0 < args.eps < float("inf")):
        parser.error("--gamma must be at least 0, --eps greater than 0, and both finite")
    return args


def measure(args: argparse.Namespace) -> dict[str, list[tuple[float, float, float]]]:
    """Accuracy and robust accuracy in %, and the test loss, of each method and seed."""
    methods = {
        "SGD": (0.0, 0.0),
        "AWP": (0.0, args.gamma),
        "PGD-5": (args.eps, 0.0),
        "PGD-5 + AWP": (args.eps, args.gamma),
    }
    test_attack = PGD(eps=args.eps, step_size=args.eps / 8, steps=20, clip=None)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in methods}
    for seed in range(args.seeds):
        data = load(args.data, seed)
        for name, (eps, gamma) in methods.items():
            model = train(data, eps, gamma, args.epochs, seed)
            batches = [(data.x_test, data.y_test)]
            r = evaluate(model, batches, {"pgd20": test_attack}, progress=False)
            with torch.no_grad():
                loss = nn.functional.cross_entropy(model(data.x_test), data.y_test).item()
            found[name].append((100 * r.natural, 100 * r.robust["pgd20"], loss))
    return found


def row(runs: list[tuple[float, float, float]], sign: str = "") -> str:
    """Mean and standard deviation of accuracy, robust accuracy and loss."""
    cells = []
    for values, digits in zip(zip(*runs, strict=True), (1, 1, 3), strict=True):
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.mean(values):{sign}.{digits}f} ± {deviation:.{digits}f}")
    return f"{cells[0]:>14}{cells[1]:>18}{cells[2]:>18}"


if __name__ == "__main__":
    main()
