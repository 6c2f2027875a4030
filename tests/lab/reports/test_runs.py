"""Run folders as they are found again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from awp_optim.lab.config import Config
from awp_optim.lab.data import load_digits
from awp_optim.lab.reports.runs import Run, by_size, evaluated, find_runs, grouped
from awp_optim.lab.trainer import fit

CONFIG = Config(
    arch="preact_resnet_small", eps=0.2, step_size=0.1, train_steps=1, test_steps=1, epochs=3,
    batch_size=32, augment=False, train_eval=32, eval_every=3, save_every=2,
)  # fmt: skip


def folder(path: Path, config: Config, **about: object) -> Path:
    """What a run leaves, but for its checkpoints."""
    path.mkdir(parents=True)
    content = {**asdict(config), "dataset": "digits", "train_images": 450, **about}
    (path / "config.json").write_text(json.dumps(content))
    (path / "metrics.csv").write_text("epoch,lr\n0,0.1\n1,0.1\n")
    return path


def test_a_run_as_it_was(tmp_path):
    data = load_digits().limit(32, 16)
    _, rows = fit(CONFIG, data, tmp_path / "a/run")
    (run,) = find_runs([tmp_path])
    assert run.config == replace(CONFIG, attack_mode="train")  # as it was resolved
    assert [row["epoch"] for row in run.rows] == [row["epoch"] for row in rows]
    assert {k: p.name for k, p in run.checkpoints().items()} == {2: "epoch_0002.pt", 3: "last.pt"}
    again = run.images()
    for part in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(again, part), getattr(data, part))


def test_the_whole_data_set_stays_in_its_order(tmp_path):
    data = load_digits()
    counts = {"train_images": len(data.x_train), "test_images": len(data.x_test)}
    (run,) = find_runs([folder(tmp_path / "run", CONFIG, **counts)])
    assert torch.equal(run.images().x_train, data.x_train)


def test_each_once_in_order(tmp_path):
    for name in ("b", "a", "c/d"):
        folder(tmp_path / name, CONFIG)
    runs = find_runs([tmp_path / "c", tmp_path, tmp_path / "a"])
    assert [str(r.path.relative_to(tmp_path)) for r in runs] == ["c/d", "a", "b"]


def test_seeds_are_together_and_labels_say_what_differs(tmp_path):
    configs = {
        "at0": CONFIG,
        "at1": replace(CONFIG, seed=1, eval_every=1),
        "awp": replace(CONFIG, gamma=0.01),
        "rwp3": replace(CONFIG, gamma=0.3, direction="random"),
        "rwp6": replace(CONFIG, gamma=0.6, direction="random"),
        "trades": replace(CONFIG, method="trades"),
        "vgg": replace(CONFIG, method="trades", arch="vgg19"),
    }
    groups = grouped(find_runs([folder(tmp_path / k, c) for k, c in configs.items()]))
    assert {label: [r.path.name for r in of] for label, of in groups.items()} == {
        "AT": ["at0", "at1"],
        "AT-AWP": ["awp"],
        "AT-RWP, gamma 0.3": ["rwp3"],
        "AT-RWP, gamma 0.6": ["rwp6"],
        "TRADES, arch preact_resnet_small": ["trades"],
        "TRADES, arch vgg19": ["vgg"],
    }


def test_methods_come_in_the_papers_order_each_first_without_awp(tmp_path):
    configs = {
        "a": replace(CONFIG, method="trades"),
        "b": replace(CONFIG, gamma=0.02),
        "c": replace(CONFIG, gamma=0.3, direction="random"),
        "d": replace(CONFIG, gamma=0.01),
        "e": CONFIG,
    }
    groups = grouped(find_runs([folder(tmp_path / k, c) for k, c in configs.items()]))
    assert [runs[0].path.name for runs in groups.values()] == ["e", "d", "b", "c", "a"]


def test_by_size(tmp_path):
    configs = {
        "at": CONFIG,
        "awp": replace(CONFIG, gamma=0.01, seed=3),
        "awp5": replace(CONFIG, gamma=0.005),
        "rwp": replace(CONFIG, gamma=0.3, direction="random"),
        "trades": replace(CONFIG, method="trades"),
    }
    at, trades = by_size(grouped(find_runs([folder(tmp_path / k, c) for k, c in configs.items()])))
    names = {k: {g: r[0].path.name for g, r in of.items()} for k, of in at.items()}
    assert names == {
        "AWP": {0.0: "at", 0.005: "awp5", 0.01: "awp"},
        "RWP": {0.0: "at", 0.3: "rwp"},
    }
    assert [list(of) for of in trades.values()] == [[0.0], [0.0]]


def test_rows_of_seeds_that_were_not_evaluated_alike():
    def run(*evaluated, epochs):
        rows = [{"epoch": float(e), "lr": 0.1} for e in range(epochs)]
        for e in evaluated:
            rows[e] |= {"test_robust_acc": 0.5, "train_robust_acc": 0.6}
        return Run(Path(f"{epochs}"), CONFIG, {}, rows)

    a, b = run(1, 3, 5, epochs=6), run(0, 3, epochs=5)  # the second was stopped early
    for rows in evaluated([a, b]):
        assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
        assert [row["epoch"] for row in rows if "test_robust_acc" in row] == [3]
        assert [row["epoch"] for row in rows if "train_robust_acc" in row] == [3]
    with pytest.raises(ValueError, match="no epoch after which"):
        evaluated([a, run(2, epochs=3)])


def test_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        find_runs([tmp_path])
    (folder(tmp_path / "run", CONFIG) / "config.json").write_text("{")
    with pytest.raises(ValueError, match="run is no run folder, or damaged"):
        find_runs([tmp_path])
    folder(tmp_path / "other", CONFIG, dataset="mine")
    (run,) = find_runs([tmp_path / "other"])
    with pytest.raises(ValueError, match="cannot be loaded by its name"):
        run.images()
    (tmp_path / "other/metrics.csv").write_text("epoch,lr\n")
    with pytest.raises(ValueError, match="without an epoch"):
        find_runs([tmp_path / "other"])
