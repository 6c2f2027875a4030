"""examples/evaluate.py, as a user starts it and in this process."""

from __future__ import annotations

import csv
import importlib.util
import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from awp_optim.attacks import PGD
from awp_optim.evaluation import evaluate
from awp_optim.lab.data import load_digits
from awp_optim.lab.models import build_model

SCRIPT = Path(__file__).parent.parent / "examples" / "evaluate.py"


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A folder with a checkpoint of digits that knows a little."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    data = load_digits()
    torch.manual_seed(0)
    model = build_model("preact_resnet_small", num_classes=10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for i in range(12):
        x, y = data.x_train[64 * i : 64 * i + 64].float() / 255, data.y_train[64 * i : 64 * i + 64]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    config = {"arch": "preact_resnet_small", "eps": 0.1, "norm": "linf"}
    torch.save({"model": model.state_dict(), "config": config}, tmp_path / "best.pt")
    (tmp_path / "config.json").write_text(json.dumps({**config, "dataset": "digits"}))
    return tmp_path, model.eval(), data


@pytest.fixture
def start(run_folder, monkeypatch, capsys):
    """Runs the script here; returns its exit status and what it says."""
    spec = importlib.util.spec_from_file_location("evaluate_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "evaluate_example", module)
    spec.loader.exec_module(module)

    def start(*args, checkpoint=True):
        args = ("--checkpoint", "best.pt", *args) if checkpoint else args
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args), "--device", "cpu"])
        status = None
        try:
            module.main()
        except SystemExit as error:
            status = error.code
        return status, capsys.readouterr().out

    return start


def test_a_checkpoint_says_all_but_the_attacks(run_folder, start):
    folder, model, data = run_folder
    status, said = start("--attacks", "fgsm,pgd5,apgd", "--limit", 60, "--plot", "--seed", 3)
    assert status is None
    for part in ("FGSM", "PGD-5", "APGD-CE", "worst case", "All in evaluation"):
        assert part in said
    out = folder / "evaluation"
    assert {p.name for p in out.iterdir()} == {
        "results.json", "results.csv", "results.md", "record.csv", "state.jsonl", "curves.png",
        "images.png",
    }  # fmt: skip
    content = json.loads((out / "results.json").read_text())
    assert (content["eps"], content["norm"], content["dataset"]) == (0.1, "linf", "digits")
    few = data.limit(60, 60)
    x, y = few.x_test.float() / 255, few.y_test
    r = evaluate(model, (x, y), {"pgd5": PGD(0.1, 0.025, 5)}, checks=False, seed=3)
    assert content["natural"] == r.natural
    assert content["robust"]["pgd5"] == r.robust["pgd5"]
    assert 0 < r.robust["pgd5"] < r.natural
    what = "best.pt on digits: 60 test images, linf, eps 0.1"
    assert what in " ".join(said.split())
    table = (out / "results.md").read_text().splitlines()
    assert table[0] == what
    assert table[2] == "|  | Natural | FGSM | PGD-5 | APGD-CE | worst case |"
    assert f"| {100 * r.natural:.2f} |" in table[4]
    assert table[7].startswith("| attack | accuracy | 95% interval | broken first |")
    assert len(list(csv.reader((out / "record.csv").open()))) == 61
    assert (out / "curves.png").stat().st_size > 5000


def test_options_win_over_the_checkpoint(start, run_folder):
    status, _ = start(
        "--attacks", "cw", "--eps", "8/255", "--norm", "l2", "--limit", 20, "--out", "other",
        "--skip-broken",
    )  # fmt: skip
    assert status is None
    content = json.loads((run_folder[0] / "other" / "results.json").read_text())
    assert content["eps"] == pytest.approx(8 / 255)
    assert (content["norm"], content["skip_broken"]) == ("l2", True)


