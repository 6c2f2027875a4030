"""The program ``awp``: its commands, the scripts that are the same, and how all of them end."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from awp_optim.cli import COMMANDS, main
from awp_optim.lab.commands import ending
from awp_optim.lab.commands.options import number

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = {
    "cifar10": "train",
    "evaluate": "evaluate",
    "landscape": "landscape",
    "compare": "compare",
    "pseudo_label": "pseudo-label",
}
RUN = ("--dataset", "digits", "--arch", "preact_resnet_small", "--limit", 64, "--epochs", 1)
RUN = ("train", *RUN, "--train-steps", 1, "--test-steps", 1)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_no_one_waits_for_torch_to_see_the_commands(option):
    code = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = ['{option}']\n"
    code += "import awp_optim.cli; awp_optim.cli.main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "awp" in ended.stdout


def test_help_lists_the_commands(awp):
    for arguments in ((), ("--help",)):
        ended = awp(*arguments)
        assert ended.status == 0
        assert all(f"  {name} " in ended.out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(awp, command):
    ended = awp(command, "--help")
    assert ended.status == 0
    assert ended.out.startswith(f"usage: awp {command}")


def test_help_of_training_has_every_setting_in_groups(awp):
    text = awp("train", "--recipe", "at/svhn-linf-preact18", "--help").out
    for part in (
        "data options",
        "settings options",
        "--weight-decay",
        "--no-augment",
        "(required)",
    ):
        assert part in text
    assert "(default: 0.01)" in text  # the learning rate on SVHN: a recipe's own
    help = " ".join(awp("evaluate", "--help").out.split())
    assert "runs that code" in help


def test_help_needs_no_more_than_torch():
    code = (
        "import sys\nfrom awp_optim.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*(m for m in ('torchvision', 'sklearn', 'matplotlib.pyplot') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_the_commands(monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(f"usage: awp {SCRIPTS[script]} ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_options_in_a_scripts_docstring_exist(awp, script):
    lines = ast.get_docstring(ast.parse((EXAMPLES / f"{script}.py").read_text())).splitlines()
    named = {w for line in lines for w in line.split() if w.startswith("--")} - {"--nproc-per-node"}
    helps = "".join(awp(command, "--help").out for command in {SCRIPTS[script], "train"})
    assert named
    assert all(option in helps for option in named)


@pytest.mark.slow  # .ci/run runs it, too
def test_quickstart(tmp_path):
    command = [sys.executable, EXAMPLES / "quickstart.py", "--seeds", "1", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for part in ("AT-AWP", "robust, best", "gap, last", "time of a step", "quickstart.png"):
        assert part in done.stdout
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("-1/4", -0.25), ("1e-3", 1e-3)])
def test_numbers(text, value):
    assert number(text) == value


# --- Endings ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What command lines below name: a run, its images, and things that are none."""
    folder = tmp_path_factory.mktemp("files")
    before = Path.cwd()
    os.chdir(folder)
    try:
        main([*map(str, RUN), "--out", "run"])
        main([*map(str, RUN), "--out", "other", "--gamma", "0", "--eps", "0.2"])
    finally:
        os.chdir(before)
    x = np.zeros((4, 8, 8, 1), np.uint8)
    np.savez(folder / "x.npz", x=x)
    np.savez(folder / "y.npz", x=x, y=np.arange(3))
    (folder / "damaged.pt").write_bytes(b"damaged")
    (folder / "file").write_text("of mine")
    (folder / "foreign").mkdir()
    (folder / "foreign/config.json").write_text('{"x": 1}')
    (folder / "state").mkdir()
    (folder / "state/state.jsonl").write_text("a note of mine")
    for name, key, value in (
        ("text", "train_images", "many"),
        ("eps", "eps", "x"),
        ("missing", "train_images", None),
    ):
        (folder / name).mkdir()
        for file in (folder / "run").iterdir():
            if file.is_file():
                (folder / name / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "run/config.json").read_text()) | {key: value}
        config = {k: v for k, v in config.items() if v is not None}
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def snapshot(folder):
    return {
        p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in str(p)
    }


