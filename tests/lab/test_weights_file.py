"""Weights as safetensors files, and networks that ship with the package."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import awp_optim
from awp_optim.lab import load_model, shipped
from awp_optim.lab.loading import from_checkpoint, settings_of
from awp_optim.lab.models import build_model
from awp_optim.lab.reports.runs import find_runs
from awp_optim.lab.trainer import fit
from awp_optim.lab.weights import initialize, load_weights, sizes_of
from awp_optim.lab.weights_file import read_weights, write_weights

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {"arch": "preact_resnet_small", "activation": "silu", "dataset": "mine", "eps": 0.25}


def network(seed=0, **settings):
    torch.manual_seed(seed)
    settings = {
        "num_classes": 5,
        "in_channels": 2,
        "mean": (0.3, 0.4),
        "std": (0.2, 0.1),
        **settings,
    }
    model = build_model("preact_resnet_small", activation="silu", **settings)
    model(torch.rand(8, 2, 8, 8))  # BatchNorm's statistics
    return model.eval()


def same(a, b):
    x = torch.rand(4, 2, 8, 8)
    with torch.no_grad():
        return torch.equal(a(x), b(x))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.safetensors"
    write_weights(path, network().state_dict(), CONFIG)
    return path


class TestFile:
    def test_others_read_it(self, file):
        """With the format's own package, and by its specification: a length, JSON, bytes."""
        model = network()
        read = load_file(file)
        assert read.keys() == model.state_dict().keys()
        assert all(torch.equal(read[k], v) for k, v in model.state_dict().items())
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        text = json.loads(raw[8 : 8 + length])["__metadata__"]["awp_optim"]
        config = CONFIG | {"num_classes": 5, "in_channels": 2}
        about = {"version": awp_optim.__version__, "averaged": False, "config": config}
        assert json.loads(text) == about

    def test_the_network_is_ready_to_use(self, file):
        model = load_model(file)
        assert not model.training
        assert same(model, network())  # with the activation and the normalization
        assert settings_of(file)["eps"] == 0.25
        other = network(1)
        initialize(other, load_weights(file))
        assert same(other, network())

    def test_averaged_weights_say_so(self, file):
        with pytest.raises(ValueError, match="no averaged weights"):
            load_model(file, ema=True)
        write_weights(file, network(3).state_dict(), CONFIG, averaged=True)
        assert same(load_model(file), network(3))
        assert same(load_model(file, ema=True), network(3))

    def test_half_the_size(self, file, tmp_path):
        half = tmp_path / "half.safetensors"
        weights = network().state_dict()
        write_weights(half, weights, CONFIG, dtype=torch.bfloat16)
        assert half.stat().st_size < 0.6 * file.stat().st_size
        for name, value in load_file(half).items():
            large = weights[name].ndim > 1 and "normalize" not in name
            assert torch.equal(value, weights[name].bfloat16() if large else weights[name]), name
        loaded = load_model(half).state_dict()
        for name, value in weights.items():
            assert loaded[name].dtype == value.dtype
            torch.testing.assert_close(loaded[name], value, rtol=2**-8, atol=0)

    def test_memory_that_is_shared_or_not_contiguous(self, tmp_path):
        weight = torch.rand(4, 6)
        weights = {"a.weight": weight, "b.weight": weight, "c": weight.t(), "d": weight[1:]}
        write_weights(tmp_path / "x.safetensors", weights, {})
        read = load_file(tmp_path / "x.safetensors")
        assert all(torch.equal(read[name], value) for name, value in weights.items())

    def test_of_another_program(self, tmp_path):
        path = tmp_path / "theirs.safetensors"
        save_file(network().state_dict(), path, {"config": "a recipe for soup"})
        assert settings_of(path) == {}
        with pytest.raises(ValueError, match="--arch"):
            load_model(path)
        with pytest.raises(ValueError, match="settings of a run"):
            find_runs([path])
        model = from_checkpoint(path, arch="preact_resnet_small")
        assert all(torch.equal(model.state_dict()[k], v) for k, v in network().state_dict().items())

    def test_damaged(self, file):
        complete = file.read_bytes()
        for part in (b"", complete[:5], complete[:100], complete[:-1], b"\xff" * 100, b"weights"):
            file.write_bytes(part)
            with pytest.raises(ValueError, match=r"net\.safetensors is damaged"):
                load_model(file)

    def test_the_previous_file_survives_a_failed_write(self, file, monkeypatch):
        before = file.read_bytes()
        monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            write_weights(file, network(1).state_dict(), CONFIG)
        assert file.read_bytes() == before
        assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_sizes():
    weights = {
        "stem": torch.zeros(8, 2, 3, 3),
        "b": torch.zeros(9, 8, 3, 3),
        "c": torch.zeros(7, 9),
    }
    assert sizes_of(weights) == {"in_channels": 2, "num_classes": 7}
    assert sizes_of({"bias": torch.zeros(3)}) == {}


