"""Weights out of files, in the layouts that torch's own wrappers give them, and into networks."""

from __future__ import annotations

import copy
import os
import pickle
import traceback
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from awp_optim.lab.models import VGG, PreActResNet, WideResNet, build_model
from awp_optim.lab.weights import initialize, load_checkpoint, load_weights


def network(seed=0, **settings):
    """A small one with statistics of its own everywhere."""
    torch.manual_seed(seed)
    model = PreActResNet(
        (1, 1), 4, **{"num_classes": 5, "mean": (0.4,), "in_channels": 1, **settings}
    )
    with torch.no_grad():
        for t in model.state_dict().values():
            t.copy_(t + torch.rand(t.shape) if t.is_floating_point() else seed + 17)
    return model


def averaged(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.update_parameters(model)
    return average


def equal(weights, state):
    assert list(weights) == list(state)
    for name, tensor in state.items():
        assert weights[name].dtype == tensor.dtype
        assert torch.equal(weights[name], tensor), name


# --- Out of files -----------------------------------------------------------------------------

PREFIXES = {
    "plain": lambda m: m,
    "DataParallel": nn.DataParallel,
    "compiled": torch.compile,
    "compiled DataParallel": lambda m: torch.compile(nn.DataParallel(m)),
    "DataParallel of compiled": lambda m: nn.DataParallel(torch.compile(m)),
    "AveragedModel": averaged,
    "AveragedModel of DataParallel": lambda m: averaged(nn.DataParallel(m)),
}


def compiled_in_part(model):
    model.layer1 = torch.compile(model.layer1)
    return model


def check_no_advice(error):
    """Neither the message nor the printed traceback advises to disable a protection."""
    shown = "".join(traceback.format_exception(error.value))
    assert not any(word in shown.replace("weights_only=True", "") for word in ADVICE)


ADVICE = ("weights_only", "allow_pickle", "unsafe", "trust")


class TestLoad:
    @pytest.mark.parametrize("entry", [None, "model", "state_dict", "model_state_dict", "net"])
    @pytest.mark.parametrize("prefix", PREFIXES)
    def test_layouts(self, tmp_path, prefix, entry):
        model = network()
        state = PREFIXES[prefix](model).state_dict()
        content = state if entry is None else {"epoch": 3, entry: state, "best_acc": 0.5}
        torch.save(content, tmp_path / "w.pt")
        equal(load_weights(tmp_path / "w.pt"), model.state_dict())

    def test_compiled_in_part(self, tmp_path):
        expected = network().state_dict()
        torch.save(compiled_in_part(network()).state_dict(), tmp_path / "w.pt")
        assert any("layer1._orig_mod" in name for name in torch.load(tmp_path / "w.pt"))
        equal(load_weights(tmp_path / "w.pt"), expected)

    def test_a_network_with_a_part_called_module(self, tmp_path):
        model = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
        torch.save(model.state_dict(), tmp_path / "w.pt")
        equal(load_weights(tmp_path / "w.pt"), model.state_dict())

    def test_parameters_become_tensors(self, tmp_path):
        torch.save(dict(network().named_parameters()), tmp_path / "w.pt")
        assert not any(t.requires_grad for t in load_weights(tmp_path / "w.pt").values())

    @pytest.mark.parametrize("file", ["best.pt", "last.pt"])
    def test_checkpoints_of_a_run(self, tmp_path, file):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        average = averaged(network(1))
        content = {
            "model": model.state_dict(),
            "config": {"arch": "preact_resnet18", "gamma": 0.0},
            "row": {"epoch": 1},
            "optimizer": optimizer.state_dict(),
            "random": [torch.get_rng_state()],
            # best.pt holds the average itself, last.pt what resuming needs.
            "ema": (average.module if file == "best.pt" else average).state_dict(),
        }
        torch.save(content, tmp_path / file)
        equal(load_weights(tmp_path / file), model.state_dict())
        equal(load_weights(tmp_path / file, ema=True), average.module.state_dict())
        assert load_checkpoint(tmp_path / file)["config"] == content["config"]

    def test_no_average(self, tmp_path):
        for content in ({"model": network().state_dict(), "row": 1}, network().state_dict()):
            torch.save(content, tmp_path / "w.pt")
            with pytest.raises(ValueError, match=r"w\.pt has no averaged weights.*; it has \w+"):
                load_weights(tmp_path / "w.pt", ema=True)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"optimizer": {}, "epoch": 3}, "w.pt is no state dict.*; it has optimizer, epoch"),
            ({"model": {"a": torch.zeros(2), "b": 3}}, "is no state dict.*; it has model$"),
            ({"model": {}}, "is no state dict"),
            ({}, "it has nothing"),
            ([torch.zeros(2)], "w.pt holds a list, not a state dict"),
            (torch.zeros(2), "w.pt holds a Tensor, not a state dict"),
            ({0: torch.zeros(2)}, "is no state dict.*; it has 0$"),
        ],
    )
    def test_other_content(self, tmp_path, content, message):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=message):
            load_weights(tmp_path / "w.pt")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_truncated(self, tmp_path, zipped):
        file = tmp_path / "w.pt"
        torch.save(network().state_dict(), file, _use_new_zipfile_serialization=zipped)
        equal(load_weights(str(file)), network().state_dict())
        complete = file.read_bytes()
        for part in (0, 0.001, 0.1, 0.5, 0.9, 0.999):
            file.write_bytes(complete[: int(part * len(complete))])
            with pytest.raises(ValueError, match=r"w\.pt is damaged, or not a file of torch\.save"):
                load_weights(file)

    def test_other_files(self, tmp_path):
        file = tmp_path / "w.pt"
        np.savez(tmp_path / "w.npz", x=np.zeros(3))
        npz = (tmp_path / "w.npz").read_bytes()
        strange = pickle.dumps({"a": np.float64(1)}, 4)  # an opcode that torch does not know
        for content in (b"weights", b"\x80\x02}q\x00.", npz, pickle.dumps({"a": 1}, 2), strange):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=r"w\.pt") as error:
                load_weights(file)
            check_no_advice(error)
        with pytest.raises(FileNotFoundError, match=r"none\.pt"):
            load_weights(tmp_path / "none.pt")
        with pytest.raises(IsADirectoryError):
            load_weights(tmp_path)

    def test_a_pickled_network(self, tmp_path):
        torch.save(network(), tmp_path / "w.pt")
        with pytest.raises(
            ValueError, match=r"w\.pt holds .*\.PreActResNet, .*state_dict"
        ) as error:
            load_weights(tmp_path / "w.pt")
        check_no_advice(error)

    def test_it_runs_no_code(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'it-ran'}",)

        torch.save({"model": network().state_dict(), "note": Evil()}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=rf"w\.pt holds {os.name}\.system") as error:
            load_weights(tmp_path / "w.pt")
        check_no_advice(error)
        assert not (tmp_path / "it-ran").exists()


