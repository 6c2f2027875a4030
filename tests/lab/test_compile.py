"""Runs whose network is compiled."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from awp_optim._cuda_graphs import graphs
from awp_optim.lab.trainer import fit

pytestmark = pytest.mark.usefixtures("one_thread")

COMPILE = nn.Module.compile


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.fixture
def backend(monkeypatch):
    """Compile by another backend than inductor, which takes a minute."""

    def choose(name):
        monkeypatch.setattr(
            nn.Module, "compile", lambda self, **options: COMPILE(self, backend=name, **options)
        )

    return choose


@pytest.fixture
def rgb(data):
    return replace(
        data, x_train=data.x_train.repeat(1, 3, 1, 1), x_test=data.x_test.repeat(1, 3, 1, 1)
    )


def assert_same(run, other):
    (model, rows), (other_model, other_rows) = run, other
    for row, other_row in zip(rows, other_rows, strict=True):
        for name in row.keys() - {"seconds", "eval_seconds"}:
            assert row[name] == pytest.approx(other_row[name], rel=1e-3, abs=1e-6), name
    torch.testing.assert_close(model.state_dict(), other_model.state_dict(), rtol=1e-3, atol=1e-5)


# 60 images are two batches of 24 and one of 12, and a CPU multiplies fewer than 16 otherwise.
@pytest.mark.parametrize(
    ("changes", "versions"),
    [
        ({}, 5),
        pytest.param(
            {"batch_size": 24, "ascent": "attack", "mixup": 1.0}, 8, marks=pytest.mark.slow
        ),
        ({"batch_size": 22, "method": "trades", "precision": "bfloat16"}, 6),
    ],
)
def test_nothing_is_compiled_again(config, rgb, backend, tmp_path, changes, versions):
    """Neither by a step after the first of its size, nor by an evaluation after the first."""
    backend("eager")
    stance = torch.compiler.set_stance
    config = replace(config, **{"batch_size": 20, "epochs": 2, "ema": 0.5, **changes})
    counters.clear()

    def on_step(done, total):
        stance("default" if done in (2, 3) else "fail_on_recompile")

    def on_epoch(row):
        stance("fail_on_recompile")

    compiled = fit(replace(config, compile=True), rgb, tmp_path, on_step=on_step, on_epoch=on_epoch)
    assert counters["stats"]["unique_graphs"] <= versions
    assert_same(compiled, fit(config, rgb))
    assert json.loads((tmp_path / "config.json").read_text())["compile"] is True
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["model"].keys() == compiled[0].state_dict().keys()
    assert last["ema"].keys() - {"n_averaged"} == {f"module.{k}" for k in last["model"]}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["at", "trades"])
def test_compiled_kernels_compute_what_eager_ones_do(config, data, method):
    config = replace(config, method=method, epochs=1)
    assert_same(fit(config, data), fit(replace(config, compile=True), data))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_step_is_captured(config, data, monkeypatch, precision):
    """Only a GPU can tell: the capture runs kernels that inductor has generated."""
    captures = []
    record = graphs.CudaRecorder.record
    monkeypatch.setattr(
        graphs.CudaRecorder,
        "record",
        lambda self, function: (captures.append(None), record(self, function))[1],
    )
    config = replace(config, precision=precision, epochs=6, lr=0.02, eval_every=6)
    eager = fit(config, data.to("cuda"))[1]
    assert captures
    captures.clear()
    compiled = fit(replace(config, compile=True), data.to("cuda"))[1]
    assert captures
    tolerance = 0.01 if precision == "float32" else 0.03
    for ours, theirs in zip(compiled, eager, strict=True):
        expected = pytest.approx(theirs["step_robust_loss"], rel=tolerance)
        assert ours["step_robust_loss"] == expected