class TestRun:
    @pytest.mark.parametrize("ema", [0.0, 0.5])
    def test_a_run_leaves_its_best_weights(self, config, data, tmp_path, ema):
        fit(replace(config, ema=ema, epochs=2), data, tmp_path / "run")
        best = torch.load(tmp_path / "run/best.pt", weights_only=True)
        path = tmp_path / "run/best.safetensors"
        read = load_file(path)
        expected = best["ema" if ema else "model"]
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], value) for name, value in expected.items())
        assert settings_of(path) == best["config"] | {"num_classes": 10, "in_channels": 1}
        model = load_model(path)  # gray: not the three channels of most images
        x = torch.rand(2, 1, 8, 8)
        twin = load_model(tmp_path / "run/best.pt", ema=bool(ema))
        assert torch.equal(model(x), twin(x))
        assert ("ema" in read_weights(path)) == bool(ema)

    def test_a_landscape_needs_nothing_else(self, config, data, tmp_path):
        fit(replace(config, epochs=1), data, tmp_path / "run")
        shutil.move(tmp_path / "run/best.safetensors", tmp_path / "mine.safetensors")
        (there,) = find_runs([tmp_path / "run"])
        (run,) = find_runs([tmp_path / "mine.safetensors"])
        assert run.config == there.config
        assert run.rows == []
        assert run.last_checkpoint() == tmp_path / "mine.safetensors"
        assert torch.equal(run.images().x_train, there.images().x_train)


class TestShipped:
    @pytest.fixture(autouse=True)
    def _net(self, file, monkeypatch):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        monkeypatch.setattr(shipped, "FOLDER", file.parent)
        monkeypatch.setattr(shipped, "DIGESTS", {"net": digest, "other-net": digest})

    def test_by_name(self):
        assert same(load_model("net"), network())
        assert load_weights("net").keys() == network().state_dict().keys()
        assert find_runs(["net"])[0].config.eps == 0.25

    def test_changed(self, file):
        write_weights(file, network(1).state_dict(), CONFIG)
        with pytest.raises(ValueError, match="was changed"):
            load_model("net")

    @pytest.mark.parametrize("name", ["nett", "net.safetensors", "folder/net"])
    def test_no_such_name(self, name, monkeypatch, tmp_path):
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        with pytest.raises(FileNotFoundError, match=rf"{name}.* there are: net, other-net"):
            load_model(name)


@pytest.mark.parametrize("name", shipped.DIGESTS)
def test_what_ships(name):
    """Each network is there with its card, small, and gives finite logits."""
    path = shipped.locate(name)
    assert path.stat().st_size < 5e6
    assert shipped.DIGESTS[name] in path.with_suffix(".md").read_text(encoding="utf-8")
    model = load_model(name)
    assert model(torch.rand(2, 3, 32, 32)).isfinite().all()
    assert read_weights(path)["config"]["dataset"] in name


def test_everything_that_ships_has_a_name():
    files = {p.stem for p in shipped.FOLDER.glob("*") if p.suffix != ".py"}
    assert files == set(shipped.DIGESTS)