def test_a_function_of_ones_own(start, run_folder):
    (run_folder[0] / "own_model.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    args = ("--model", "own_model:make", "--dataset", "digits", "--attacks", "fgsm", "--limit", 30)
    assert start(*args, "--mean", 0.3, "--std", 0.4, checkpoint=False)[0] is None
    content = json.loads((run_folder[0] / "evaluation" / "results.json").read_text())
    assert content["checkpoint_sha256"] is None
    status, _ = start(*args, "--arch", "vgg19", "--out", "b", checkpoint=False)
    assert "go with --checkpoint" in status


def test_warnings_are_printed_with_what_to_do(start, run_folder, monkeypatch):
    (run_folder[0] / "masked_model.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Round(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return (x * 4).round() / 4\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return nn.Sequential(Round(), nn.Flatten(), nn.Linear(64, 10))\n"
    )
    _, said = start(
        "--model", "masked_model:make", "--dataset", "digits", "--attacks", "fgsm", "--limit", 80,
        checkpoint=False,
    )  # fmt: skip
    assert "Warnings, which make these figures doubtful:\n" in said
    assert "\n- vanishing: " in said
    assert "\n- vanishing: " in (run_folder[0] / "evaluation" / "results.md").read_text()
    assert "BPDA" in said

    # What is in brackets is no markup.
    module = sys.modules["evaluate_example"]
    monkeypatch.setattr(module, "findings", lambda r: "- some: images in [lo, hi] [bold]")
    _, said = start(
        "--model", "masked_model:make", "--dataset", "digits", "--attacks", "fgsm", "--limit", 80,
        "--resume", checkpoint=False,
    )  # fmt: skip
    assert "- some: images in [lo, hi] [bold]\n" in said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--attacks", "fgsm,nope"), "no attack 'nope'; there are: fgsm"),
        (("--attacks", "fgsm,fgsm"), "names fgsm twice"),
        (("--attacks", "autoattack,aa"), "names autoattack twice"),
        (("--attacks", "pgd0"), "no attack 'pgd0'"),
        (("--eps", "8"), "for 8 of 255 levels give --eps 8/255"),
        (("--eps=-1/255",), "eps must not be negative"),
        (("--image-size", "8"), "--image-size is for --dataset folder"),
        (("--attacks", "pgd20", "--norm", "l1"), "norm must be one of 'linf', 'l2'"),
        (("--mean", "0.5", "--std", "0.5"), "its own normalization"),
        (("--arch", "preact_resnet18"), "do not fit"),
        (("--ema",), "no averaged weights"),
        (("--dataset", "cifar10", "--data-dir", "nowhere/at/all.txt"), ""),
    ],
)
def test_mistakes_are_said_before_anything_is_written(args, words, start, run_folder):
    if "cifar10" in args:
        (run_folder[0] / "nowhere").write_text("a file where a folder should be")
    status, _ = start(*args, "--limit", 5)
    assert isinstance(status, str)
    assert status.startswith("error: ")
    assert words in status
    assert not (run_folder[0] / "evaluation").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--eps", "8/0"),
        ("--eps", "much"),
        ("--plot", "0.1,-0.1"),
        ("--plot", "a"),
        ("--limit", "0"),
    ],
)
def test_what_is_no_number(option, value, start, capsys):
    status, _ = start(f"{option}={value}")
    assert status == 2


