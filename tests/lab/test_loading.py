"""Classifiers out of files, functions and RobustBench's zoo."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from awp_optim.lab.loading import (
    from_checkpoint,
    from_function,
    from_robustbench,
    normalized,
    settings_of,
)
from awp_optim.lab.models import Normalize, WideResNet, build_model

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.25)


def small(seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"num_classes": 7, "in_channels": 3, "mean": MEAN, "std": STD, **settings}
    return build_model("preact_resnet_small", **settings).eval()


def same(a, b):
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        return torch.equal(a(x), b(x))


@pytest.fixture
def checkpoint(tmp_path):
    """As the trainer writes it: weights, settings, averaged weights."""
    config = {"arch": "preact_resnet_small", "activation": "silu", "eps": 0.1}
    model, ema = small(0, activation="silu"), small(1, activation="silu")
    path = tmp_path / "best.pt"
    torch.save({"model": model.state_dict(), "config": config, "ema": ema.state_dict()}, path)
    return path, model, ema


class TestCheckpoint:
    def test_it_needs_no_arguments(self, checkpoint):
        path, model, ema = checkpoint
        assert same(from_checkpoint(path), model)
        assert not from_checkpoint(path).training
        assert same(from_checkpoint(path, ema=True), ema)
        assert settings_of(path)["eps"] == 0.1

    def test_a_state_dict_needs_its_network_and_perhaps_a_normalization(self, tmp_path):
        path = tmp_path / "weights.pt"
        model = small()
        weights = {k: v for k, v in model.state_dict().items() if "normalize" not in k}
        torch.save(weights, path)
        assert settings_of(path) == {}
        with pytest.raises(ValueError, match="give --arch"):
            from_checkpoint(path)
        arch = "preact_resnet_small"
        assert same(from_checkpoint(path, arch=arch, mean=MEAN, std=STD), model)
        assert not same(from_checkpoint(path, arch=arch), model)
        for half in ({"mean": MEAN}, {"std": STD}):
            with pytest.raises(ValueError, match="--mean and --std: give both or none"):
                from_checkpoint(path, arch=arch, **half)

    def test_it_is_not_normalized_twice(self, checkpoint):
        with pytest.raises(ValueError, match="its own normalization"):
            from_checkpoint(checkpoint[0], mean=MEAN, std=STD)

    def test_of_another_network_or_other_classes(self, checkpoint):
        with pytest.raises(ValueError, match="as preact_resnet18: the weights do not fit"):
            from_checkpoint(checkpoint[0], arch="preact_resnet18")
        with pytest.raises(ValueError, match="head for 7 classes, not 3"):
            from_checkpoint(checkpoint[0], num_classes=3)

    def test_of_a_published_wide_resnet_with_its_unused_block(self, tmp_path):
        """TRADES' class builds a second first block, which its forward pass does not use."""
        settings = {"num_classes": 10, "in_channels": 3, "mean": 0.0, "std": 1.0}
        model = WideResNet(10, 1, **settings).eval()
        weights = {f"module.{k}": v for k, v in model.state_dict().items() if "norm" not in k}
        copies = {
            k.replace("block1.", "sub_block1."): v + 1
            for k, v in weights.items()
            if ".block1." in k
        }
        assert copies
        path = tmp_path / "wrn.pt"
        torch.save(weights | copies, path)
        assert same(from_checkpoint(path, arch="wide_resnet10_1"), model)
        assert same(from_checkpoint(path, arch="WRN-10-1"), model)

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [
            ("sub_block2.w", torch.ones(1)),
            ("sub_block1.layer.9.conv1.weight", torch.ones(16, 16, 3, 3)),  # no such in block1
            ("sub_block1.layer.0.conv2.weight", torch.ones(3)),  # not its shape
        ],
    )
    def test_nothing_else_is_passed_over(self, tmp_path, name, tensor):
        settings = {"num_classes": 10, "in_channels": 3, "mean": 0.0, "std": 1.0}
        path = tmp_path / "wrn.pt"
        torch.save(WideResNet(10, 1, **settings).state_dict() | {name: tensor}, path)
        with pytest.raises(ValueError, match=f"1 unexpected: {name}"):
            from_checkpoint(path, arch="wide_resnet10_1")


