"""Run folders found on disk, and grouped."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from awp_optim.lab.config import Config
from awp_optim.lab.data import load_digits
from awp_optim.lab.reports.runs import Run, by_gamma, comparable, find_runs, grouped, select
from awp_optim.lab.trainer import fit

CONFIG = Config(
    arch="preact_resnet_small", eps=0.2, step_size=0.1, train_steps=1, test_steps=1, epochs=3,
    batch_size=32, augment=False, train_eval=32, eval_every=3, save_every=2,
)  # fmt: skip


def folder(path: Path, config: Config = CONFIG, **about: object) -> Path:
    """What a run leaves, but for its checkpoints."""
    path.mkdir(parents=True)
    content = {**asdict(config), "dataset": "digits", "train_images": 450, "test_images": 100}
    (path / "config.json").write_text(json.dumps({**content, **about}))
    (path / "metrics.csv").write_text("epoch,lr\n0,0.1\n1,0.1\n")
    return path


def groups_of(path: Path, **changes: dict[str, object]):
    configs = {name: replace(CONFIG, **change) for name, change in changes.items()}
    return grouped(find_runs([folder(path / name, config) for name, config in configs.items()]))


def names(groups):
    return {label: [run.path.name for run in runs] for label, runs in groups.items()}


def test_a_run_is_read_as_it_was(tmp_path):
    data = load_digits().limit(32, 16)
    _, rows = fit(CONFIG, data, tmp_path / "a/run")
    (run,) = find_runs([tmp_path])
    assert run.config == replace(CONFIG, attack_mode="train")  # as it was resolved
    assert [row["epoch"] for row in run.rows] == [row["epoch"] for row in rows]
    assert {k: p.name for k, p in run.checkpoints().items()} == {2: "epoch_0002.pt", 3: "last.pt"}
    again = run.images()
    for part in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(again, part), getattr(data, part))


def test_a_balanced_subset_is_found_again(tmp_path):
    data = load_digits().balanced(32).limit(None, 16)
    fit(replace(CONFIG, epochs=1), data, tmp_path / "run")
    (run,) = find_runs([tmp_path])
    assert torch.equal(run.images().x_train, data.x_train)
    assert torch.equal(run.images().x_test, data.x_test)


def test_a_full_data_set_keeps_its_order(tmp_path):
    data = load_digits()
    counts = {"train_images": len(data.x_train), "test_images": len(data.x_test)}
    (run,) = find_runs([folder(tmp_path / "run", **counts)])
    assert torch.equal(run.images().x_train, data.x_train)


def test_each_run_is_found_once_in_order(tmp_path):
    for name in ("b", "a", "c/d"):
        folder(tmp_path / name)
    runs = find_runs([tmp_path / "c", tmp_path, tmp_path / "a"])
    assert [str(r.path.relative_to(tmp_path)) for r in runs] == ["c/d", "a", "b"]


def test_runs_behind_a_symbolic_link_are_found(tmp_path):
    folder(tmp_path / "disk/run")
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen/link").symlink_to(tmp_path / "disk/run", target_is_directory=True)
    (tmp_path / "chosen/again").symlink_to(tmp_path / "chosen", target_is_directory=True)
    (run,) = find_runs([tmp_path / "chosen"])
    assert run.path.resolve() == (tmp_path / "disk/run").resolve()


def test_seeds_are_grouped_and_labels_say_what_differs(tmp_path):
    groups = groups_of(
        tmp_path,
        vgg={"method": "trades", "arch": "vgg19"},
        trades={"method": "trades"},
        rwp6={"gamma": 0.6, "direction": "random"},
        rwp3={"gamma": 0.3, "direction": "random"},
        awp={"gamma": 0.01},
        at0={},
        at1={"seed": 1, "eval_every": 1},
    )
    found = names(groups)
    assert found == {
        "AT": ["at0", "at1"],
        "AT-AWP": ["awp"],
        "AT-RWP, gamma 0.3": ["rwp3"],
        "AT-RWP, gamma 0.6": ["rwp6"],
        "TRADES, arch vgg19": ["vgg"],
        "TRADES, arch preact_resnet_small": ["trades"],
    }
    # The paper's order of methods, each first without AWP, then by gamma.
    assert list(found)[:4] == ["AT", "AT-AWP", "AT-RWP, gamma 0.3", "AT-RWP, gamma 0.6"]
    assert names(select(groups, "^AT$")) == {"AT": ["at0", "at1"]}
    for pattern, why in (("[", "regular expression"), ("nothing", "none of AT; AT-AWP")):
        with pytest.raises(ValueError, match=why):
            select(groups, pattern)


def test_by_gamma(tmp_path):
    groups = groups_of(
        tmp_path,
        at={},
        awp={"gamma": 0.01, "seed": 3},
        awp5={"gamma": 0.005},
        rwp={"gamma": 0.3, "direction": "random"},
        trades={"method": "trades"},
    )
    at, trades = by_gamma(groups)
    assert {kind: {g: r[0].path.name for g, r in of.items()} for kind, of in at.items()} == {
        "AWP": {0.0: "at", 0.005: "awp5", 0.01: "awp"},
        "RWP": {0.0: "at", 0.3: "rwp"},
    }
    assert [list(of) for of in trades.values()] == [[0.0], [0.0]]


def test_seeds_that_were_evaluated_at_different_epochs():
    def run(*evaluated, epochs):
        rows = [{"epoch": float(e), "lr": 0.1} for e in range(epochs)]
        for e in evaluated:
            rows[e] |= {"test_robust_acc": 0.5, "train_robust_acc": 0.6}
        return Run(Path(f"{epochs}"), CONFIG, {}, rows)

    first, stopped_early = run(1, 3, 5, epochs=6), run(0, 3, epochs=5)
    for rows in comparable([first, stopped_early]):
        assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
        assert [row["epoch"] for row in rows if "test_robust_acc" in row] == [3]
        assert [row["epoch"] for row in rows if "train_robust_acc" in row] == [3]
    with pytest.raises(ValueError, match="no epoch"):
        comparable([first, run(2, epochs=3)])


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        find_runs([tmp_path])
    (folder(tmp_path / "run") / "metrics.csv").write_text("epoch,lr\n")
    with pytest.raises(ValueError, match="no finished epoch"):
        find_runs([tmp_path])


@pytest.mark.parametrize("content", ["{", "[]", '{"eps": "x"}', '{"norm": "l7"}', '{"gamma": []}'])
def test_a_damaged_config_is_named(content, tmp_path):
    (folder(tmp_path / "run") / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"run is not a run folder, or damaged"):
        find_runs([tmp_path])


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({"dataset": "mine"}, "by its name"),
        ({"dataset": ["digits"]}, "by its name"),
        ({"train_images": None}, "train_images must be"),
        ({"train_images": "450"}, "train_images must be"),
        ({"test_images": 10**6}, "test_images must be"),
    ],
)
def test_images_that_cannot_be_loaded_again(about, why, tmp_path):
    (run,) = find_runs([folder(tmp_path / "run", **about)])
    with pytest.raises(ValueError, match=why):
        run.images()
