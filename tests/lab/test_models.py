"""The networks: their size, their layout and what an AWP run asks of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from awp_optim.lab.data import CIFAR10_MEAN, CIFAR10_STD
from awp_optim.lab.models import (
    MODELS,
    Normalize,
    PreActResNet,
    WideResNet,
    build_model,
    preact_resnet18,
    preact_resnet_small,
    wide_resnet28_10,
    wide_resnet34_10,
)


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


class TestRegistry:
    @pytest.mark.parametrize("name", sorted(MODELS))
    def test_every_model(self, name):
        model = build_model(name, num_classes=4, in_channels=2, mean=(0.1, 0.2), std=(0.3, 0.4))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert model.eval()(torch.rand(2, 2, 8, 8)).shape == (2, 4)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"no model 'vgg'; .*preact_resnet18, preact_res"):
            build_model("vgg", num_classes=10, in_channels=3)