FILES = ("--images", "x.npz", "--checkpoint", "run/best.pt", "--out", "xy.npz")
CIFAR10 = ("train", "--dataset", "cifar10", "--data-dir", "none")
EVALUATE = ("evaluate", "--checkpoint", "run/best.pt", "--limit", 5)
GALLERY = ("landscape", "run", "--gallery")
QUICKSTART = ("examples/quickstart.py", "--epochs", 1, "--seeds", 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("trian",), "no command 'trian'"),
        (("recipes", "--all"), "--all"),
        # Training.
        (("train",), "--out"),
        ((*RUN, "--out", "new", "--gamma", "-1"), "gamma must be finite"),
        ((*RUN, "--out", "new", "--eps", "8"), "8/255"),
        ((*RUN, "--out", "new", "--eps", "a lot"), "'a lot' is not a number or a fraction"),
        ((*RUN, "--out", "new", "--eps", "8/0"), "'8/0'"),
        ((*RUN, "--out", "new", "--limit", "0"), "--limit: must be an integer above 0, not 0"),
        ((*RUN, "--out", "new", "--epochs", "0"), "epochs must be at least 1"),
        ((*RUN, "--out", "new", "--epochs", "1.5"), "--epochs"),
        ((*RUN, "--out", "new", "--seed", 10**30), "seed must be between"),
        ((*RUN, "--out", "new", "--method", "magic"), "invalid choice 'magic'"),
        ((*RUN, "--out", "new", "--recipe", "magic"), "there is no 'magic'"),
        ((*RUN, "--out", "new", "--recipe", "at/cifar10-smal"), "closest are at/cifar10-small"),
        ((*RUN, "--out", "new", "--train-steps=-1"), "train_steps must be at least 0"),
        ((*RUN, "--out", "new", "--max-minutes", "nan"), "--max-minutes must be at least 0"),
        ((*RUN, "--out", "new", "--method", "pretrain", "--init", "run"), "run is a folder"),
        ((*CIFAR10, "--out", "new", "--method", "rst"), "--unlabeled FILE or --labeled N"),
        ((*CIFAR10, "--out", "file/new"), "file/new/config.json cannot be written"),
        ((*RUN, "--out", "new", "--activation", "sine"), "invalid choice 'sine'"),
        ((*RUN, "--out", "new", "--arch", "magic"), "no model"),
        ((*RUN, "--out", "new", "--ema", "1"), "ema must be in [0, 1)"),
        ((*RUN, "--out", "new", "--method", "rst"), "--unlabeled FILE or --labeled N"),
        ((*RUN, "--out", "new", "--method", "rst", "--labeled", "64"), "--labeled must be below"),
        ((*RUN, "--out", "new", "--method", "pretrain"), "--init CHECKPOINT"),
        ((*RUN, "--out", "new", "--method", "pretrain", "--init", "none.pt"), "none.pt"),
        ((*RUN, "--out", "new", "--method", "pretrain", "--init", "damaged.pt"), "damaged.pt"),
        ((*RUN, "--out", "new", "--unlabeled", "none.npz"), "none.npz"),
        ((*RUN, "--out", "new", "--unlabeled", "x.npz", "--labeled", "3"), "give one of the two"),
        ((*RUN, "--out", "new", "--unlabeled"), "name one file or more"),
        ((*RUN, "--out", "new", "--train-images", "20"), "give one of the two"),
        ((*RUN, "--out", "new", "--image-size", "8"), "--image-size is for --dataset folder"),
        ((*RUN, "--out", "new", "--device", "toaster"), "'toaster' is not a device"),
        ((*RUN, "--out", "new", "--device", "cuda:99"), "CUDA devices"),
        ((*RUN, "--out", "run"), "run already holds a run"),
        ((*RUN, "--out", "run", "--resume", "--gamma", "0.5"), "gamma was 0.01, is 0.5"),
        ((*RUN, "--out", "foreign", "--resume"), "foreign"),
        ((*RUN, "--out", "file/run"), "file"),
        # Evaluation.
        (("evaluate",), "--checkpoint, --model, --robustbench"),
        ((*EVALUATE, "--model", "a:b"), "not allowed together"),
        ((*EVALUATE, "--attacks", "fgsm,nope"), "no attack 'nope'; there are: fgsm"),
        ((*EVALUATE, "--attacks", "fgsm,fgsm"), "names fgsm twice"),
        ((*EVALUATE, "--attacks", "autoattack,aa"), "names autoattack twice"),
        ((*EVALUATE, "--attacks", "pgd0"), "no attack 'pgd0'"),
        ((*EVALUATE, "--attacks", "pgd20", "--norm", "l1"), "--attacks pgd20: norm must be one of"),
        ((*EVALUATE, "--eps", "8"), "8/255"),
        ((*EVALUATE, "--eps=-1/255"), "eps must"),
        ((*EVALUATE, "--eps=8/0"), "'8/0'"),
        ((*EVALUATE, "--plot", "0.1,-0.1"), "must not be negative"),
        ((*EVALUATE, "--plot", "a"), "'a' is not a number"),
        ((*EVALUATE, "--plot", "0.1,2"), "more than the width of the box"),
        ((*EVALUATE, "--eps", "nan"), "error: eps must be finite"),
        ((*EVALUATE, "--out", "file/e"), "file/e/results.json cannot be written"),
        (("evaluate", "--checkpoint", "run"), "run is a folder"),
        ((*EVALUATE, "--image-size", "8"), "--image-size is for --dataset folder"),
        ((*EVALUATE, "--mean", "0.5", "--std", "0.5"), "--mean and --std"),
        ((*EVALUATE, "--arch", "preact_resnet18"), "do not fit"),
        ((*EVALUATE, "--ema"), "no averaged weights"),
        ((*EVALUATE, "--out", "state"), "state"),
        (("evaluate", "--checkpoint", "damaged.pt"), "damaged.pt"),
        (("evaluate", "--model", "nowhere:f"), "nowhere"),
        (("evaluate", "--model", "json"), "module:function"),
        (("evaluate", "--model", "json:loads", "--arch", "vgg19"), "go with --checkpoint"),
        (("evaluate", "--robustbench", "Some", "--mean", "0.5"), "--mean and --std"),
        # Landscapes.
        (("landscape", "run"), "--figure, --gallery"),
        (("landscape", "--gallery"), "run folder"),
        ((*GALLERY, "--figure", "methods"), "not allowed together"),
        (("landscape", "run", "--figure", "none"), "there is no 'none'"),
        ((*GALLERY, "--out", "file/g"), "file/g/index.html cannot be written"),
        ((*GALLERY, "--points", 4), "points must be an odd number"),
        ((*GALLERY, "--grid", 1), "grid must be an odd number"),
        ((*GALLERY, "--limit", 0), "limit must be at least 1"),
        ((*GALLERY, "--reach", 0), "reach must be above 0"),
        ((*GALLERY, "--reach", 0.5, "--at", 0.6), "within reach"),
        ((*GALLERY, "--gammas", 0, 1), "gammas must be above 0"),
        ((*GALLERY, "--select", "["), "regular expression"),
        ((*GALLERY, "--select", "nothing"), "matches none of"),
        (("landscape", "foreign", "--gallery"), "foreign"),
        (("landscape", "run", "--figure", "rwp"), "--figure rwp: "),
        (("landscape", "missing", "--figure", "perturbed"), "missing"),
        (("landscape", "text", "--figure", "perturbed"), "text"),
        (("landscape", "eps", "--figure", "perturbed"), "eps"),
        # Comparisons.
        (("compare", "tables"), "invalid choice 'tables'"),
        (("compare", "rwp", "--seeds", 0), "--seeds: must be an integer above 0, not 0"),
        (("compare", "rwp", "--epochs", 0), "--epochs"),
        (("compare", "rwp", "--limit=-1"), "--limit"),
        (("compare", "rwp", "--recipe", "rst/cifar10-linf-wrn28-10"), "there is no 'rst"),
        (("compare", "rwp", "--out", "file"), "file"),
        # Pseudo-labels.
        (("pseudo-label", *FILES[:2]), "--out"),
        (("pseudo-label", *FILES, "--model", "a:b"), "not allowed together"),
        (("pseudo-label", *FILES, "--min-confidence", 1.5), "must be in [0, 1]"),
        (("pseudo-label", *FILES, "--min-confidence", "high"), "'high' is not a number"),
        (("pseudo-label", *FILES, "--batch-size", 0), "--batch-size"),
        (("pseudo-label", *FILES, "--images", "none.npz"), "none.npz"),
        (("pseudo-label", *FILES, "--images", "y.npz"), "4 images and 3 labels"),
        (("pseudo-label", *FILES, "--out", "x.npz"), "--images"),
        (("pseudo-label", *FILES, "--out", "file/xy.npz"), "file"),
        (("pseudo-label", *FILES, "--out", "run"), "run cannot be written (it is a folder)"),
        (
            ("pseudo-label", *FILES[:2], *FILES[4:], "--model", "json:loads", "--arch", "vgg19"),
            "go with --checkpoint",
        ),
        (("pseudo-label", *FILES, "--checkpoint", "damaged.pt"), "damaged.pt"),
        # The quickstart.
        ((*QUICKSTART, "--seeds", 0), "--seeds"),
        ((*QUICKSTART, "--epochs", 0), "--epochs"),
        ((*QUICKSTART, "--gamma=-1"), "gamma must be finite"),
        ((*QUICKSTART, "--out", "q.xyz"), "q.xyz"),
        ((*QUICKSTART, "--out", "file/q.png"), "file/q.png"),
    ],
    ids=lambda value: " ".join(map(str, value))[-50:] if isinstance(value, tuple) else "",
)
def test_a_command_that_cannot_go_on_says_so_and_changes_nothing(
    awp, files, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(files)
    before = snapshot(files)
    if str(arguments[0]).endswith(".py"):
        monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLES.parent / arguments[0]), run_name="__main__")
        status, (out, err) = end.value.code, capsys.readouterr()
    else:
        status, out, err = awp(*arguments)
    assert status == 2
    assert "Traceback" not in err
    assert words in " ".join(err.replace("│", " ").split())
    if not re.search("[-─]{5}", err):  # else it is tyro's, in a frame
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert "━" not in out  # no progress of something that never began
    assert snapshot(files) == before