class TestFunction:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path, monkeypatch):
        (tmp_path / "mine_to_load.py").write_text(
            "from torch import nn\n"
            "def good():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Dropout())\n"
            "def bad():\n    return 3\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        yield
        sys.modules.pop("mine_to_load", None)

    def test_of_the_folder_one_is_in(self):
        model = from_function("mine_to_load:good")
        assert not model.training
        assert model(torch.rand(2, 3, 2, 2)).shape == (2, 3)

    @pytest.mark.parametrize(
        ("name", "error", "words"),
        [
            ("mine_to_load", ValueError, "module:function"),
            ("mine_to_load:none", ValueError, "no function 'none'"),
            ("mine_to_load:bad", TypeError, "must return a torch module, not int"),
            ("not_there_at_all:good", ImportError, "not_there_at_all"),
        ],
    )
    def test_that_is_none(self, name, error, words):
        with pytest.raises(error, match=words):
            from_function(name)


class TestRobustBench:
    def test_is_asked_in_its_own_words(self, monkeypatch, tmp_path):
        model, asked = small(), {}

        def load_model(**kwargs):
            asked.update(kwargs)
            if kwargs["model_name"] == "None":
                raise KeyError("None")
            return model.train()

        utils = types.SimpleNamespace(load_model=load_model)
        monkeypatch.setitem(sys.modules, "robustbench", types.SimpleNamespace(utils=utils))
        monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
        loaded = from_robustbench("Wu2020Adversarial", "cifar10", "linf", tmp_path)
        assert loaded is model
        assert not loaded.training
        assert asked == {
            "model_name": "Wu2020Adversarial", "dataset": "cifar10", "threat_model": "Linf",
            "model_dir": str(tmp_path),
        }  # fmt: skip
        from_robustbench("Wu2020Adversarial", "cifar10", "l2", tmp_path)
        assert asked["threat_model"] == "L2"
        with pytest.raises(ValueError, match="RobustBench has no model 'None'"):
            from_robustbench("None", "cifar10", "linf", tmp_path)

    def test_with_a_package_that_lacks_another(self, monkeypatch, tmp_path):
        (tmp_path / "robustbench").mkdir()
        (tmp_path / "robustbench" / "__init__.py").write_text("import not_there_at_all\n")
        monkeypatch.syspath_prepend(tmp_path)
        for name in [n for n in sys.modules if n.partition(".")[0] == "robustbench"]:
            monkeypatch.delitem(sys.modules, name)
        message = "No module named 'not_there_at_all'.*pip install robustbench"
        with pytest.raises(ImportError, match=message):
            from_robustbench("Wu2020Adversarial", "cifar10", "linf", tmp_path)

    def test_which_imports_autoattack_by_its_other_name(self, monkeypatch, tmp_path):
        """As version 1.1.1 of PyPI does, which requires pyautoattack."""
        reference = pytest.importorskip("pyautoattack")
        (tmp_path / "robustbench").mkdir()
        (tmp_path / "robustbench/__init__.py").write_text("from .eval import seen\n")
        (tmp_path / "robustbench/eval.py").write_text(
            "import autoattack\nfrom autoattack.state import EvaluationState\n"
            "seen = [autoattack.AutoAttack, EvaluationState]\n"
        )
        (tmp_path / "robustbench/utils.py").write_text(
            "from robustbench import seen\nload_model = lambda **kwargs: seen.pop(0)()\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        for name in list(sys.modules):
            if name.partition(".")[0] in ("robustbench", "autoattack"):
                monkeypatch.delitem(sys.modules, name)
        model = small().train()
        monkeypatch.setattr(reference, "AutoAttack", lambda: model)
        try:
            assert from_robustbench("A", "cifar10", "linf", tmp_path) is model
        finally:
            for name in ("robustbench", "robustbench.eval", "robustbench.utils"):
                sys.modules.pop(name, None)

    def test_of_pypi(self, tmp_path):
        """With a file of weights where RobustBench keeps those that it has downloaded."""
        if not any(d.name == "robustbench" for d in importlib.metadata.distributions()):
            pytest.skip("needs robustbench, and not the part of it that torchattacks brings")
        threat = {"dataset": "cifar10", "norm": "linf"}
        with pytest.raises(ValueError, match="RobustBench has no model 'None'"):
            from_robustbench("None", folder=tmp_path, **threat)
        zoo = importlib.import_module("robustbench.model_zoo.cifar10").linf
        model = zoo["Sehwag2021Proxy_R18"]["model"]().eval()
        file = tmp_path / "cifar10/Linf/Sehwag2021Proxy_R18.pt"
        file.parent.mkdir(parents=True)
        torch.save(model.state_dict(), file)
        loaded = from_robustbench("Sehwag2021Proxy_R18", folder=tmp_path, **threat)
        x = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))

    @pytest.mark.parametrize(
        ("problem", "message"),
        [
            (Exception("no route"), r"could not load A into .*: Exception: no route"),
            (
                pickle.UnpicklingError("set weights_only to False"),
                r"of A in .* is damaged, or holds",
            ),
        ],
    )
    def test_that_cannot_download_or_read(self, monkeypatch, tmp_path, problem, message):
        def load_model(**kwargs):
            raise problem

        utils = types.SimpleNamespace(load_model=load_model)
        monkeypatch.setitem(sys.modules, "robustbench", types.SimpleNamespace(utils=utils))
        monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
        with pytest.raises(RuntimeError, match=message) as error:
            from_robustbench("A", "cifar10", "linf", tmp_path)
        assert "weights_only" not in str(error.value)


