"""The networks: their size, their layout and what an AWP run asks of them."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from awp_optim.lab.data import CIFAR10_MEAN, CIFAR10_STD
from awp_optim.lab.models import ACTIVATIONS as BY_NAME
from awp_optim.lab.models import (
    MODELS,
    VGG,
    Normalize,
    PreActBottleneck,
    PreActResNet,
    WideResNet,
    build_model,
    preact_resnet18,
    preact_resnet34,
    preact_resnet50,
    preact_resnet_small,
    vgg19,
    wide_resnet28_10,
    wide_resnet34_10,
    wide_resnet34_20,
    wide_resnet70_16,
)

TINY = {
    "preact": lambda **kw: PreActResNet((1, 2), 4, **kw),
    "bottleneck": lambda **kw: PreActResNet((1, 2), 4, block=PreActBottleneck, **kw),
    "wide": lambda **kw: WideResNet(10, 1, **kw),
    "vgg": lambda **kw: VGG((1, 2), 4, **kw),
}
# Each written out a second time, for the reference networks.
ACTIVATIONS = {
    "relu": (F.relu, lambda x: x.clamp(min=0)),
    "silu": (nn.SiLU(), lambda x: x * torch.sigmoid(x)),
}


def unsettled(model):
    """The model in eval mode, with no BatchNorm at its neutral value."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def batch_norm(x, s, name):
    """Of a state dict, in eval mode."""
    mean, var, scale, shift = (
        s[f"{name}.{key}"].view(1, -1, 1, 1)
        for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def count(model):
    return sum(p.numel() for p in model.parameters())


def expected_count(widths, blocks, in_channels, num_classes):
    """Counted from the layout in the papers, not from the code."""
    total = 9 * in_channels * widths[0]  # the stem, without bias
    before = widths[0]
    for i, (width, n) in enumerate(zip(widths, blocks, strict=True)):
        for j in range(n):
            total += 2 * before + 9 * before * width  # BN (scale, shift), 3x3
            total += 2 * width + 9 * width * width
            if j == 0 and i > 0:
                total += before * width  # 1x1 projection, no BN of its own
            before = width
    return total + 2 * before + before * num_classes + num_classes  # last BN, linear


class TestPreActResNet:
    def test_published_parameter_count(self):
        assert count(preact_resnet18()) == 11_172_170
        assert expected_count((64, 128, 256, 512), (2, 2, 2, 2), 3, 10) == 11_172_170

    @pytest.mark.parametrize(
        ("widths", "blocks", "in_channels", "num_classes"),
        [((8, 16), (1, 3), 3, 100), ((16, 32, 64), (1, 1, 1), 1, 10), ((4,), (2,), 2, 2)],
    )
    def test_parameter_count_in_general(self, widths, blocks, in_channels, num_classes):
        model = PreActResNet(blocks, widths[0], num_classes=num_classes, in_channels=in_channels)
        assert count(model) == expected_count(widths, blocks, in_channels, num_classes)

    def test_forward_equals_the_layout_written_out(self):
        """The network again, as functions of its state dict under the usual names."""
        torch.manual_seed(0)
        model = PreActResNet((2, 1), 4, num_classes=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # nothing at its neutral value
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        model.eval()
        s = model.state_dict()

        def bn_relu(x, name):
            stats = (s[f"{name}.running_mean"], s[f"{name}.running_var"])
            return F.batch_norm(x, *stats, s[f"{name}.weight"], s[f"{name}.bias"]).clamp(min=0)

        def block(x, name, stride):
            a = bn_relu(x, f"{name}.bn1")
            out = F.conv2d(a, s[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(bn_relu(out, f"{name}.bn2"), s[f"{name}.conv2.weight"], padding=1)
            projection = s.get(f"{name}.shortcut.0.weight")
            return out + (x if projection is None else F.conv2d(a, projection, stride=stride))

        images = torch.rand(3, 3, 8, 8)
        mean = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
        std = torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
        x = F.conv2d((images - mean) / std, s["conv1.weight"], padding=1)
        x = block(block(x, "layer1.0", 1), "layer1.1", 1)
        x = bn_relu(block(x, "layer2.0", 2), "bn")
        x = F.avg_pool2d(x, 4).flatten(1) @ s["linear.weight"].T + s["linear.bias"]
        torch.testing.assert_close(model(images), x)

    def test_names_and_strides_of_resnet18(self):
        model = preact_resnet18()
        names = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
        expected = {"conv1", "bn", "linear"}
        for stage in range(1, 5):
            for i in range(2):
                parts = ["bn1", "conv1", "bn2", "conv2"]
                parts += ["shortcut.0"] if stage > 1 and i == 0 else []
                expected |= {f"layer{stage}.{i}.{part}" for part in parts}
        assert names == expected
        sizes = []
        for stage in ("conv1", "layer1", "layer2", "layer3", "layer4"):
            module = model.get_submodule(stage)
            module.register_forward_hook(lambda *call: sizes.append(tuple(call[2].shape[1:])))
        with torch.no_grad():
            model.eval()(torch.rand(1, 3, 32, 32))
        assert sizes == [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]

    def test_channels_last_and_bfloat16(self):
        torch.manual_seed(0)
        model, x = PreActResNet((1, 1), 8).eval(), torch.rand(2, 3, 16, 16)
        expected = model(x)
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        layouts = []
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, Normalize)):
                module.register_forward_hook(
                    lambda *call: layouts.append(
                        call[2].is_contiguous(memory_format=torch.channels_last)
                    )
                )
        torch.testing.assert_close(model(x), expected)
        assert layouts
        assert all(layouts)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x).float(), expected, atol=0.05, rtol=0.05)

    def test_the_forward_is_one_graph(self):
        model, x = preact_resnet_small(), torch.rand(4, 1, 8, 8)
        graph = torch.export.export(model.eval(), (x,))  # refuses data-dependent Python
        torch.testing.assert_close(graph.module()(x), model(x))

    def test_built_on_the_meta_device(self):
        with torch.device("meta"):
            model = preact_resnet18()
        assert all(t.is_meta for t in model.state_dict().values())

    def test_any_size_of_image(self):
        model = preact_resnet_small(num_classes=7)
        for size in ((8, 8), (9, 13), (32, 32)):
            assert model(torch.rand(2, 1, *size)).shape == (2, 7)

    def test_gradients_reach_every_parameter_and_the_input(self):
        model, x = preact_resnet_small(), torch.rand(4, 1, 8, 8, requires_grad=True)
        F.cross_entropy(model(x), torch.arange(4)).backward()
        for tensor in (x, *model.parameters()):
            assert tensor.grad is not None
            assert tensor.grad.abs().sum() > 0

    @pytest.mark.parametrize(
        "bad",
        [{"blocks": ()}, {"blocks": (1, 0)}, {"width": 0}, {"num_classes": 0}, {"in_channels": 0}],
    )
    def test_bad_sizes(self, bad):
        with pytest.raises(ValueError, match="must be at least 1"):
            PreActResNet(**bad)

    def test_statistics_of_other_channels(self):
        with pytest.raises(ValueError, match="mean and std have 3 channels, the images 1"):
            preact_resnet18(in_channels=1)