def test_models_of_robustbench_normalise_themselves(start, run_folder, monkeypatch):
    _, model, _ = run_folder
    utils = types.SimpleNamespace(load_model=lambda **kwargs: model)
    monkeypatch.setitem(sys.modules, "robustbench", types.SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
    args = ("--robustbench", "Some2020Model", "--dataset", "digits", "--attacks", "fgsm")
    status, _ = start(*args, "--mean", 0.5, "--std", 0.5, checkpoint=False)
    assert "leave --mean and --std away" in status
    status, said = start(*args, "--limit", 20, checkpoint=False)
    assert status is None
    assert "Some2020Model on digits: 20 test images" in said


def test_a_run_on_data_of_ones_own_needs_them_named(start, run_folder):
    folder, _, data = run_folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dataset": "mine"}))
    status, _ = start("--attacks", "fgsm")
    assert status == (
        "error: the run's data set 'mine' is one's own: give --dataset folder or npz, and its place"
        " with --data-dir"
    )
    arrays = {k: getattr(data.limit(40, 40), k).numpy() for k in ("x_train", "x_test")}
    labels = {k: getattr(data.limit(40, 40), k).numpy() for k in ("y_train", "y_test")}
    np.savez(folder / "mine.npz", **arrays, **labels)
    assert start("--attacks", "fgsm", "--dataset", "npz", "--data-dir", "mine.npz")[0] is None


def test_a_folder_of_images_is_resized(start, run_folder):
    image = pytest.importorskip("PIL.Image")
    folder, _, data = run_folder
    for i, (x, y) in enumerate(zip(data.x_test[:60], data.y_test[:60])):
        (folder / "tree" / str(int(y))).mkdir(parents=True, exist_ok=True)
        side = 16 + 8 * (i % 2)
        image.fromarray(x[0].numpy()).resize((side, side)).save(folder / f"tree/{int(y)}/{i}.png")
    args = ("--attacks", "fgsm", "--dataset", "folder", "--data-dir", "tree")
    assert "give the size to resize all of them to" in start(*args)[0]
    status, said = start(*args, "--image-size", 8)
    assert status is None
    assert "best.pt on tree: " in " ".join(said.split())


def test_an_evaluation_that_failed_at_once_is_not_in_the_way(start, run_folder):
    folder, _, data = run_folder
    x = data.x_test[:12].numpy()
    np.savez(folder / "many.npz", x_train=x, y_train=np.arange(12), x_test=x, y_test=np.arange(12))
    status, _ = start("--attacks", "fgsm", "--dataset", "npz", "--data-dir", "many.npz")
    assert "not among the model's 10 classes" in status
    assert start("--attacks", "pgd2", "--limit", 20)[0] is None


def test_the_radii_of_the_curves_can_be_given(start, run_folder, monkeypatch):
    drawn = {}
    module = sys.modules["evaluate_example"]
    monkeypatch.setattr(
        module, "accuracy_by_radius", lambda points, *args, **kwargs: drawn.update(points)
    )
    assert start("--attacks", "fgsm,pgd3", "--limit", 20, "--plot", "0.05,0,51/255")[0] is None
    assert {name: list(at) for name, at in drawn.items()} == {
        "FGSM": [0.0, 0.05, 0.2],
        "PGD-3": [0.0, 0.05, 0.2],
    }
    assert drawn["FGSM"][0.0] >= drawn["FGSM"][0.05] >= drawn["FGSM"][0.2]


def test_a_second_evaluation_there_is_refused(start, run_folder):
    args = ("--attacks", "fgsm", "--limit", 20)
    assert start(*args)[0] is None
    before = {p: p.read_bytes() for p in (run_folder[0] / "evaluation").iterdir()}
    assert "go on with --resume" in start(*args)[0]
    status, _ = start("--attacks", "pgd3", "--limit", 20, "--resume")
    assert "other attacks" in status
    assert before == {p: p.read_bytes() for p in (run_folder[0] / "evaluation").iterdir()}


def test_goes_on_after_a_kill(run_folder):
    folder = run_folder[0]

    def command(out, *more):
        args = ("--attacks", "fgsm,cw", "--limit", 300, "--batch-size", 20, "--out", out)
        return [
            sys.executable, str(SCRIPT), "--checkpoint", "best.pt", *map(str, args), *more,
        ]  # fmt: skip

    subprocess.run(command("whole"), cwd=folder, check=True, capture_output=True, timeout=120)
    killed = subprocess.Popen(
        command("killed"), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    state = folder / "killed" / "state.jsonl"
    deadline = time.monotonic() + 100
    while not (state.exists() and len(state.read_bytes().splitlines()) > 4):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (folder / "killed" / "results.md").exists()
    subprocess.run(
        command("killed", "--resume"), cwd=folder, check=True, capture_output=True, timeout=120
    )
    for name in ("results.csv", "record.csv"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    (_, table, timed), (_, expected, _) = (
        (folder / out / "results.md").read_text().split("\n\n") for out in ("killed", "whole")
    )
    assert table == expected
    assert "| CW_inf |" in timed


def test_a_file_that_is_no_state_is_left_alone(start, run_folder):
    out = run_folder[0] / "evaluation"
    out.mkdir()
    (out / "state.jsonl").write_text("a note of mine")
    status, _ = start("--attacks", "fgsm", "--limit", 5)
    assert status.startswith("error: ")
    assert (out / "state.jsonl").read_text() == "a note of mine"