class TestNormalized:
    def test_it_comes_first(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        x = torch.rand(2, 3, 2, 2)
        mean, std = (torch.tensor(t).view(3, 1, 1) for t in (MEAN, STD))
        expected = model((x - mean) / std)
        torch.testing.assert_close(normalized(model, MEAN, STD)(x), expected)
        assert normalized(model, None, None) is model

    def test_refuses_a_second_and_half_a_one(self):
        with pytest.raises(ValueError, match="normalizes its inputs itself"):
            normalized(nn.Sequential(Normalize(MEAN, STD)), MEAN, STD)
        with pytest.raises(ValueError, match="both or none"):
            normalized(nn.Flatten(), MEAN, None)

    def test_three_numbers_for_gray_images(self, tmp_path):
        model = normalized(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), MEAN, STD)
        with pytest.raises(ValueError, match="3 channels, the images 1"):
            model(torch.rand(2, 1, 2, 2))
        torch.save(WideResNet(10, 1, in_channels=1).state_dict(), tmp_path / "w.pt")
        weights = {k: v for k, v in torch.load(tmp_path / "w.pt").items() if "norm" not in k}
        torch.save(weights, tmp_path / "w.pt")
        with pytest.raises(ValueError, match="3 channels, the images 1"):
            from_checkpoint(tmp_path / "w.pt", arch="WRN-10-1", in_channels=1, mean=MEAN, std=STD)


def robustbench_architecture(name):
    """One file of RobustBench: importing the package needs others that may be missing."""
    found = importlib.util.find_spec("robustbench")
    if found is None or found.origin is None:
        pytest.skip("needs robustbench")
    file = Path(found.origin).parent / "model_zoo" / "architectures" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"robustbench_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("unused_block", [False, True])
def test_robustbenchs_wide_resnet_is_ours(unused_block, tmp_path):
    """The published weights of TRADES and RST have this architecture."""
    theirs = robustbench_architecture("wide_resnet")
    torch.manual_seed(0)
    model = theirs.WideResNet(10, 10, 2, sub_block1=unused_block).eval()
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": model.state_dict()}, path)
    assert unused_block == any("sub_block1" in name for name in model.state_dict())
    ours = from_checkpoint(path, arch="wide_resnet10_2")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x))


def test_robustbenchs_preact_resnet_is_ours(tmp_path):
    theirs = robustbench_architecture("resnet")
    torch.manual_seed(0)
    model = theirs.PreActResNet(theirs.PreActBlockV2, [2, 2, 2, 2], bn_before_fc=True).eval()
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    ours = from_checkpoint(path, arch="PreActResNet-18")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x))


def test_robustbenchs_deepmind_wide_resnet_is_ours(tmp_path):
    theirs = robustbench_architecture("dm_wide_resnet")
    torch.manual_seed(0)
    model = theirs.DMWideResNet(10, 10, 2, nn.SiLU).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    ours = from_checkpoint(tmp_path / "weights.pt", arch="WRN-10-2")
    back = theirs.DMWideResNet(10, 10, 2).load_state_dict(ours.state_dict(), strict=False)
    assert back.missing_keys == []
    assert set(back.unexpected_keys) <= {"mean", "std"}  # which some versions do not save
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x))