def bottleneck_count(width, blocks, in_channels, num_classes):
    """Counted from Figure 5 of "Deep Residual Learning", with BN before each convolution."""
    total, before = 9 * in_channels * width, width
    for i, n in enumerate(blocks):
        planes = width * 2**i
        total += before * 4 * planes  # the projection, one in each stage's first block
        for _ in range(n):
            total += 2 * before + before * planes  # BN, 1x1
            total += 2 * planes + 9 * planes * planes  # BN, 3x3
            total += 2 * planes + planes * 4 * planes  # BN, 1x1
            before = 4 * planes
    return total + 2 * before + before * num_classes + num_classes


class TestDeeperPreActResNets:
    def test_parameter_counts(self):
        with torch.device("meta"):
            deep, deeper = preact_resnet34(), preact_resnet50()
        assert count(deep) == 21_280_330
        assert expected_count((64, 128, 256, 512), (3, 4, 6, 3), 3, 10) == 21_280_330
        assert count(deeper) == 23_513_162 == bottleneck_count(64, (3, 4, 6, 3), 3, 10)

    def test_resnet50_beside_torchvisions(self):
        """The same convolutions; the stem and where the BNs stand differ."""
        models = pytest.importorskip("torchvision.models")
        with torch.device("meta"):
            ours, theirs = preact_resnet50(), models.resnet50(num_classes=10)

        def convs(model):
            shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d)]
            return sorted(tuple(shape) for shape in shapes[1:])

        assert convs(ours) == convs(theirs)
        assert len(convs(ours)) == 49 - 1 + 4  # 50 layers: the linear one, the stem; projections

    def test_depth_is_the_number_of_layers(self):
        for build, depth in ((preact_resnet18, 18), (preact_resnet34, 34), (preact_resnet50, 50)):
            with torch.device("meta"):
                names = [n for n, p in build().named_parameters() if p.ndim > 1]
            assert len([n for n in names if "shortcut" not in n]) == depth

    @pytest.mark.parametrize("act", ACTIVATIONS)
    def test_bottleneck_equals_the_layout_written_out(self, act):
        torch.manual_seed(0)
        activation, written_out = ACTIVATIONS[act]
        model = PreActResNet(
            (2, 1),
            3,
            block=PreActBottleneck,
            num_classes=5,
            mean=0.4,
            std=0.3,
            activation=activation,
        )
        s = unsettled(model.double()).state_dict()

        def pre(x, name):
            return written_out(batch_norm(x, s, name))

        def block(x, name, stride):
            a = pre(x, f"{name}.bn1")
            out = F.conv2d(a, s[f"{name}.conv1.weight"])
            out = pre(out, f"{name}.bn2")
            out = F.conv2d(out, s[f"{name}.conv2.weight"], stride=stride, padding=1)
            out = F.conv2d(pre(out, f"{name}.bn3"), s[f"{name}.conv3.weight"])
            projection = s.get(f"{name}.shortcut.0.weight")
            return out + (x if projection is None else F.conv2d(a, projection, stride=stride))

        images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
        x = (images - s["normalize.mean"]) / s["normalize.std"]
        x = F.conv2d(x, s["conv1.weight"], padding=1)
        # The first block keeps the size and still projects: 3 to 12 channels.
        assert s["layer1.0.shortcut.0.weight"].shape == (12, 3, 1, 1)
        x = block(block(x, "layer1.0", 1), "layer1.1", 1)
        x = pre(block(x, "layer2.0", 2), "bn")
        assert x.shape == (3, 24, 4, 4)
        x = x.mean((2, 3)) @ s["linear.weight"].T + s["linear.bias"]
        torch.testing.assert_close(model(images), x)

    def test_sizes_on_the_way_of_resnet50(self):
        with torch.device("meta"):
            model, x = preact_resnet50(), torch.rand(1, 3, 32, 32)
            sizes = []
            for stage in ("conv1", "layer1", "layer2", "layer3", "layer4"):
                module = model.get_submodule(stage)
                module.register_forward_hook(lambda *call: sizes.append(tuple(call[2].shape[1:])))
            model.eval()(x)
        assert sizes == [(64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4)]


