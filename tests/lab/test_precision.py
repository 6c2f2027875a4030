"""The precision of a run: what "auto" stands for, and that bfloat16 trains as float32 does."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from awp_optim.lab import precision
from awp_optim.lab.precision import resolve_precision
from awp_optim.lab.trainer import check, fit

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def cpu_with(monkeypatch):
    def pretend(*features):
        monkeypatch.setattr(precision, "_cpu_features", lambda: set(features))

    return pretend


@pytest.mark.parametrize(
    ("features", "arch", "chosen"),
    [
        (("avx512_f", "amx_bf16"), "preact_resnet18", "bfloat16"),
        (("avx512_bf16",), "wide_resnet16_4", "bfloat16"),
        (("avx512_bf16",), "torchvision/resnet18", "bfloat16"),
        (("amx_bf16", "avx512_bf16"), "torchvision/vit_b_16", "float32"),
        (("avx512_f", "amx_int8", "amx_tile"), "preact_resnet18", "float32"),
        ((), "vgg19", "float32"),
    ],
)
def test_a_cpu_decides_by_its_instructions_and_the_network(
    config, cpu_with, features, arch, chosen
):
    cpu_with(*features)
    config = replace(config, arch=arch, precision="auto")
    assert resolve_precision(config, CPU) == replace(config, precision=chosen)
    for given in ("float32", "bfloat16"):
        config = replace(config, precision=given)
        assert resolve_precision(config, CPU) == config


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_decides_alone(config, monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    for arch in ("preact_resnet18", "torchvision/vit_b_16"):
        chosen = resolve_precision(
            replace(config, arch=arch, precision="auto"), torch.device("cuda", 1)
        )
        assert chosen.precision == ("bfloat16" if supported else "float32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_this_gpu_decides_by_its_generation(config):
    chosen = resolve_precision(replace(config, precision="auto"), torch.device("cuda"))
    is_ampere = torch.cuda.get_device_capability() >= (8, 0)
    assert chosen.precision == ("bfloat16" if is_ampere else "float32")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="not Linux")
@pytest.mark.parametrize("by_torch", [True, False])
def test_the_instructions_are_those_that_the_kernel_reports(monkeypatch, by_torch):
    if not by_torch:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    elif not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("this torch has no public name for it")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    for name in ("avx2", "amx_bf16", "avx512_bf16"):
        assert (name in precision._cpu_features()) == (name in flags)


def test_a_run_keeps_what_was_chosen_on_any_machine(config, data, tmp_path, cpu_with):
    config = replace(config, precision="auto", epochs=1)
    cpu_with("amx_bf16")
    check(config, data)
    _, rows = fit(config, data, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["precision"] == "bfloat16"
    cpu_with()
    _, resumed = fit(replace(config, epochs=1), data, tmp_path, resume=True)
    assert resumed == rows
    with pytest.raises(ValueError, match="precision was bfloat16, is float32"):
        fit(replace(config, precision="float32"), data, tmp_path, resume=True)


def test_a_run_of_an_older_version_was_in_float32(config, data, tmp_path, cpu_with):
    fit(replace(config, epochs=1), data, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["precision"], settings["compile"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    cpu_with("amx_bf16")
    config = replace(config, precision="auto", epochs=1)
    assert resolve_precision(config, CPU, tmp_path).precision == "float32"
    (tmp_path / "config.json").write_text("{")
    assert resolve_precision(config, CPU, tmp_path).precision == "bfloat16"
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        fit(config, data, tmp_path, resume=True)


@pytest.mark.parametrize("method", ["at", "trades"])
def test_bfloat16_trains_as_float32_does(config, data, method):
    """A forward pass rounds to 8 bits, a relative error of 0.4%; losses average over 24 images."""
    losses = {}
    config = replace(config, method=method, lr=0.02, eval_every=3)
    for name in ("float32", "bfloat16"):
        _, rows = fit(replace(config, precision=name), data)
        losses[name] = torch.tensor([row["step_robust_loss"] for row in rows])
    assert not torch.equal(losses["float32"], losses["bfloat16"])
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=0.02, atol=0)
