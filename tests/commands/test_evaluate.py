"""``awp evaluate``: what is evaluated, what is written, and how an evaluation continues."""

from __future__ import annotations

import csv
import json
import time
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from awp_optim.attacks import PGD, AutoAttack
from awp_optim.evaluation import evaluate
from awp_optim.lab.commands import evaluate as module
from awp_optim.lab.commands.attacks import make_attack
from awp_optim.lab.data import load_digits
from awp_optim.lab.models import build_model

CONFIG = {"arch": "preact_resnet_small", "eps": 0.1, "norm": "linf", "dataset": "digits"}


@pytest.fixture(scope="module")
def trained():
    """A network that knows a little of the digits."""
    data = load_digits()
    torch.manual_seed(0)
    model = build_model("preact_resnet_small", num_classes=10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for i in range(12):
        x, y = data.x_train[64 * i : 64 * i + 64].float() / 255, data.y_train[64 * i : 64 * i + 64]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), data


@pytest.fixture
def run(awp, trained, tmp_path):
    """Runs the command, by default on ``best.pt``."""
    torch.save({"model": trained[0].state_dict(), "config": CONFIG}, tmp_path / "best.pt")

    def run(*arguments, checkpoint=("--checkpoint", "best.pt")):
        return awp("evaluate", *checkpoint, *arguments, "--device", "cpu")

    return run


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_checkpoint_decides_all_but_the_attacks(run, trained, tmp_path):
    model, data = trained
    # The settings are the checkpoint's own, whatever lies beside it.
    (tmp_path / "config.json").write_text(json.dumps({"eps": 0.4, "arch": "vgg19", "norm": "l2"}))
    ended = run("--attacks", "fgsm,pgd5,apgd", "--limit", 60, "--plot", "--seed", 3)
    assert ended.status == 0, ended.err
    for part in ("FGSM", "PGD-5", "APGD-CE", "worst case", "All in evaluation"):
        assert part in ended.out
    out = tmp_path / "evaluation"
    assert {p.name for p in out.iterdir()} == {
        "results.json", "results.csv", "results.md", "record.csv", "state.jsonl", "curves.png",
        "images.png",
    }  # fmt: skip
    content = results(out)
    assert (content["eps"], content["norm"], content["dataset"]) == (0.1, "linf", "digits")
    few = data.limit(60, 60)
    r = evaluate(
        model, (few.x_test.float() / 255, few.y_test), {"pgd5": PGD(0.1, 0.025, 5)},
        checks=False, seed=3,
    )  # fmt: skip
    assert content["natural"] == r.natural
    assert content["robust"]["pgd5"] == r.robust["pgd5"]
    assert 0 < r.robust["pgd5"] < r.natural
    what = "best.pt on digits: 60 test images, linf, eps 0.1"
    assert what in " ".join(ended.out.split())
    assert (out / "results.md").read_text().splitlines()[0] == what
    assert len(list(csv.reader((out / "record.csv").open()))) == 61
    assert (out / "curves.png").stat().st_size > 5000