# --- Into networks ----------------------------------------------------------------------------


def mobile(**settings):
    pytest.importorskip("torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_model("torchvision/mnasnet0_5", in_channels=3, **settings)


# The network, the name of its head, an image's shape.
NETWORKS = {
    "preact": (lambda **k: PreActResNet((1, 1), 4, **k), "linear", (3, 8, 8)),
    "wide": (lambda **k: WideResNet(10, 1, **k), "fc", (3, 8, 8)),
    "vgg": (lambda **k: VGG((1, 2), 4, **k), "classifier", (3, 8, 8)),
    "torchvision": (mobile, "model.classifier.1", (3, 32, 32)),
    "mlp": (
        lambda num_classes: nn.Sequential(
            nn.Flatten(), nn.Linear(48, 9), nn.Linear(9, num_classes)
        ),
        "2",
        (3, 4, 4),
    ),
    "one layer": (lambda num_classes: nn.Linear(7, num_classes), "", (7,)),
}


def state_of(model):
    return copy.deepcopy(model.state_dict())


def another(build, seed, **settings):
    torch.manual_seed(seed)
    model = build(**settings)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if "running" in name:
                t.add_(0.01 * torch.rand(t.shape))
            elif not t.is_floating_point():
                t.fill_(seed)
    return model


class TestInitialize:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_the_same_classes(self, name):
        build, _, shape = NETWORKS[name]
        source, model = (another(build, seed, num_classes=5).eval() for seed in (1, 2))
        x = torch.rand(3, *shape)
        assert not torch.allclose(model(x), source(x))
        assert initialize(model, state_of(source)) == []
        assert torch.equal(model(x), source(x))
        equal(model.state_dict(), source.state_dict())

    @pytest.mark.parametrize(("before", "now"), [(1000, 10), (10, 100), (1, 3)])
    @pytest.mark.parametrize("name", NETWORKS)
    def test_other_classes(self, name, before, now):
        build, head, _ = NETWORKS[name]
        source, model = another(build, 1, num_classes=before), another(build, 2, num_classes=now)
        built, given = state_of(model), source.state_dict()
        fresh = initialize(model, given)
        assert fresh == [f"{head}.weight".lstrip("."), f"{head}.bias".lstrip(".")]
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, (built if key in fresh else given)[key]), key

    def test_a_head_without_bias(self):
        def build(n):
            return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, n, bias=False))

        source, model = build(3), build(5)
        assert initialize(model, source.state_dict()) == ["1.weight"]
        assert torch.equal(model[0].weight, source[0].weight)

    def test_tensors_stay_the_networks_own(self):
        source, model = network(1), network(2).to(memory_format=torch.channels_last)
        given = state_of(source)
        parameters = {name: (id(p), p.stride()) for name, p in model.named_parameters()}
        model.linear.weight.requires_grad_(False)
        initialize(model, given)
        for name, p in model.named_parameters():
            assert (id(p), p.stride()) == parameters[name]
            assert p.requires_grad == (name != "linear.weight")
            assert p.grad_fn is None
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        equal(given, source.state_dict())  # not aliased

    def test_other_precisions(self):
        source, model = network(1), network(2)
        initialize(model, {name: t.half() for name, t in source.state_dict().items()})
        assert model.conv1.weight.dtype == torch.float32
        assert torch.equal(model.conv1.weight, source.conv1.weight.half().float())

    def test_statistics_and_counters_may_be_missing(self):
        """A network that was normalized outside has no statistics; old ones have no counters."""
        source, model = network(1), network(2)
        built = state_of(model)
        given = {
            name: tensor for name, tensor in source.state_dict().items()
            if "normalize" not in name and "num_batches" not in name
        }  # fmt: skip
        initialize(model, given)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, given[name] if name in given else built[name])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: w.pop("conv1.weight"), r"1 missing: conv1\.weight\."),
            (lambda w: w.pop("bn.running_mean"), "1 missing: bn.running_mean"),
            (lambda w: w.pop("linear.weight"), "1 missing: linear.weight"),
            (lambda w: w.update(extra=torch.zeros(2)), "1 unexpected: extra"),
            (
                lambda w: w.update({"conv1.weight": torch.zeros(4, 3, 3, 3)}),
                r"1 of another shape: conv1\.weight \(\(4, 3, 3, 3\) given, \(4, 1, 3, 3\) needed",
            ),
            (  # in the first dimension only, but no head
                lambda w: w.update({"bn.bias": torch.zeros(16)}),
                r"1 of another shape: bn\.bias \(\(16,\) given, \(8,\)",
            ),
            (  # a head for other features
                lambda w: w.update(
                    {"linear.weight": torch.zeros(3, 9), "linear.bias": torch.zeros(3)}
                ),
                r"2 of another shape: linear\.weight \(\(3, 9\) given, \(5, 8\) .*linear\.bias",
            ),
            (
                lambda w: w.update({"linear.weight": torch.zeros(3, 8, 1)}),
                r"1 of another shape: linear\.weight \(\(3, 8, 1\)",
            ),
            (lambda w: w["conv1.weight"].fill_(float("nan")), "1 not finite: conv1.weight"),
            (lambda w: w["bn.running_var"].fill_(float("inf")), "1 not finite: bn.running_var"),
            (lambda w: w.clear(), r"\d+ missing: conv1\.weight, .*, \.\.\.\. Do they belong"),
            (
                lambda w: [w.update({"x." + k: w.pop(k)}) for k in list(w)],
                r"\d+ missing: .*; \d+ unexpected: x\.normalize\.mean, .*, \.\.\.",
            ),
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, change, message):
        weights, model = state_of(network(1)), network(2)
        change(weights)
        before = state_of(model)
        with pytest.raises(ValueError, match=message) as error:
            initialize(model, weights)
        assert len(str(error.value)) < 400
        equal(model.state_dict(), before)

    def test_infinite_heads_are_refused_even_if_not_used(self):
        source, model = network(1, num_classes=3), network(2)
        with torch.no_grad():
            source.linear.bias[0] = float("nan")
        with pytest.raises(ValueError, match=r"1 not finite: linear\.bias"):
            initialize(model, source.state_dict())

    def test_only_the_last_layer_is_a_head(self):
        def mlp(hidden, classes):
            return nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, classes))

        for source in (mlp(7, 3), mlp(7, 2)):
            model = mlp(6, 3)
            with pytest.raises(ValueError, match=r"0\.weight \(\(7, 4\) given, \(6, 4\)"):
                initialize(model, source.state_dict())

    def test_a_network_without_a_linear_layer(self):
        def build(n):
            return nn.Sequential(nn.Conv2d(3, n, 1), nn.AdaptiveAvgPool2d(1))

        model = build(3)
        source = build(3)
        assert initialize(model, source.state_dict()) == []
        assert torch.equal(model[0].weight, source[0].weight)
        with pytest.raises(ValueError, match=r"another shape: 0\.weight"):
            initialize(model, build(4).state_dict())

    def test_from_a_file(self, tmp_path):
        """ImageNet's classes, saved under DataParallel, to CIFAR-10's."""
        source = another(NETWORKS["wide"][0], 1, num_classes=1000)
        torch.save(nn.DataParallel(source).state_dict(), tmp_path / "epoch_99.pt")
        model = another(NETWORKS["wide"][0], 2, num_classes=10)
        assert initialize(model, load_weights(tmp_path / "epoch_99.pt")) == ["fc.weight", "fc.bias"]
        x = torch.rand(2, 3, 8, 8)
        source.fc = model.fc
        assert torch.equal(model.eval()(x), source.eval()(x))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_cuda(self):
        source, model = network(1), network(2).cuda()
        initialize(model, source.state_dict())
        equal({k: v.cpu() for k, v in model.state_dict().items()}, source.state_dict())


def test_one_number_of_a_normalization_stands_for_all_channels():
    given = build_model("wide_resnet10_1", num_classes=4, in_channels=3, mean=0.5, std=0.25)
    model = build_model(
        "wide_resnet10_1", num_classes=4, in_channels=3, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)
    )
    initialize(model, given.state_dict())
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.normalize(x), (x - 0.5) / 0.25)
    with pytest.raises(ValueError, match=r"normalize\.mean"):
        initialize(given, model.state_dict())
