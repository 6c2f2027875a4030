"""``awp compare``: once in earnest, else with made-up figures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from awp_optim.lab.commands import compare
from awp_optim.lab.data import load_digits
from awp_optim.lab.recipes import QUICKSTART, QUICKSTART_IMAGES, RECIPES
from awp_optim.lab.studies import RECIPE_OF, STUDIES

BASE = replace(QUICKSTART, epoch_images=450)


class Pretend:
    """Stands in for ``train``; its figures are a function of the settings."""

    def __init__(self):
        self.configs = []

    def __call__(self, task, config, report):
        self.task = task
        self.configs.append(config)
        robust = 0.6 + 0.02 * config.seed + (0.01 if config.gamma else 0)
        row = {"epoch": 0.0, "test_natural_acc": 0.9, "test_robust_acc": robust}
        return [{**row, "train_robust_acc": 0.8, "pseudo_labels_right": 0.95}]


@pytest.fixture
def pretend(monkeypatch):
    pretend = Pretend()
    monkeypatch.setattr(compare, "train", pretend)
    return pretend


@pytest.mark.parametrize("study", sorted(STUDIES.keys() - RECIPE_OF))
def test_writes_tables_and_a_picture_and_continues(awp, pretend, tmp_path, study):
    arguments = ("compare", study, "--workers", 1, "--out", "out", "--epochs", 3, "--seeds")
    ended = awp(*arguments, 2)
    assert ended.status == 0, ended.err
    configs = STUDIES[study](replace(BASE, epochs=3), digits=True).configs
    assert pretend.configs == [replace(c, seed=s) for c in configs.values() for s in (0, 1)]
    text = (tmp_path / f"out/{study}.md").read_text()
    for label in configs:
        assert f"\n| {label} | 90.0 ± 0.0 |" in text
    assert "| 61.0 ± 1.4 |" in text
    assert "450 labeled training and 899 test images" in text
    assert ("95.0% are right" in text) == (study == "methods")
    assert f"`awp compare {study} --workers 1 --out out --epochs 3 --seeds 2`" in text
    if study == "methods":
        assert "| TRADES-AWP minus TRADES | +0.0 ± 0.0 | +0.0 ± 0.0 | +1.0 ± 0.0 |" in text
    assert (tmp_path / f"out/{study}.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / f"out/{study}.json").read_text())["runs"]) == 2 * len(configs)
    assert "Differences seed by seed" in ended.out
    assert "61.0 ± 1.4" in ended.out

    assert awp(*arguments, 3).status == 0
    assert pretend.configs[2 * len(configs) :] == [replace(c, seed=2) for c in configs.values()]


def test_in_earnest(awp, tmp_path, one_thread):
    """Every method, RST and pre-training among them, for a step or two."""
    options = ("--seeds", 1, "--epochs", 1, "--limit", 32, "--workers", 1)
    ended = awp("compare", "methods", *options, "--out", "out")
    assert ended.status == 0, ended.err
    runs = json.loads((tmp_path / "out/methods.json").read_text())["runs"]
    right = {run["name"]: run["rows"][-1].get("pseudo_labels_right") for run in runs}
    assert {name for name, share in right.items() if share is not None} == {
        "RST, seed 0",
        "RST-AWP, seed 0",
    }
    assert right["RST, seed 0"] == right["RST-AWP, seed 0"]  # the same classifier
    text = (tmp_path / "out/methods.md").read_text()
    assert re.search(r"Of the pseudo-labels \d+\.\d% are right", text)


# --- What a run is trained on -----------------------------------------------------------------


@pytest.fixture
def fitted(monkeypatch):
    """Calls of ``fit``, in order, instead of training."""
    calls = []

    def fit(config, data, out=None, **kwargs):
        calls.append({"config": config, "data": data, "out": out, **kwargs})
        kwargs["on_step"](1, 2)
        kwargs["on_step"](2, 2)
        model = torch.nn.Linear(1, 2)
        model.weight.data.fill_(7)
        return model, [{"epoch": 0.0}]

    monkeypatch.setattr(compare, "fit", fit)
    return calls


def run(config, recipe=None, limit=None, device="cpu", out="out"):
    steps = []
    base = RECIPES[recipe].config if recipe else replace(QUICKSTART, epoch_images=450)
    task = compare.Task(recipe, base, Path("data"), limit, device, Path(out))
    rows = compare.train(task, config, lambda *s: steps.append(s))
    return rows, steps


@pytest.mark.parametrize("method", ["at", "trades", "mart"])
def test_trains_as_the_quickstart_does(fitted, method):
    _, steps = run(replace(BASE, method=method))
    (call,) = fitted
    quickstart = load_digits().limit(QUICKSTART_IMAGES)
    for part in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(call["data"], part), getattr(quickstart, part))
    assert call["out"] is None
    assert steps == [(1, 2), (2, 2)]


def images(x):
    return {image.numpy().tobytes() for image in x}


def test_pretraining_is_on_the_other_images_and_another_task(fitted):
    config = replace(BASE, method="pretrain", lr=0.03, schedule="cosine", gamma=5e-3, seed=4)
    _, steps = run(config)
    before, after = fitted
    quickstart, everything = load_digits().limit(QUICKSTART_IMAGES), load_digits()
    assert torch.equal(after["data"].x_train, quickstart.x_train)
    assert torch.equal(after["data"].y_train, quickstart.y_train)
    assert len(before["data"].x_train) == 898 - 450
    own = images(quickstart.x_train)
    assert not own & images(before["data"].x_train)
    assert own | images(before["data"].x_train) == images(everything.x_train)
    digits = dict(zip((x.numpy().tobytes() for x in everything.x_train), everything.y_train))
    assert before["data"].num_classes == 2
    for image, y in zip(before["data"].x_train, before["data"].y_train):
        assert y == digits[image.numpy().tobytes()] % 2
    assert torch.equal(before["data"].y_test, everything.y_test % 2)
    # Plain adversarial training, and no evaluation before its end.
    assert before["config"] == replace(BASE, seed=4, eval_every=BASE.epochs)
    assert after["config"] == config
    assert (after["init"]["weight"] == 7).all()
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_rst_labels_the_others(fitted, monkeypatch):
    made = load_digits().limit(10), object(), 0.75
    asked = []

    def pseudo_label_rest(config, data, labeled, **kwargs):
        asked.append((config, len(data.x_train), labeled))
        kwargs["on_step"](1, 1)
        return made

    monkeypatch.setattr(compare, "pseudo_label_rest", pseudo_label_rest)
    config = replace(BASE, method="rst")
    rows, steps = run(config)
    assert asked == [(config, 898, 450)]
    (call,) = fitted
    assert call["data"] is made[0]
    assert call["unlabeled"] is made[1]
    assert rows == [{"epoch": 0.0, "pseudo_labels_right": 0.75}]
    assert steps == [(1, 2), (3, 4), (4, 4)]


# --- Recipes ----------------------------------------------------------------------------------


@pytest.fixture
def recipe_data(monkeypatch):
    asked = []

    def load(name, path):
        asked.append((name, path))
        digits = load_digits()
        x, y = digits.x_train.repeat(3, 1, 1, 1), digits.y_train.repeat(3)
        x_test, y_test = digits.x_test.repeat(2, 1, 1, 1), digits.y_test.repeat(2)
        images = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}
        return replace(digits, **images, name=name)

    monkeypatch.setattr(compare, "load", load)
    return asked


def test_a_recipe_is_the_setting_and_the_data(awp, recipe_data, pretend, tmp_path):
    recipe = ("--recipe", "at-awp/svhn-linf-preact18", "--data-dir", "folder", "--limit", 70)
    ended = awp("compare", "methods", *recipe, "--seeds", 1, "--workers", 1, "--out", "out")
    assert ended.status == 0, ended.err
    assert set(recipe_data) == {("svhn", Path("folder"))}
    plain, with_awp = (RECIPES[f"{name}/svhn-linf-preact18"].config for name in ("at", "at-awp"))
    assert pretend.configs[:2] == [replace(plain, awp_start=5), with_awp]
    assert {config.method for config in pretend.configs} == {"at", "trades", "mart"}
    assert pretend.task.load()[1] == 70
    text = (tmp_path / "out/methods.md").read_text()
    assert "RST needs --unlabeled FILE" in text
    assert "70 labeled training and 70 test images" in text
    assert "epochs: 200" in text


def test_the_methods_have_the_papers_beta_whatever_the_recipes(awp, recipe_data, pretend):
    (recipe,) = (name for name in RECIPES if name.startswith("trades-awp-growing/"))
    assert RECIPES[recipe].config.beta != 6
    ended = awp("compare", "methods", "--recipe", recipe, "--seeds", 1, "--workers", 1)
    assert ended.status == 0, ended.err
    assert {config.beta for config in pretend.configs} == {6}


def test_runs_too_short_for_the_awp_of_a_recipe(awp, recipe_data):
    recipe = ("--recipe", "at-awp/svhn-linf-preact18", "--workers", 1)
    ended = awp("compare", "methods", *recipe, "--epochs", 5)
    assert ended.status == 2
    assert "awp_start (5)" in ended.err
    assert "--epochs" in ended.err


@pytest.mark.parametrize("recipe", [None, *(k for k, r in RECIPES.items() if not r.needs)])
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_of_every_recipe(name, recipe):
    base = RECIPES[recipe].config if recipe else QUICKSTART
    study = STUDIES[name](replace(base, method="at", gamma=0.0), digits=recipe is None)
    assert study.configs.keys() >= set(study.compared_with)


def test_the_study_on_a_part_of_cifar10(awp, recipe_data, pretend, tmp_path):
    ended = awp("compare", "cifar10-small", "--seeds", 2, "--workers", 1, "--out", "out")
    assert ended.status == 0, ended.err
    assert set(recipe_data) == {("cifar10", Path("data"))}
    recipe = RECIPES["at/cifar10-small"]
    assert pretend.configs[:4] == [
        replace(recipe.config, gamma=gamma, seed=seed) for gamma in (0, 1e-2) for seed in (0, 1)
    ]
    data, labeled = pretend.task.load()
    assert labeled == len(data.x_train) == recipe.train_images
    per_class = data.y_train.bincount()
    assert per_class.max() - per_class.min() <= 1
    text = (tmp_path / "out/cifar10-small.md").read_text()
    assert f"{labeled} labeled training and 1000 test images" in text
    labels = {"AT", "AT-AWP", "AT-RWP", "TRADES", "TRADES-AWP", "MART", "MART-AWP"}
    assert {name.split(",")[0] for name in names_of(tmp_path / "out/cifar10-small.json")} == labels


def names_of(file):
    return [run["name"] for run in json.loads(file.read_text())["runs"]]


def test_a_run_of_a_recipe_continues_from_its_checkpoints(fitted, recipe_data, tmp_path):
    recipe = "at/cifar10-linf-preact18"
    base = RECIPES[recipe].config
    for config in (base, replace(base, gamma=0.01, seed=2)):
        run(config, recipe, limit=60, out=tmp_path)
    assert [call["out"] for call in fitted] == [
        tmp_path / "runs/base",
        tmp_path / "runs/gamma=0.01,seed=2",
    ]
    assert all(call["resume"] for call in fitted)
    assert len(fitted[0]["data"].x_train) == len(fitted[0]["data"].x_test) == 60


def test_one_run_at_a_time_on_a_gpu(monkeypatch, tmp_path):
    asked = []

    class Stop(Exception):
        pass

    def sweep(configs, train, **kwargs):
        asked.append(kwargs["workers"])
        raise Stop

    monkeypatch.setattr(compare, "sweep", sweep)
    monkeypatch.setattr(compare.Task, "load", lambda self: (load_digits(), 450))
    for device in ("cpu", "cuda"):
        with pytest.raises(Stop):
            compare.compare(compare.Options("rwp", device=device, out=tmp_path))
    assert asked == [None, 1]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (FloatingPointError("nan"), 2, "error: 'AT, seed 0' failed: FloatingPointError: nan"),
        (KeyboardInterrupt(), 130, "stopped; the same command continues"),
    ],
)
def test_a_sweep_that_ends_early(awp, monkeypatch, error, status, words):
    def train(task, config, report):
        raise error

    monkeypatch.setattr(compare, "train", train)
    ended = awp("compare", "rwp", "--workers", 1, "--out", "out")
    assert (ended.status, ended.err) == (status, f"{words}\n")