@pytest.mark.parametrize(
    "error", [OSError("a"), FloatingPointError("a"), ValueError("a\n  b"), TypeError("")]
)
def test_an_error_is_a_sentence(capsys, error):
    def command(ranks):
        raise error

    with pytest.raises(SystemExit) as end:
        ending.run(command)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split()) or 'TypeError'}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_torchrun_cannot_share_say_so(awp, monkeypatch, command):
    monkeypatch.setattr(ending, "job", lambda: nullcontext(SimpleNamespace(world=2)))
    ended = awp(command, "--help")
    if command in ("train", "landscape"):
        assert ended.status == 0
    else:
        assert (ended.status, ended.out) == (2, "")
        assert f"awp {command} runs in a single process" in ended.err


def test_a_bug_is_a_traceback():
    def command(ranks):
        raise KeyError("a")

    with pytest.raises(KeyError):
        ending.run(command)


def test_ctrl_c_says_how_to_continue(capsys):
    def command(ranks):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        ending.run(command, "the same command continues")
    assert end.value.code == 130
    assert capsys.readouterr().err == "stopped; the same command continues\n"


def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.delitem(sys.modules, "awp_optim.lab.commands.recipes", raising=False)
    monkeypatch.delitem(sys.modules, "awp_optim.lab.commands.options", raising=False)
    with pytest.raises(SystemExit) as end:
        main(["recipes"])
    assert end.value.code == 2
    assert "pip install 'awp_optim[lab]'" in capsys.readouterr().err


def test_brackets_in_a_path_are_no_markup(awp):
    for name in ("at[bold]", "x[", "[/b]"):
        ended = awp(*RUN, "--out", f"runs/{name}")
        assert ended.status == 0, ended.err
        assert f"All in runs/{name}." in ended.out


def test_a_full_disk_names_the_file_and_how_to_resume(awp, files, monkeypatch):
    monkeypatch.chdir(files)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    for command in (
        (*EVALUATE, "--attacks", "fgsm", "--out", "full"),
        ("landscape", "run", "other", "--figure", "learning", "--out", "full"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            ended = awp(*command)
        assert ended.status == 2
        assert "full/" in ended.err
        assert "No space left" in ended.err
        assert "the same command" in ended.err


def test_recipes(awp):
    out = awp("recipes").out
    assert "at-awp/cifar10-linf-preact18" in out
    assert "55.39" in out
