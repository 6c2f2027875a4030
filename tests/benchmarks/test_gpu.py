"""Every GPU question can be answered on a CPU in quick mode, with torch and pytest alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from datetime import datetime
from pathlib import Path

import pytest
import torch

from awp_optim.attacks import AutoAttack
from awp_optim.lab import data as lab_data
from awp_optim.lab.config import Config
from awp_optim.lab.trainer import fit
from benchmarks.gpu import autoattack
from benchmarks.gpu.correct import run_gpu_tests
from benchmarks.gpu.question import Options, Record, answer, table

ROOT = Path(__file__).parents[2]
QUESTIONS = sorted(
    file.stem
    for file in (ROOT / "benchmarks" / "gpu").glob("*.py")
    if file.stem not in ("__init__", "networks", "question")
)
# Imported by every Python process that finds it on its path.
SITECUSTOMIZE = """
from importlib.machinery import PathFinder

class Without(PathFinder):
    missing = {"numpy", "rich", "matplotlib", "hypothesis", "torchvision", "sklearn", "PIL",
               "scipy", "tqdm", "torchattacks", "pyautoattack"}
    find_installed = PathFinder.find_spec

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in cls.missing:
            return cls.find_installed(name, path, target)

PathFinder.find_spec = Without.find_spec
"""
RUN_ALL = """
import importlib, sys
out, *questions = sys.argv[1:]
for name in questions:
    main = importlib.import_module(f"benchmarks.gpu.{name}").main
    code = main(["--device", "cpu", "--quick", "--out", out])
    assert code == 0, f"{name} ended with {code}"
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What all questions write and print where nothing but torch and pytest is installed."""
    out, site = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, str(out), *QUESTIONS],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    contents = [json.loads(file.read_text()) for file in out.glob("*.json")]
    return {content["question"]: content for content in contents}, done.stdout


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered_with_torch_and_pytest_alone(question, results):
    contents, printed = results
    content = contents[question]
    assert content["status"] == "complete"
    assert content["quick"]
    about = content["environment"]
    assert about["torch"] == torch.__version__
    assert about["device"]
    assert {"command", "commit", "cuda", "python", "threads"} <= set(about)
    datetime.fromisoformat(about["date"])
    assert content["figures"] or "not installed" in content["notes"][0]
    assert table(content) in printed


def test_ratios_are_those_of_the_medians(results):
    for case in results[0]["step"]["cases"].values():
        ms = case["median_ms"]
        assert case["over_at"]["AT-AWP exact"] == pytest.approx(ms["AT-AWP exact"] / ms["AT"])
        ratio = ms["reference AT-AWP"] / ms["AT-AWP exact"]
        assert case["reference_over"]["AT-AWP exact"] == pytest.approx(ratio)


def test_the_operations_of_a_step_follow_from_its_passes(results):
    """AWP adds one training pass, which has fewer than three and more than two forward passes."""
    (case,) = results[0]["mfu"]["cases"].values()
    at, exact = case["operations"]["AT"], case["operations"]["AT-AWP exact"]
    training_pass = exact - at
    forward_passes = (at - training_pass) / 2 / 2  # two attack iterations, forward and backward
    assert 2 < training_pass / forward_passes < 3


def test_autoattack_is_against_the_best_checkpoint_of_a_run(tmp_path, monkeypatch):
    for package in ("numpy", "sklearn"):
        pytest.importorskip(package)
    config = Config(
        arch="preact_resnet_small", activation="silu", eps=0.2, step_size=0.1, train_steps=1,
        test_steps=1, epochs=2, lr=0.01,
    )  # fmt: skip
    data = lab_data.load_digits().limit(40, 12)
    model, _ = fit(config, data, tmp_path)
    monkeypatch.setattr(lab_data, "load_cifar10", lambda folder, download: data)
    extra = Namespace(data_dir=Path("data"), run_dir=tmp_path, limit=9)
    loaded, x, y, attack = autoattack.load(Options(torch.device("cpu"), extra=extra))
    assert torch.equal(x, data.x_test[:9])
    assert torch.equal(y, data.y_test[:9])
    assert attack == AutoAttack(0.2)
    best = torch.load(tmp_path / "best.pt", weights_only=True)["model"]
    model.load_state_dict(best)
    model.eval()
    inputs = x.float() / 255
    torch.testing.assert_close(loaded(inputs), model(inputs))


@pytest.fixture
def options(tmp_path):
    return Options(torch.device("cpu"), out=tmp_path)


def test_targets_are_judged_and_a_failure_is_recorded(options, capsys):
    record = Record("step", options)

    def measured(record):
        record.figure("reached", 0.3, at_least=0.3)
        record.figure("missed", 1.15, at_most=1.14)
        record.figure("not a number", float("nan"), at_most=1.14)
        return {"ms": 1}

    def failing(record):
        record.update(so_far=1)
        raise RuntimeError("out of memory")

    record.measure("first", measured)
    record.measure("second", failing)
    record.measure("third", measured)
    assert record.close() == 1
    content = json.loads(record.path.read_text())
    assert [f["met"] for f in content["figures"][:3]] == [True, False, False]
    assert content["status"] == "failed"
    assert content["cases"]["second"]["so_far"] == 1
    assert "RuntimeError: out of memory" in content["cases"]["second"]["error"]
    assert content["cases"]["third"]["ms"] == 1
    assert "out of memory" in capsys.readouterr().out


def test_a_run_cut_short_keeps_what_it_had(options):
    def cut(record):
        record.figure("one", 1.0)
        record.update(ms=2.0)
        raise KeyboardInterrupt

    record = Record("memory", options)
    with pytest.raises(KeyboardInterrupt):
        record.measure("case", cut)
    content = json.loads(record.path.read_text())
    assert content["status"] == "running"
    assert content["figures"][0]["value"] == 1.0
    assert content["cases"]["case"]["ms"] == 2.0


def run(tmp_path, *arguments):
    def cases(options):
        return {name: lambda record, n=name: {"name": n} for name in ("resnet", "wide")}

    argv = ["--device", "cpu", "--quick", "--out", str(tmp_path), *arguments]
    code = answer("step", "", cases, argv)
    (file,) = tmp_path.glob("*.json")
    return code, json.loads(file.read_text())


def test_a_case_can_be_chosen(tmp_path, capsys):
    code, content = run(tmp_path, "--case", "wid")
    assert (code, list(content["cases"])) == (0, ["wide"])
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "--case", "vgg")
    assert "resnet, wide" in capsys.readouterr().err


def test_no_case_starts_after_the_time_is_over(tmp_path):
    code, content = run(tmp_path, "--minutes", "-1")
    assert code == 0
    assert content["cases"] == {}
    assert len(content["notes"]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit, match="2"):
        answer("step", "", lambda options: {}, [])
    assert "--device cpu --quick" in capsys.readouterr().err


def test_the_tests_marked_gpu_are_counted(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "gpu = pytest.mark.gpu\n"
        "@gpu\ndef test_good(): pass\n"
        "@gpu\ndef test_bad(): assert 1 == 2, 'not the same'\n"
        "@gpu\n@pytest.mark.skip\ndef test_skipped(): pass\n"
        "def test_unmarked(): assert False\n"
    )
    (tmp_path / "test_needs_more.py").write_text("import no_such_package\n")
    (tmp_path / "test_broken.py").write_text("import awp_optim.no_such_module\n")
    counts = run_gpu_tests(tmp_path)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 2, 1)
    assert "not the same" in "".join(counts["failures"])
    assert "no_such_module" in "".join(counts["failures"])
    assert len(counts["left_out"]) == 1
    assert "test_needs_more" in counts["left_out"][0]
    with pytest.raises(RuntimeError, match="no result"):
        run_gpu_tests(tmp_path, time_limit=0.01)
