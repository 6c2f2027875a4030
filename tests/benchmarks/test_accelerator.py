"""The GPU's questions, asked on a CPU: do they get answered, and is what is written right?"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import accelerator
from benchmarks.accelerator import (
    CAPTURED,
    EAGER_FP32,
    METHODS,
    Options,
    Record,
    cases,
    main,
    measure_memory,
    measure_mfu,
    run,
    run_gpu_tests,
)

ROOT = Path(accelerator.__file__).parent.parent


@pytest.fixture(autouse=True)
def _as_it_was():
    """The command sets what holds for the whole process."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    flags = cudnn.allow_tf32, cudnn.benchmark
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    cudnn.allow_tf32, cudnn.benchmark = flags


@pytest.fixture
def options(tmp_path):
    return Options(torch.device("cpu"), quick=True, out=tmp_path, run_dir=tmp_path / "run")


def written(folder):
    """The JSON files of a folder by item."""
    contents = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return {content["item"]: content for content in contents}


def test_the_command(tmp_path):
    items = ["weights", "attacks", "reproduce", "autoattack"]
    command = [sys.executable, "-m", "benchmarks.accelerator", *items]
    command += ["--device", "cpu", "--quick", "--out", tmp_path, "--run-dir", tmp_path / "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "its figures are void" in done.stdout
    assert "share of a copy's bandwidth" in done.stdout
    results = written(tmp_path)
    assert set(results) == set(items)
    for content in results.values():
        assert (content["status"], content["quick"]) == ("complete", True)
        about = content["environment"]
        assert about["torch"] == torch.__version__
        assert about["command"].startswith("python -m benchmarks.accelerator weights attacks")
        assert {"commit", "date", "device", "cuda"} <= set(about)
        assert all(figure["met"] is None for figure in content["figures"])

    (figures,) = results["weights"]["parts"].values()
    ms = figures["median_ms"]
    assert ms == {name: statistics.median(each) for name, each in figures["ms"].items()}
    share = figures["share_of_copy_bandwidth"]["eager"]
    assert share == pytest.approx((9 / ms["eager"]) / (2 / ms["copy"]))
    assert figures["parameters"] == sum(a * b for a, b in figures["shapes"])
    rate = figures["terabytes_a_second"]["copy"]
    assert rate == pytest.approx(8 * figures["parameters"] / (ms["copy"] / 1e3) / 1e12)

    (figures,) = results["reproduce"]["parts"].values()
    assert figures["epochs_done"] == len(figures["rows"]) == 2
    robust = [row["test_robust_acc"] for row in figures["rows"]]
    assert (figures["best"], figures["last"]) == (100 * max(robust), 100 * robust[-1])
    curve = figures["against_the_published_curve"]
    assert [(c["epochs_done"], c["published_robust"]) for c in curve] == [(1, 20.02), (2, 25.61)]
    seconds = sum(row["train_seconds"] + row["eval_seconds"] for row in figures["rows"])
    assert figures["total_seconds"] == pytest.approx(seconds)

    if not results["autoattack"]["notes"]:  # pyautoattack is there
        (figures,) = results["autoattack"]["parts"].values()
        assert sum(chunk["images"] for chunk in figures["chunks"]) == figures["images"] == 24
        assert 0 <= figures["robust"] <= figures["natural"] <= 1


def test_reproduce_stops_in_time_and_goes_on(options, monkeypatch):
    def rows(minutes):
        record = Record("reproduce", options)
        accelerator.reproduce(Options(**{**vars(options), "minutes": minutes}), record)
        (figures,) = record.content["parts"].values()
        assert figures["epochs_done"] == len(figures["rows"])
        return [
            {name: value for name, value in row.items() if "seconds" not in name}
            for row in figures["rows"]
        ]

    assert rows(0.0) == []
    clock = itertools.count()
    with monkeypatch.context() as patch:  # a second goes by whenever it is asked
        patch.setattr(time, "monotonic", lambda: float(next(clock)))
        parts = rows(5 / 60)
    assert len(parts) == 1
    both = rows(math.inf)
    assert both[:1] == parts
    assert len(both) == 2
    assert rows(0.0) == both


@pytest.mark.parametrize(
    "items",
    [["step"], pytest.param(["step", "compiled"], marks=pytest.mark.slow)],  # compiling takes long
    ids=" and ".join,
)
def test_step_compares_every_setting(options, items):
    assert run(items, options) == 0
    content = written(options.out)["step"]
    compiled = written(options.out)["compiled"] if "compiled" in items else {"parts": {}}
    names = [case.name for case in cases(options)]
    assert len(content["parts"]) == 3 * len(names)
    assert len(compiled["parts"]) == (2 * len(names) if "compiled" in items else 0)
    times = {n: f for n, f in compiled["parts"].items() if "share" not in n}
    for name, figures in (content["parts"] | times).items():
        ms = figures["median_ms"]
        ours = ("at", "exact") if "compiled" in name else METHODS
        assert set(ms) == {*ours, "reference"}
        assert all(len(each) == 2 for each in figures["ms"].values())
        assert set(figures["over_at"]) == set(ours) - {"at"}
        for method, ratio in figures["over_at"].items():
            assert ratio == pytest.approx(ms[method] / ms["at"])
        for method, ratio in figures["reference_over"].items():
            assert ratio == pytest.approx(ms["reference"] / ms[method])
    targets = {f["name"]: f["target"] for f in content["figures"] if f["target"]}
    assert targets == {
        f"{name}, {CAPTURED.name}: {what}": target
        for name, least in zip(names, (6, 4))
        for what, target in (
            ("reference / exact", f">= {least}"),
            ("exact / at", "<= 1.14"),
            ("attack / at", "<= 1.05"),
        )
    }


def test_the_operations_of_a_step_are_those_of_the_published_count(options):
    """F forward; an attack's iteration is 2 F, a training pass 3 F less the stem's input."""
    case = cases(options)[1]
    figures = measure_mfu(case, EAGER_FP32, options)
    flops = []

    def count(module, _, out):
        inputs = module.weight[0].numel()
        flops.append(2 * inputs * out.numel())

    model = case.build()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.rand(case.batch, 3, 32, 32))
    forward, training = sum(flops), 3 * sum(flops) - flops[0]
    assert figures["flops"]["at"] == 2 * case.steps * forward + training
    assert figures["flops"]["exact"] == 2 * case.steps * forward + 2 * training
    ms = figures["median_ms"]
    rate = 2 * figures["matmul_size"] ** 3 / ms["matmul"]
    for method, share in figures["share"].items():
        assert share == pytest.approx(figures["flops"][method] / ms[method] / rate)