def wide_count(depth, k, num_classes):
    """Counted from Table 1 of the wide ResNet paper, for RGB images, without dropout."""
    total, before = 9 * 3 * 16, 16
    for width in (16 * k, 32 * k, 64 * k):
        for j in range((depth - 4) // 6):
            total += 2 * before + 9 * before * width + 2 * width + 9 * width * width
            total += before * width if j == 0 and before != width else 0
            before = width
    return total + 2 * before + before * num_classes + num_classes


class TestWideResNet:
    @pytest.mark.parametrize(
        ("build", "depth", "published"),
        [(wide_resnet28_10, 28, 36_479_194), (wide_resnet34_10, 34, 46_160_474)],
    )
    def test_published_parameter_counts(self, build, depth, published):
        with torch.device("meta"):
            model = build()
        assert count(model) == published == wide_count(depth, 10, 10)

    @pytest.mark.parametrize(
        ("build", "depth", "width", "expected"),
        [(wide_resnet34_20, 34, 20, 184_531_674), (wide_resnet70_16, 70, 16, 266_796_506)],
    )
    def test_parameter_counts_of_the_largest(self, build, depth, width, expected):
        with torch.device("meta"):
            model = build()
        assert count(model) == expected == wide_count(depth, width, 10)

    @pytest.mark.parametrize(("depth", "width", "classes"), [(10, 1, 4), (16, 2, 7)])
    def test_parameter_count_in_general(self, depth, width, classes):
        assert count(WideResNet(depth, width, num_classes=classes)) == wide_count(
            depth, width, classes
        )

    @pytest.mark.parametrize("width", [1, 2])  # with 1, the first block's shortcut is the identity
    def test_forward_equals_the_layout_written_out(self, width):
        """The network again, in float64, as functions of its state dict under the usual names."""
        torch.manual_seed(0)
        model = WideResNet(16, width, num_classes=5, mean=0.4, std=0.3).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # nothing at its neutral value
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
        s = model.state_dict()

        def bn_relu(x, name):  # with the batch's statistics, as in training
            mean = x.mean((0, 2, 3), keepdim=True)
            var = x.var((0, 2, 3), correction=0, keepdim=True)
            scale, shift = (s[f"{name}.{p}"].view(1, -1, 1, 1) for p in ("weight", "bias"))
            return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)

        def block(x, name, stride):
            a = bn_relu(x, f"{name}.bn1")
            out = F.conv2d(a, s[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(bn_relu(out, f"{name}.bn2"), s[f"{name}.conv2.weight"], padding=1)
            projection = s.get(f"{name}.convShortcut.weight")
            return out + (x if projection is None else F.conv2d(a, projection, stride=stride))

        images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
        x = (images - s["normalize.mean"]) / s["normalize.std"]
        x = F.conv2d(x, s["conv1.weight"], padding=1)
        for stage, stride in ((1, 1), (2, 2), (3, 2)):
            x = block(block(x, f"block{stage}.layer.0", stride), f"block{stage}.layer.1", 1)
        x = bn_relu(x, "bn1").mean((2, 3)) @ s["fc.weight"].T + s["fc.bias"]
        torch.testing.assert_close(model(images), x)
        names = {name.split(".")[0] for name in s}
        assert names == {"normalize", "conv1", "block1", "block2", "block3", "bn1", "fc"}

    def test_sizes_on_the_way(self):
        model, sizes = WideResNet(10, 2, num_classes=6).eval(), []
        for stage in ("conv1", "block1", "block2", "block3"):
            module = model.get_submodule(stage)
            module.register_forward_hook(lambda *call: sizes.append(tuple(call[2].shape[1:])))
        with torch.no_grad():
            assert model(torch.rand(2, 3, 32, 32)).shape == (2, 6)
            assert model(torch.rand(2, 3, 9, 13)).shape == (2, 6)
        assert sizes[:4] == [(16, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)]

    def test_initialisation(self):
        torch.manual_seed(0)
        model = WideResNet(10, 8)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert not model.fc.bias.any()

    @pytest.mark.parametrize(
        ("bad", "match"),
        [
            ({"depth": 30}, "6n \\+ 4"),
            ({"depth": 4}, "6n \\+ 4"),
            ({"width": 0}, "at least 1"),
            ({"num_classes": 0}, "at least 1"),
            ({"mean": (0.1, 0.2), "std": (0.3, 0.4)}, "2 channels, the images 3"),
        ],
    )
    def test_bad_sizes(self, bad, match):
        with pytest.raises(ValueError, match=match):
            WideResNet(**{"depth": 10, "width": 1, **bad})


class TestVGG:
    def test_published_parameter_count(self):
        with torch.device("meta"):
            model = vgg19()
        total, before = 0, 3
        for width in [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8:  # configuration E of the paper
            total += 9 * before * width + width + 2 * width  # weights, biases, BN
            before = width
        assert count(model) == total + 512 * 10 + 10 == 20_040_522

    def test_layers_of_vgg19(self):
        """16 convolutions and a linear layer; a pool after each stage, down to one pixel."""
        with torch.device("meta"):
            model, sizes = vgg19(), []
            for module in model.features:
                if isinstance(module, nn.MaxPool2d):
                    module.register_forward_hook(lambda *call: sizes.append(call[2].shape[1:]))
            assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        channels = (64, 128, 256, 512, 512)
        assert sizes == [(c, 16 // 2**i, 16 // 2**i) for i, c in enumerate(channels)]
        convs = [name for name, p in model.named_parameters() if p.ndim == 4]
        # Conv, BN, activation: three places each, and one for each pool.
        starts = [*range(0, 6, 3), *range(7, 13, 3), *range(14, 26, 3), *range(27, 39, 3)]
        starts += range(40, 52, 3)
        assert convs == [f"features.{i}.weight" for i in starts]
        assert model.features[52]._get_name() == "MaxPool2d"
        assert model.classifier.weight.shape == (10, 512)

    @pytest.mark.parametrize("act", ACTIVATIONS)
    def test_forward_equals_the_layout_written_out(self, act):
        torch.manual_seed(0)
        activation, written_out = ACTIVATIONS[act]
        model = VGG((1, 2), 3, num_classes=5, mean=0.4, std=0.3, activation=activation).double()
        s = unsettled(model).state_dict()
        x = images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
        x = (x - s["normalize.mean"]) / s["normalize.std"]
        for i in (0, None, 4, 7, None):
            if i is None:  # the largest of each 2x2
                x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
                continue
            x = F.conv2d(x, s[f"features.{i}.weight"], s[f"features.{i}.bias"], padding=1)
            x = written_out(batch_norm(x, s, f"features.{i + 1}"))
        assert x.shape == (3, 6, 2, 2)
        x = x.mean((2, 3)) @ s["classifier.weight"].T + s["classifier.bias"]
        torch.testing.assert_close(model(images), x)

    def test_any_size_of_image(self):
        model = VGG((1, 1, 1, 1, 1), 2, num_classes=7).eval()
        for size in ((1, 1), (8, 8), (9, 33), (64, 64)):
            assert model(torch.rand(2, 3, *size)).shape == (2, 7)

    @pytest.mark.parametrize(
        "bad",
        [{"convs": ()}, {"convs": (1, 0)}, {"width": 0}, {"num_classes": 0}, {"in_channels": 0}],
    )
    def test_bad_sizes(self, bad):
        with pytest.raises(ValueError, match="must be at least 1"):
            VGG(**bad)


class TestEveryKind:
    """What holds for each layout, on a tiny one."""

    @pytest.mark.parametrize("kind", TINY)
    def test_gradients_reach_every_parameter_and_the_input(self, kind):
        torch.manual_seed(0)
        # In eval mode: in train mode, BN takes a bias before it back out. SiLU is nowhere flat.
        model = unsettled(TINY[kind](activation=F.silu))
        x = torch.rand(4, 3, 8, 8, requires_grad=True)
        F.cross_entropy(model(x), torch.arange(4)).backward()
        for name, tensor in (("x", x), *model.named_parameters()):
            assert tensor.grad is not None, name
            assert tensor.grad.abs().amax() > 1e-7, name

    @pytest.mark.parametrize("kind", TINY)
    def test_channels_last(self, kind):
        torch.manual_seed(0)
        model, x = unsettled(TINY[kind]()), torch.rand(2, 3, 16, 16)
        expected = model(x)
        model = model.to(memory_format=torch.channels_last)
        kept = []
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d)):
                module.register_forward_hook(
                    lambda *call: kept.append(
                        call[2].is_contiguous(memory_format=torch.channels_last)
                    )
                )
        out = model(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        assert len(kept) > 4
        assert all(kept)

    @pytest.mark.parametrize("kind", sorted(set(TINY) - {"vgg"}))  # a max-pool is not affine
    def test_the_activation_replaces_every_relu(self, kind):
        """Without any, a network in eval mode is an affine function of the image."""
        torch.manual_seed(0)
        model = unsettled(TINY[kind](activation=lambda x: x).double())
        a, b = torch.rand(2, 2, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(model((a + b) / 2), (model(a) + model(b)) / 2)
        relu = unsettled(TINY[kind]().double())
        assert not torch.allclose(relu((a + b) / 2), (relu(a) + relu(b)) / 2)

    @pytest.mark.parametrize("kind", TINY)
    def test_the_activation_adds_nothing_to_the_checkpoint(self, kind):
        saved = TINY[kind]().state_dict()
        TINY[kind](activation=nn.SiLU()).load_state_dict(saved, strict=True)

    @pytest.mark.parametrize("kind", TINY)
    def test_the_forward_is_one_graph(self, kind):
        model, x = TINY[kind]().eval(), torch.rand(2, 3, 8, 8)
        graph = torch.export.export(model, (x,))  # refuses data-dependent Python
        torch.testing.assert_close(graph.module()(x), model(x))


class TestNormalize:
    def test_values(self):
        x = torch.rand(2, 3, 4, 4)
        out = Normalize(CIFAR10_MEAN, CIFAR10_STD)(x)
        for c in range(3):
            torch.testing.assert_close(out[:, c], (x[:, c] - CIFAR10_MEAN[c]) / CIFAR10_STD[c])
        torch.testing.assert_close(Normalize(0.5, 2)(x), (x - 0.5) / 2)
        assert torch.equal(Normalize(0, 1)(x), x)

    def test_it_is_not_trained(self):
        assert not list(Normalize(0.5, 0.5).parameters())

    def test_a_checkpoint_brings_its_statistics(self):
        saved = preact_resnet_small(mean=0.3, std=0.4).state_dict()
        model = preact_resnet_small()
        model.load_state_dict(saved)
        assert model.normalize.mean.item() == pytest.approx(0.3)
        assert model.normalize.std.item() == pytest.approx(0.4)

    def test_a_checkpoint_without_statistics_leaves_them(self):
        saved = preact_resnet_small().state_dict()
        del saved["normalize.mean"], saved["normalize.std"]
        keys = list(saved)
        model = preact_resnet_small(mean=0.3, std=0.4)
        model.load_state_dict(saved, strict=True)
        assert model.normalize.mean.item() == pytest.approx(0.3)
        assert list(saved) == keys  # the caller's dict stays as it was
        # Also as the outermost module, whose part of the dict is the whole.
        empty = {}
        Normalize(0.3, 0.4).load_state_dict(empty)
        assert empty == {}

    def test_other_missing_keys_are_still_reported(self):
        saved = preact_resnet_small().state_dict()
        del saved["bn.weight"]
        with pytest.raises(RuntimeError, match=r"Missing key.*bn\.weight"):
            preact_resnet_small().load_state_dict(saved)

    @pytest.mark.parametrize("std", [0.0, (0.2, -1.0, 0.2), float("nan")])
    def test_bad_std(self, std):
        with pytest.raises(ValueError, match="std must be above zero"):
            Normalize((0.0,) * 3 if isinstance(std, tuple) else 0.0, std)

    def test_lengths(self):
        with pytest.raises(ValueError, match="one length"):
            Normalize((0.1, 0.2, 0.3), 1.0)


LARGE = {"wide_resnet34_20", "wide_resnet70_16"}  # hundreds of millions: shapes alone


class TestRegistry:
    @pytest.mark.parametrize("name", sorted(MODELS))
    def test_every_model(self, name):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            with torch.device("meta" if name in LARGE else "cpu"):
                model = build_model(
                    name, num_classes=4, in_channels=2, mean=(0.1, 0.2), std=(0.3, 0.4)
                )
                assert model.eval()(torch.rand(2, 2, 8, 8)).shape == (2, 4)

    @pytest.mark.parametrize("name", sorted(MODELS))
    def test_default_statistics(self, name):
        with torch.device("meta"):
            defaults = inspect.signature(MODELS[name]).parameters
            channels = 1 if name == "preact_resnet_small" else 3
            assert defaults["num_classes"].default == 10
            assert defaults["in_channels"].default == channels
            assert len(MODELS[name]().normalize.mean) == channels
        if name not in LARGE and channels == 3:
            assert MODELS[name]().normalize.mean.flatten().tolist() == pytest.approx(CIFAR10_MEAN)
            assert MODELS[name]().normalize.std.flatten().tolist() == pytest.approx(CIFAR10_STD)

    @pytest.mark.parametrize("name", sorted(MODELS))
    def test_settings_are_passed_on(self, name):
        with torch.device("meta"):
            model = build_model(name, num_classes=10, in_channels=3, activation=torch.tanh)
        used = [m.activation for m in model.modules() if hasattr(m, "activation")]
        assert used
        assert all(activation is torch.tanh for activation in used)
        with pytest.raises(TypeError, match="dropout"):
            build_model(name, num_classes=10, in_channels=3, dropout=0.5)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"no model 'vgg'; .*preact_resnet18, preact_res"):
            build_model("vgg", num_classes=10, in_channels=3)
        with pytest.raises(ValueError, match="torchvision/NAME"):
            build_model("resnet18", num_classes=10, in_channels=3)

    def test_wide_resnets_by_depth_and_width(self):
        with torch.device("meta"):
            wide = build_model("wide_resnet16_4", num_classes=7, in_channels=3)
        assert isinstance(wide, WideResNet)
        assert count(wide) == wide_count(16, 4, 7)

    @pytest.mark.parametrize("name", ["wide_resnet34_10", "wide_resnet28_10"])
    def test_a_published_wide_resnet_is_the_one_of_its_sizes(self, name):
        with torch.device("meta"):
            published = build_model(name, num_classes=10, in_channels=3)
            sizes = [int(size) for size in name.removeprefix("wide_resnet").split("_")]
            by_sizes = WideResNet(*sizes)
        assert {k: v.shape for k, v in published.state_dict().items()} == {
            k: v.shape for k, v in by_sizes.state_dict().items()
        }

    @pytest.mark.parametrize(
        "name",
        [
            "wide_resnet",
            "wide_resnet34",
            "wide_resnet34_",
            "wide_resnet_10",
            "wide_resnet34_10_2",
            "wide_resnet-34_10",
            "wide_resnet34_1.5",
            "wide_resnet34-10",
            "Wide_ResNet34_10",
            "xwide_resnet34_10",
            "wide_resnet34_10\n",
            "",
        ],
    )
    def test_bad_names(self, name):
        with pytest.raises(ValueError, match=r"no model .*; there are: .*wide_resnetDEPTH_WIDTH"):
            build_model(name, num_classes=10, in_channels=3)

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("wide_resnet17_4", r"depth must be 6n \+ 4 .* got 17"),
            ("wide_resnet4_4", r"depth must be 6n \+ 4 .* got 4"),
            ("wide_resnet16_0", "must be at least 1: 0, 10, 3"),
        ],
    )
    def test_bad_depths_and_widths(self, name, match):
        with pytest.raises(ValueError, match=match):
            build_model(name, num_classes=10, in_channels=3)


# Each as its paper or torch's documentation defines it.
FORMULAS = {
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "celu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "silu": lambda x: x / (1 + (-x).exp()),
    "mish": lambda x: x * torch.tanh((1 + x.exp()).log()),
    "softplus": lambda x: (1 + x.exp()).log(),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
}


class TestActivationsByName:
    def test_all_have_a_formula_here(self):
        assert BY_NAME.keys() == FORMULAS.keys()

    @pytest.mark.parametrize("name", FORMULAS)
    @pytest.mark.parametrize("arch", ["preact_resnet_small", "wide_resnet10_1", "vgg"])
    def test_the_network_computes_with_it(self, arch, name, monkeypatch):
        monkeypatch.setitem(MODELS, "vgg", TINY["vgg"])
        torch.manual_seed(0)
        model = build_model(arch, num_classes=5, in_channels=3, mean=0.0, std=1.0, activation=name)
        model = unsettled(model.double())
        x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
        logits = {}
        for other, formula in FORMULAS.items():
            twin = build_model(
                arch, num_classes=5, in_channels=3, mean=0.0, std=1.0, activation=formula
            ).double()
            twin.load_state_dict(model.state_dict())
            logits[other] = twin.eval()(x)
        torch.testing.assert_close(model(x), logits[name])
        for other, theirs in logits.items():
            if {name, other} not in ({name}, {"elu", "celu"}):
                assert not torch.allclose(model(x), theirs, rtol=1e-3, atol=1e-4), other

    def test_relu_is_the_default(self):
        torch.manual_seed(0)
        model = unsettled(build_model("preact_resnet_small", num_classes=5, in_channels=1))
        named = build_model("preact_resnet_small", num_classes=5, in_channels=1, activation="relu")
        named.load_state_dict(model.state_dict())
        x = torch.rand(4, 1, 8, 8)
        assert torch.equal(model(x), named.eval()(x))

    @pytest.mark.parametrize("name", ["sine", "ReLU", "", "relu "])
    @pytest.mark.parametrize("arch", ["preact_resnet_small", "wide_resnet10_1", "nonsense"])
    def test_an_unknown_name_is_an_error(self, arch, name):
        with pytest.raises(ValueError, match=f"no activation '{name}'; there are: relu, leaky_re"):
            build_model(arch, num_classes=5, in_channels=1, activation=name)

    @pytest.mark.parametrize("activation", ["silu", "sine", F.silu])
    def test_torchvisions_networks_have_their_own(self, activation):
        with pytest.raises(ValueError, match=r"torchvision/resnet18 has its own activation"):
            build_model("torchvision/resnet18", num_classes=5, in_channels=3, activation=activation)

    @pytest.mark.parametrize("activation", ["relu", F.relu])
    def test_torchvisions_networks_take_the_default_by_name_or_not(self, activation):
        pytest.importorskip("torchvision")
        with torch.device("meta"):
            model = build_model(
                "torchvision/resnet18", num_classes=5, in_channels=3, activation=activation
            )
        assert model(torch.rand(2, 3, 64, 64, device="meta")).shape == (2, 5)


class TestTorchvision:
    def build(self, name, **kw):
        pytest.importorskip("torchvision")
        return build_model(f"torchvision/{name}", **{"num_classes": 10, "in_channels": 3, **kw})

    def test_published_parameter_count(self):
        with torch.device("meta"):
            assert count(self.build("resnet18", num_classes=1000)) == 11_689_512

    def test_it_is_torchvisions_after_the_normalisation(self):
        torch.manual_seed(0)
        model = self.build("resnet18", mean=CIFAR10_MEAN, std=CIFAR10_STD).eval()
        theirs = pytest.importorskip("torchvision.models").resnet18(num_classes=10)
        saved = model.state_dict()
        theirs.load_state_dict(
            {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}
        )
        x = torch.rand(2, 3, 64, 64)
        mean, std = (torch.tensor(t).view(1, 3, 1, 1) for t in (CIFAR10_MEAN, CIFAR10_STD))
        torch.testing.assert_close(model(x), theirs.eval()((x - mean) / std))
        assert {k.partition(".")[0] for k in saved} == {"normalize", "model"}

    @pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
    def test_logits_alone_in_train_mode(self, name):
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("error")
            out = self.build(name, init_weights=False).train()(torch.rand(2, 3, 299, 299))
        assert out.shape == (2, 10)

    def test_settings_are_passed_on(self):
        with torch.device("meta"):
            model = self.build("mobilenet_v3_small", dropout=0.4)
        assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.4]

    def test_unknown_name(self):
        for name in ("resnet_18", "fasterrcnn_resnet50_fpn", "list_models", ""):
            with pytest.raises(ValueError, match=f"no classifier '{name}'; it has: .*resnet18, "):
                self.build(name)

    def test_rgb_only(self):
        with pytest.raises(ValueError, match="RGB images, not 1 channels"):
            self.build("resnet18", in_channels=1)
        with pytest.raises(ValueError, match="2 channels, the images 3"):
            self.build("resnet18", mean=(0.1, 0.2), std=(0.3, 0.4))

    def test_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision", None)
        with pytest.raises(ImportError, match="torchvision/resnet18 needs torchvision: pip"):
            build_model("torchvision/resnet18", num_classes=10, in_channels=3)

    def test_imported_only_then(self):
        code = (
            "import sys, awp_optim.lab.models as m;"
            "m.build_model('preact_resnet_small', num_classes=10, in_channels=1);"
            "assert 'torchvision' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
