"""The paper's figures of run folders: what is measured, and what runs a figure needs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("scipy")

from awp_optim.attacks import PGD
from awp_optim.lab.config import Config
from awp_optim.lab.data import load_digits
from awp_optim.lab.loading import from_checkpoint
from awp_optim.lab.reports.figures import FIGURES
from awp_optim.lab.reports.landscapes import Landscapes, Measuring
from awp_optim.lab.reports.runs import NotEnough, find_runs, grouped
from awp_optim.lab.reports.sharpness import correlations
from awp_optim.lab.trainer import fit
from awp_optim.landscape import filter_normalized_direction, loss_curve

CONFIG = Config(
    arch="preact_resnet_small", eps=0.2, step_size=0.1, train_steps=1, test_steps=1, epochs=4,
    batch_size=32, augment=False, train_eval=32, eval_every=2, save_every=2,
)  # fmt: skip
HOW = Measuring(
    reach=0.5, points=3, grid=3, gammas=(0.01, 0.1), directions=2, at=0.25, limit=16
)  # fmt: skip
RUNS = {
    "at-0": CONFIG,
    "at-1": replace(CONFIG, seed=1),
    "awp-0": replace(CONFIG, gamma=0.01),
    "awp-1": replace(CONFIG, gamma=0.01, seed=1),
    "awp-2": replace(CONFIG, gamma=0.05),
    "rwp-0": replace(CONFIG, gamma=0.5, direction="random"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = load_digits().limit(32, 16)
    for name, config in RUNS.items():
        fit(config, data, folder / name)
    return folder


@pytest.fixture
def landscapes(tmp_path) -> Landscapes:
    return Landscapes(HOW, tmp_path / "points")


def groups_of(folder: Path, *names: str):
    return grouped(find_runs([folder / name for name in names] or [folder]))


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_measured_drawn_and_put_in_numbers(name, runs, landscapes, tmp_path):
    groups = groups_of(runs)
    drawings = FIGURES[name](groups, landscapes)
    assert len(drawings) == (len(groups) if name == "epochs" else 1)
    for drawing in drawings:
        drawing.draw(tmp_path / f"{drawing.name}.png", drawing.title)
        assert (tmp_path / f"{drawing.name}.png").stat().st_size > 10_000
        assert drawing.caption
        assert drawing.tables
        for title, cells in drawing.tables:
            assert title
            assert len({len(row) for row in cells}) == 1
        json.dumps(drawing.data)


def test_the_landscape_of_averaged_weights_is_theirs(landscapes, tmp_path):
    """And so are the gaps beside it."""
    data = load_digits().limit(32, 16)
    config = replace(CONFIG, ema=0.9, eval_every=1, save_every=1, epochs=8, batch_size=8, eps=0.1)
    fit(config, data, tmp_path / "run")
    (run,) = find_runs([tmp_path / "run"])
    averaged = from_checkpoint(run.last_checkpoint(), ema=True).state_dict()
    model = landscapes.model(run, run.last_checkpoint()).state_dict()
    assert all(torch.equal(model[name], averaged[name]) for name in averaged)
    (drawing,) = FIGURES["flatness"](grouped([run]), landscapes)
    gaps = [gap for points in drawing.data.values() for _, gap in points]
    rows = [row for row in run.rows if "ema_train_robust_acc" in row]
    expected, others = (
        [row[f"{of}train_robust_acc"] - row[f"{of}test_robust_acc"] for row in rows]
        for of in ("ema_", "")
    )
    assert expected != others
    assert gaps == pytest.approx([100 * gap for gap in expected])


def test_a_curve_is_that_of_the_checkpoint_and_of_the_runs_images(runs, landscapes):
    run = find_runs([runs / "awp-0"])[0]
    ours = landscapes.curve(run)
    data = load_digits().limit(32, 16).limit(16)
    # In the layout of the images: attacks start from points that depend on it.
    layout = torch.channels_last
    model = from_checkpoint(runs / "awp-0/last.pt", in_channels=1).to(memory_format=layout)
    directions = [
        filter_normalized_direction(model, torch.Generator().manual_seed(seed)) for seed in (0, 1)
    ]
    images = data.x_train.float().contiguous(memory_format=layout) / 255, data.y_train
    theirs = loss_curve(model, images, PGD(0.2, 0.1, 1), (-0.5, 0.0, 0.5), directions)
    assert np.array_equal(ours.adv_losses, theirs.adv_losses)
    assert ours.n == 16


def test_what_was_measured_is_not_measured_again(runs, landscapes, monkeypatch):
    run = find_runs([runs / "at-0"])[0]
    before = landscapes.curve(run)
    monkeypatch.setattr(PGD, "__call__", lambda *_: pytest.fail("measured again"))
    assert np.array_equal(landscapes.curve(run).adv_losses, before.adv_losses)
    with pytest.raises(pytest.fail.Exception):
        landscapes.curve(run, run.checkpoints()[2])


def test_a_checkpoint_that_was_replaced_is_measured_anew(runs, tmp_path):
    folder = shutil.copytree(runs / "at-0", tmp_path / "run")
    (run,) = find_runs([folder])
    last = folder / "epoch_0004.pt"
    before = Landscapes(HOW, tmp_path / "points").curve(run)
    shutil.copy(folder / "epoch_0002.pt", last)
    after = Landscapes(HOW, tmp_path / "points").curve(run, last)
    other = Landscapes(HOW, tmp_path / "others").curve(run, folder / "epoch_0002.pt")
    assert np.array_equal(after.adv_losses, other.adv_losses)
    assert not np.array_equal(after.adv_losses, before.adv_losses)


def test_the_numbers_are_the_curves(runs, landscapes):
    groups = groups_of(runs, "at-0", "at-1", "awp-0", "awp-1")
    (drawing,) = FIGURES["methods"](groups, landscapes)
    (_, cells), (_, less) = drawing.tables
    assert [row[0] for row in cells] == ["", "AT", "AT-AWP"]
    curves = {k: [landscapes.curve(run) for run in of] for k, of in groups.items()}
    rises = {k: np.array([c.sharpness(0.25).mean for c in of]) for k, of in curves.items()}
    unperturbed = np.mean([c.adv_center for c in curves["AT"]])
    assert cells[1][1].startswith(f"{unperturbed:.3f} ±")
    assert cells[1][2] == f"{rises['AT'].mean():.3f} ± {rises['AT'].std(ddof=1):.3f}"
    difference = rises["AT-AWP"] - rises["AT"]
    assert less[1][0] == "AT-AWP minus AT"
    assert less[1][2] == ", ".join(f"{d:+.3f}" for d in difference)
    assert less[1][3] == f"{rises['AT-AWP'].sum() / rises['AT'].sum():.2f}"
    assert drawing.data["AT"][1] == curves["AT"][1].to_dict()


def test_flatness_and_the_gap_of_every_evaluated_checkpoint(runs, landscapes):
    groups = groups_of(runs, "at-0", "awp-0", "awp-1")
    (drawing,) = FIGURES["flatness"](groups, landscapes)
    assert {label: len(points) for label, points in drawing.data.items()} == {"AT": 2, "AT-AWP": 4}
    (run,) = groups["AT"]
    for point, epoch in zip(drawing.data["AT"], (2, 4), strict=True):
        rise = landscapes.curve(run, run.checkpoints()[epoch]).sharpness(0.25).mean
        row = run.rows[epoch - 1]
        gap = 100 * (row["train_robust_acc"] - row["test_robust_acc"])
        assert point == pytest.approx((rise, gap))
    from scipy.stats import spearmanr

    everything = np.array([*drawing.data["AT"], *drawing.data["AT-AWP"]])
    ((_, (_, whole, awp)),) = drawing.tables
    assert whole[:2] == ["all", "6"]
    assert float(whole[2]) == pytest.approx(np.corrcoef(everything.T)[0, 1], abs=0.006)
    assert float(whole[3]) == pytest.approx(spearmanr(everything).statistic, abs=0.006)
    assert awp[:2] == ["AT-AWP", "4"]
    with pytest.raises(NotEnough, match="save-every"):
        FIGURES["flatness"](groups_of(runs, "at-0"), landscapes)


def test_a_correlation_needs_numbers_that_vary():
    assert correlations([(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)]) == ("-", "-")
    assert correlations([(1.0, 1.0), (2.0, 4.0), (3.0, 9.0)])[1] == "+1.00"
    assert correlations([(1.0, 3.0), (2.0, 1.0), (2.0, 2.0)])[1] == "-0.87"  # ranks 1, 2.5, 2.5


def test_a_single_setting_is_shown_by_its_checkpoints(runs, landscapes):
    (drawing,) = FIGURES["surface"](groups_of(runs, "awp-0"), landscapes)
    assert list(drawing.data) == ["AT-AWP, epoch 2", "AT-AWP, epoch 4"]
    assert np.shape(drawing.data["AT-AWP, epoch 2"]["adv_loss"]) == (3, 3)


def test_more_settings_than_one_picture_of_learning_curves_holds(runs, landscapes):
    (group,) = groups_of(runs, "at-0").values()
    first, second = FIGURES["learning"]({str(i): group for i in range(6)}, landscapes)
    assert [list(first.data), list(second.data)] == [["0", "1", "2", "3"], ["4", "5"]]
    assert [first.name, second.name] == ["learning-1", "learning-2"]
    assert first.title != second.title


def test_methods_leave_random_perturbation_to_its_own_figure(runs, landscapes):
    groups = groups_of(runs)
    (methods,) = FIGURES["methods"](groups, landscapes)
    (rwp,) = FIGURES["rwp"](groups, landscapes)
    assert set(rwp.data) - set(methods.data) == {"AT-RWP"}


@pytest.mark.parametrize(
    ("name", "of", "why"),
    [
        ("methods", ["at-0", "at-1"], "nothing to compare"),
        ("gamma", ["at-0", "awp-0"], "three gammas"),
        ("sizes", ["at-0", "awp-0"], "three gammas"),
        ("rwp", ["at-0", "awp-0"], "--direction random"),
    ],
)
def test_not_enough(name, of, why, runs, landscapes):
    with pytest.raises(NotEnough, match=why):
        FIGURES[name](groups_of(runs, *of), landscapes)


def test_too_many_settings_for_one_picture(runs, landscapes):
    (group,) = groups_of(runs, "at-0").values()
    with pytest.raises(NotEnough, match="--select, of 0; 1; 2"):
        FIGURES["methods"]({str(i): group for i in range(9)}, landscapes)


def test_a_run_without_checkpoints(runs, landscapes, tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    for name in ("config.json", "metrics.csv"):
        shutil.copy(runs / "at-0" / name, path)
    groups = grouped(find_runs([path]))
    FIGURES["learning"](groups, landscapes)
    for name in ("surface", "directions", "histogram", "perturbed", "on-the-fly"):
        with pytest.raises(NotEnough, match="holds no checkpoint"):
            FIGURES[name](groups, landscapes)
    with pytest.raises(NotEnough, match="--save-every"):
        FIGURES["epochs"](groups, landscapes)