def test_memory_is_counted_in_perturbed_parameters(options, monkeypatch):
    case = cases(options)[0]
    size = 4 * sum(p.numel() for p in case.build().parameters() if p.ndim > 1)
    peaks = {"at": 1000, "exact": 1000 + size, "attack": 1000 + 2 * size, "momentum": 1000}
    monkeypatch.setattr(accelerator, "peak_bytes", lambda _, m, *rest: (peaks[m], 2 * peaks[m]))
    figures = measure_memory(case, CAPTURED, options)
    assert figures["over_at_in_parameters"] == {"exact": 1.0, "attack": 2.0, "momentum": 0.0}
    assert figures["peak_reserved_bytes"]["exact"] == 2 * (1000 + size)


def test_memory_is_unknown_on_a_cpu(options):
    figures = measure_memory(cases(options)[0], CAPTURED, options)
    assert figures["over_at_in_parameters"] == {}


class TestRecord:
    def test_targets_are_judged(self, options):
        record = Record("mfu", Options(**{**vars(options), "quick": False}))
        record.figure("reached", 0.3, at_least=0.3)
        record.figure("missed", 0.29, at_least=0.3)
        record.figure("kept", 1.14, at_most=1.14)
        record.figure("broken", 1.15, at_most=1.14)
        record.figure("not a number", math.nan, at_most=1.14)
        record.figure("a list", "a 1, b 2")
        figures = json.loads(record.path.read_text())["figures"]
        assert [f["met"] for f in figures] == [True, False, True, False, False, None]
        assert [f["target"] for f in figures[1:4]] == [">= 0.3", "<= 1.14", "<= 1.14"]

    def test_a_part_that_fails_lets_the_others_go_on(self, options, capsys):
        record = Record("step", options)

        def fails():
            record.update("second", {"so far": 1})
            raise RuntimeError("no memory left")

        assert record.part("first", lambda: {"ms": 1}) == {"ms": 1}
        assert record.part("second", fails) == {}
        assert record.part("third", lambda: {"ms": 3}) == {"ms": 3}
        assert not record.close()
        content = json.loads(record.path.read_text())
        assert content["status"] == "failed"
        assert content["parts"]["first"]["ms"] == 1
        assert content["parts"]["second"]["so far"] == 1
        assert "RuntimeError: no memory left" in content["parts"]["second"]["error"]
        assert content["parts"]["third"]["ms"] == 3
        assert "no memory left" in capsys.readouterr().out