@pytest.mark.parametrize("content", ["{", '{"eps": "x"}', "[]"])
def test_a_foreign_config_beside_a_checkpoint_is_left_alone(run, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert run("--attacks", "fgsm", "--limit", 5).status == 0
    assert (tmp_path / "config.json").read_text() == content


@pytest.mark.parametrize(("key", "value"), [("eps", "x"), ("eps", 8), ("norm", 3)])
def test_impossible_settings_in_a_checkpoint_name_it(run, trained, tmp_path, key, value):
    torch.save(
        {"model": trained[0].state_dict(), "config": CONFIG | {key: value}}, tmp_path / "odd.pt"
    )
    ended = run("--attacks", "fgsm", checkpoint=("--checkpoint", "odd.pt"))
    assert ended.status == 2
    assert key in ended.err
    assert not (tmp_path / "evaluation").exists()


def test_options_win_over_the_checkpoint(run, tmp_path):
    options = ("--attacks", "cw", "--eps", "8/255", "--norm", "l2", "--limit", 20, "--skip-broken")
    assert run(*options, "--out", "other").status == 0
    content = results(tmp_path / "other")
    assert content["eps"] == pytest.approx(8 / 255)
    assert (content["norm"], content["skip_broken"]) == ("l2", True)


def test_a_function_of_ones_own_is_called_before_images_are_loaded(run, tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "def fails():\n"
        "    raise ValueError('no\\n  weights')\n"
    )
    options = ("--dataset", "digits", "--attacks", "fgsm", "--limit", 30)
    own = ("--model", "own_model:make")
    assert run(*options, "--mean", 0.3, "--std", 0.4, checkpoint=own).status == 0
    assert results(tmp_path / "evaluation")["checkpoint_sha256"] is None
    monkeypatch.setattr(module.DataOptions, "load", lambda self: pytest.fail("images were loaded"))
    ended = run(*options, "--out", "b", checkpoint=("--model", "own_model:fails"))
    assert ended.err == "error: no weights\n"
    assert run(*options, "--out", "b", checkpoint=("--model", "nowhere:f")).status == 2
    monkeypatch.setitem(module.sys.modules, "robustbench", None)
    ended = run(*options, "--out", "b", checkpoint=("--robustbench", "Some2020Model"))
    assert "robustbench" in ended.err


def test_warnings_are_printed_with_what_to_do(run, tmp_path, monkeypatch):
    (tmp_path / "masked_model.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Round(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return (x * 4).round() / 4\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return nn.Sequential(Round(), nn.Flatten(), nn.Linear(64, 10))\n"
    )
    options = ("--dataset", "digits", "--attacks", "fgsm", "--limit", 80)
    masked = ("--model", "masked_model:make")
    ended = run(*options, checkpoint=masked)
    assert "\n- vanishing: " in ended.out
    assert "\n- vanishing: " in (tmp_path / "evaluation/results.md").read_text()
    assert "BPDA" in ended.out
    monkeypatch.setattr(module, "findings", lambda r: "- some: images in [lo, hi] [bold]")
    ended = run(*options, "--resume", checkpoint=masked)
    assert "- some: images in [lo, hi] [bold]\n" in ended.out  # not markup


def test_models_of_robustbench_normalize_themselves(run, trained, monkeypatch):
    utils = types.SimpleNamespace(load_model=lambda **kwargs: trained[0])
    monkeypatch.setitem(module.sys.modules, "robustbench", types.SimpleNamespace(utils=utils))
    monkeypatch.setitem(module.sys.modules, "robustbench.utils", utils)
    options = ("--dataset", "digits", "--attacks", "fgsm", "--limit", 20)
    ended = run(*options, checkpoint=("--robustbench", "Some2020Model"))
    assert ended.status == 0, ended.err
    assert "Some2020Model on digits: 20 test images" in ended.out


def test_data_of_ones_own_must_be_named(run, trained, tmp_path):
    model, data = trained
    config = CONFIG | {"dataset": "mine"}
    torch.save({"model": model.state_dict(), "config": config}, tmp_path / "mine.pt")
    mine = ("--checkpoint", "mine.pt")
    ended = run("--attacks", "fgsm", checkpoint=mine)
    assert ended.status == 2
    assert "'mine'" in ended.err
    few = data.limit(40, 40)
    names = ("x_train", "x_test", "y_train", "y_test")
    np.savez(tmp_path / "mine.npz", **{name: getattr(few, name).numpy() for name in names})
    options = ("--attacks", "fgsm", "--dataset", "npz", "--data-dir", "mine.npz")
    assert run(*options, checkpoint=mine).status == 0


def test_a_folder_of_images_is_resized(run, trained, tmp_path):
    image = pytest.importorskip("PIL.Image")
    data = trained[1]
    for i, (x, y) in enumerate(zip(data.x_test[:60], data.y_test[:60])):
        (tmp_path / "tree" / str(int(y))).mkdir(parents=True, exist_ok=True)
        side = 16 + 8 * (i % 2)
        image.fromarray(x[0].numpy()).resize((side, side)).save(tmp_path / f"tree/{int(y)}/{i}.png")
    options = ("--attacks", "fgsm", "--dataset", "folder", "--data-dir", "tree")
    assert run(*options).status == 2
    ended = run(*options, "--image-size", 8)
    assert ended.status == 0, ended.err
    assert "best.pt on tree: " in " ".join(ended.out.split())


def test_an_evaluation_that_failed_at_once_is_not_in_the_way(run, trained, tmp_path):
    x = trained[1].x_test[:12].numpy()
    y = np.arange(12)  # the network has ten classes
    np.savez(tmp_path / "many.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    ended = run("--attacks", "fgsm", "--dataset", "npz", "--data-dir", "many.npz")
    assert ended.status == 2
    assert run("--attacks", "pgd2", "--limit", 20).status == 0


def test_the_radii_of_the_curves_can_be_given(run, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        module, "accuracy_by_radius", lambda points, *args, **kwargs: drawn.update(points)
    )
    assert run("--attacks", "fgsm,pgd3", "--limit", 20, "--plot", "0.05,0,51/255").status == 0
    assert {name: list(at) for name, at in drawn.items()} == {
        "FGSM": [0.0, 0.05, 0.2],
        "PGD-3": [0.0, 0.05, 0.2],
    }
    assert drawn["FGSM"][0.0] >= drawn["FGSM"][0.05] >= drawn["FGSM"][0.2]


def test_a_second_evaluation_there_is_refused(run, tmp_path):
    options = ("--attacks", "fgsm", "--limit", 20)
    assert run(*options).status == 0
    before = {p: p.read_bytes() for p in (tmp_path / "evaluation").iterdir()}
    assert "--resume" in run(*options).err
    assert "other attacks" in run("--attacks", "pgd3", "--limit", 20, "--resume").err
    assert before == {p: p.read_bytes() for p in (tmp_path / "evaluation").iterdir()}


def test_a_state_file_that_was_changed_is_an_error(run, tmp_path):
    options = ("--attacks", "fgsm", "--limit", 20)
    assert run(*options).status == 0
    state = tmp_path / "evaluation/state.jsonl"
    state.write_text(state.read_text().replace('"fooled"', '"foiled"'))
    ended = run(*options, "--resume")
    assert ended.status == 2
    assert "state.jsonl" in ended.err


def test_continues_after_a_kill_and_reports_where_nobody_looks(run, start, tmp_path):
    options = ("--attacks", "fgsm,pgd20", "--limit", 120, "--batch-size", 10, "--out")
    assert run(*options, "whole").status == 0
    command = ("evaluate", "--checkpoint", "best.pt", "--device", "cpu", *options, "killed")
    with start(*command) as killed:
        state = tmp_path / "killed/state.jsonl"
        deadline = time.monotonic() + 100
        while not (state.exists() and len(state.read_bytes().splitlines()) > 4):
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        killed.kill()
        _, err = killed.communicate()
    assert err == "evaluating: batch 1 of 12\n"
    assert not (tmp_path / "killed/results.md").exists()
    assert run(*options, "killed", "--resume").status == 0
    for name in ("results.csv", "record.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class TestSubmission:
    """``--submission``, with a test set of a few images in the place of CIFAR-10's."""

    OPTIONS = ("--dataset", "cifar10", "--attacks", "autoattack", "--eps", "8/255")

    @pytest.fixture(autouse=True)
    def _few_images(self, trained, monkeypatch):
        few = trained[1].limit(20, 20)
        monkeypatch.setattr(module.DataOptions, "load", lambda self: few)

    def test_is_written_at_the_end(self, run, monkeypatch, tmp_path):
        pytest.importorskip("pyautoattack")
        monkeypatch.setattr("awp_optim.lab.submission.TEST_IMAGES", 20)
        monkeypatch.setattr(
            module, "make_attacks",
            lambda *args: {"aa": AutoAttack(version="standard"), "pgd": PGD(8 / 255, 2 / 255, 1)},
        )  # fmt: skip
        monkeypatch.setattr(AutoAttack, "parts", lambda self: {"part": PGD(8 / 255, 2 / 255, 3)})
        ended = run(*self.OPTIONS, "--submission", "to/Mine2026Awp.json")
        assert ended.status == 0, ended.err
        content = results(tmp_path / "evaluation")
        entry = json.loads((tmp_path / "to/Mine2026Awp.json").read_text())
        assert entry["clean_acc"] == f"{100 * content['natural']:.2f}"
        assert entry["autoattack_acc"] == f"{100 * content['robust']['aa']:.2f}"
        assert entry["architecture"] == "preact_resnet_small"
        form = (tmp_path / "to/Mine2026Awp.md").read_text()
        assert content["checkpoint_sha256"] in form
        assert content["command"] in form

    @pytest.mark.parametrize(
        ("options", "word"),
        [
            ((), "all 10000 test images, not on 20"),
            (("--attacks", "pgd20"), "--attacks autoattack"),
            (("--norm", "l2", "--eps", "128/255"), "no leaderboard"),
            (("--skip-broken",), "--skip-broken"),
            (("--submission", "entry.md"), ".json"),
        ],
    )
    def test_is_refused_before_the_evaluation(self, run, tmp_path, options, word):
        ended = run(*self.OPTIONS, "--submission", "entry.json", *options)
        assert ended.status == 2
        assert word in " ".join(ended.err.split())
        assert not (tmp_path / "evaluation").exists()
        assert not (tmp_path / "entry.json").exists()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_parts_of_autoattack_have_names(norm):
    standard = AutoAttack(0.1, norm).parts()
    for name in ("fab-t", "square"):
        parts = make_attack(name, 0.1, norm).parts()
        assert list(parts) == [name]
        assert replace(parts[name], version="standard") == standard[name]


def test_the_names_of_pgd():
    assert make_attack("pgd20", 8 / 255, "linf") == PGD(8 / 255, 2 / 255, 20)
    assert make_attack("pgd50x10", 8 / 255, "linf") == PGD(8 / 255, 2 / 255, 50, restarts=10)
    assert make_attack("pgd5", 0.5, "l2") == PGD(0.5, 0.0625, 5, "l2")
    for name in ("pgd0", "pgd5x0", "pgd", "pgd5x"):
        with pytest.raises(ValueError, match="no attack"):
            make_attack(name, 0.1, "linf")