def test_an_item_that_fails_lets_the_others_go_on(options, monkeypatch, capsys):
    def fails(options, record):
        record.part("one", lambda: {"ms": 1.0})
        raise RuntimeError("out of order")

    monkeypatch.setitem(accelerator.ITEMS, "memory", fails)
    assert run(["memory", "weights"], options) == 1
    results = written(options.out)
    assert results["memory"]["status"] == "failed"
    assert "RuntimeError: out of order" in results["memory"]["error"]
    assert results["memory"]["parts"]["one"]["ms"] == 1.0
    assert results["weights"]["status"] == "complete"
    assert "failed" in capsys.readouterr().out


def test_a_run_cut_short_keeps_what_it_had(options, monkeypatch):
    def cut(options, record):
        record.part("one", lambda: {"ms": 1.0})
        record.figure("one", 1.0, at_most=2)
        raise KeyboardInterrupt

    monkeypatch.setitem(accelerator.ITEMS, "memory", cut)
    with pytest.raises(KeyboardInterrupt):
        run(["memory"], options)
    content = written(options.out)["memory"]
    assert content["status"] == "running"
    assert content["parts"]["one"]["ms"] == 1.0
    assert content["figures"][0]["value"] == 1.0


def test_the_tests_marked_gpu_are_counted(tmp_path, options, monkeypatch):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "gpu = pytest.mark.gpu\n"
        "@gpu\ndef test_good(): pass\n"
        "@gpu\ndef test_bad(): assert 1 == 2, 'not the same'\n"
        "@gpu\n@pytest.mark.skip\ndef test_skipped(): pass\n"
        "def test_unmarked(): assert False\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    counts = run_gpu_tests(tmp_path)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 2, 1)
    texts = "".join(counts["failures"].values())
    assert "test_bad" in texts
    assert "not the same" in texts
    assert "no_such_module" in texts
    with pytest.raises(RuntimeError, match=r"no result in 0\.01 s"):
        run_gpu_tests(tmp_path, time_limit=0.01)
    monkeypatch.setattr(accelerator, "run_gpu_tests", lambda tests: counts)
    assert run(["correct"], options) == 1
    assert "not the same" in written(options.out)["correct"]["error"]


def test_without_the_peers_their_part_is_left_out(options, monkeypatch):
    monkeypatch.setattr(accelerator, "optional_module", lambda name: None)
    assert run(["attacks", "autoattack"], options) == 0
    results = written(options.out)
    assert results["attacks"]["notes"] == ["torchattacks is not installed: left out"]
    assert results["autoattack"]["notes"] == ["pyautoattack is not installed: left out"]
    (figures,) = results["attacks"]["parts"].values()
    assert len(figures["median_ms"]) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["step"])
    assert exit.value.code == 2
    assert "no CUDA device; try --device cpu --quick" in capsys.readouterr().err
