"""The networks: their size, their layout and what an AWP run needs of them."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from awp_optim.lab.data.cifar10 import CIFAR10_MEAN, CIFAR10_STD
from awp_optim.lab.loading import from_checkpoint
from awp_optim.lab.models import (
    ACTIVATIONS,
    MODELS,
    VGG,
    DeepMindWideResNet,
    Normalize,
    PreActBottleneck,
    PreActResNet,
    WideResNet,
    build_model,
)

TINY = {
    "preact": lambda **kw: PreActResNet((1, 2), 4, **kw),
    "bottleneck": lambda **kw: PreActResNet((1, 2), 4, block=PreActBottleneck, **kw),
    "wide": lambda **kw: WideResNet(10, 1, **kw),
    "deepmind": lambda **kw: DeepMindWideResNet(10, 1, **{"mean": 0.4, "std": 0.3, **kw}),
    "vgg": lambda **kw: VGG((1, 2), 4, **kw),
}
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
two_activations = pytest.mark.parametrize("act", ["relu", "silu"])


def unsettled(model):
    """The model in float64 and eval mode, with no BatchNorm at its neutral value."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.double().eval()


def images(*shape):
    return torch.rand(*shape, dtype=torch.float64)


def batch_norm(x, s, name):
    """From a state dict, in eval mode."""
    mean, var, scale, shift = (
        s[f"{name}.{key}"].view(1, -1, 1, 1)
        for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def basic_block(x, s, name, stride, activation, projection):
    """Figure 4(e) of "Identity Mappings", as a function of the state dict."""
    a = activation(batch_norm(x, s, f"{name}.bn1"))
    out = F.conv2d(a, s[f"{name}.conv1.weight"], stride=stride, padding=1)
    out = activation(batch_norm(out, s, f"{name}.bn2"))
    out = F.conv2d(out, s[f"{name}.conv2.weight"], padding=1)
    weight = s.get(f"{name}.{projection}.weight")
    return out + (x if weight is None else F.conv2d(a, weight, stride=stride))


def stem(x, s):
    x = (x - s["normalize.mean"]) / s["normalize.std"]
    return F.conv2d(x, s["conv1.weight"], padding=1)


def sizes_on_the_way(model, stages):
    sizes = []
    for stage in stages:
        module = model.get_submodule(stage)
        module.register_forward_hook(lambda *call: sizes.append(tuple(call[2].shape[1:])))
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, 32, 32, device=next(model.parameters()).device))
    return sizes


def count(model):
    return sum(p.numel() for p in model.parameters())


# --- Sizes, counted from the papers and not from the code ---------------------------------------


def basic_count(widths, blocks, in_channels=3, num_classes=10, stem_width=None):
    """A network of basic blocks, which project where the number of channels changes."""
    before = stem_width or widths[0]
    total = 9 * in_channels * before  # the stem, without bias
    for width, n in zip(widths, blocks, strict=True):
        for _ in range(n):
            total += 2 * before + 9 * before * width  # BN (scale, shift), 3x3
            total += 2 * width + 9 * width * width
            total += before * width if before != width else 0  # 1x1 projection without BN
            before = width
    return total + 2 * before + before * num_classes + num_classes  # last BN, linear


def bottleneck_count(width, blocks):
    """Figure 5 of "Deep Residual Learning", with BN before each convolution."""
    total, before = 9 * 3 * width, width
    for i, n in enumerate(blocks):
        planes = width * 2**i
        total += before * 4 * planes  # the projection, one in the first block of each stage
        for _ in range(n):
            total += 2 * before + before * planes  # BN, 1x1
            total += 2 * planes + 9 * planes * planes  # BN, 3x3
            total += 2 * planes + planes * 4 * planes  # BN, 1x1
            before = 4 * planes
    return total + 2 * before + before * 10 + 10


def wide_count(depth, k, num_classes=10):
    """Table 1 of "Wide Residual Networks", without dropout."""
    blocks = [(depth - 4) // 6] * 3
    return basic_count([16 * k, 32 * k, 64 * k], blocks, 3, num_classes, stem_width=16)


def vgg19_count():
    """Configuration E of the paper, with BN and one linear layer."""
    total, before = 0, 3
    for width in [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8:
        total += 9 * before * width + width + 2 * width  # weights, biases, BN
        before = width
    return total + 512 * 10 + 10


@pytest.mark.parametrize(
    ("name", "published", "counted"),
    [
        ("preact_resnet18", 11_172_170, basic_count((64, 128, 256, 512), (2, 2, 2, 2))),
        ("preact_resnet34", 21_280_330, basic_count((64, 128, 256, 512), (3, 4, 6, 3))),
        ("preact_resnet50", 23_513_162, bottleneck_count(64, (3, 4, 6, 3))),
        ("vgg19", 20_040_522, vgg19_count()),
        ("wide_resnet28_10", 36_479_194, wide_count(28, 10)),
        ("wide_resnet34_10", 46_160_474, wide_count(34, 10)),
        ("wide_resnet34_20", 184_531_674, wide_count(34, 20)),
        ("wide_resnet70_16", 266_796_506, wide_count(70, 16)),
        ("dm_wide_resnet28_10", 36_479_194, wide_count(28, 10)),
        ("dm_wide_resnet70_16", 266_796_506, wide_count(70, 16)),
    ],
)
def test_parameter_counts(name, published, counted):
    with torch.device("meta"):
        assert count(build_model(name, num_classes=10, in_channels=3)) == published == counted


def test_parameter_counts_in_general():
    assert count(PreActResNet((1, 3), 8, num_classes=100)) == basic_count((8, 16), (1, 3), 3, 100)
    assert count(PreActResNet((2,), 4, num_classes=2, in_channels=2)) == basic_count(
        (4,), (2,), 2, 2
    )
    assert count(WideResNet(10, 1, num_classes=4)) == wide_count(10, 1, 4)
    assert count(WideResNet(16, 2, num_classes=7)) == wide_count(16, 2, 7)


# --- Layouts ------------------------------------------------------------------------------------


class TestPreActResNet:
    @two_activations
    def test_forward_equals_the_layout_written_out(self, act):
        """The network again, as functions of its state dict under the usual names."""
        torch.manual_seed(0)
        model = PreActResNet(
            (2, 1), 4, num_classes=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4),
            activation=ACTIVATIONS[act],
        )  # fmt: skip
        s = unsettled(model).state_dict()
        x = batch = images(3, 3, 8, 8)
        x = stem(x, s)
        for name, stride in (("layer1.0", 1), ("layer1.1", 1), ("layer2.0", 2)):
            x = basic_block(x, s, name, stride, FORMULAS[act], "shortcut.0")
        x = FORMULAS[act](batch_norm(x, s, "bn"))
        x = F.avg_pool2d(x, 4).flatten(1) @ s["linear.weight"].T + s["linear.bias"]
        torch.testing.assert_close(model(batch), x)

    @two_activations
    def test_bottleneck_equals_the_layout_written_out(self, act):
        torch.manual_seed(0)
        model = PreActResNet(
            (2, 1), 3, block=PreActBottleneck, num_classes=5, mean=0.4, std=0.3,
            activation=ACTIVATIONS[act],
        )  # fmt: skip
        s = unsettled(model).state_dict()

        def pre(x, name):
            return FORMULAS[act](batch_norm(x, s, name))

        def block(x, name, stride):
            a = pre(x, f"{name}.bn1")
            out = F.conv2d(a, s[f"{name}.conv1.weight"])
            out = pre(out, f"{name}.bn2")
            out = F.conv2d(out, s[f"{name}.conv2.weight"], stride=stride, padding=1)
            out = F.conv2d(pre(out, f"{name}.bn3"), s[f"{name}.conv3.weight"])
            projection = s.get(f"{name}.shortcut.0.weight")
            return out + (x if projection is None else F.conv2d(a, projection, stride=stride))

        x = batch = images(3, 3, 8, 8)
        # The first block keeps the size and still projects: 3 to 12 channels.
        assert s["layer1.0.shortcut.0.weight"].shape == (12, 3, 1, 1)
        x = block(block(stem(x, s), "layer1.0", 1), "layer1.1", 1)
        x = pre(block(x, "layer2.0", 2), "bn")
        assert x.shape == (3, 24, 4, 4)
        x = x.mean((2, 3)) @ s["linear.weight"].T + s["linear.bias"]
        torch.testing.assert_close(model(batch), x)

    def test_names_and_sizes_of_resnet18(self):
        model = MODELS["preact_resnet18"]()
        names = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
        expected = {"conv1", "bn", "linear"}
        for stage in range(1, 5):
            for i in range(2):
                parts = ["bn1", "conv1", "bn2", "conv2"]
                parts += ["shortcut.0"] if stage > 1 and i == 0 else []
                expected |= {f"layer{stage}.{i}.{part}" for part in parts}
        assert names == expected
        sizes = sizes_on_the_way(model, ["conv1", "layer1", "layer2", "layer3", "layer4"])
        assert sizes == [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]

    def test_resnet50_beside_torchvisions(self):
        """The same convolutions; the stem and the places of the BNs differ."""
        models = pytest.importorskip("torchvision.models")
        with torch.device("meta"):
            ours, theirs = MODELS["preact_resnet50"](), models.resnet50(num_classes=10)

        def convs(model):
            shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d)]
            return sorted(tuple(shape) for shape in shapes[1:])

        assert convs(ours) == convs(theirs)
        sizes = sizes_on_the_way(ours, ["layer1", "layer2", "layer3", "layer4"])
        assert sizes == [(256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4)]


class TestWideResNet:
    @pytest.mark.parametrize("width", [1, 2])  # with 1, the first block's shortcut is the identity
    @two_activations
    def test_forward_equals_the_layout_written_out(self, width, act):
        torch.manual_seed(0)
        model = WideResNet(16, width, num_classes=5, mean=0.4, std=0.3, activation=ACTIVATIONS[act])
        s = unsettled(model).state_dict()
        x = batch = images(3, 3, 8, 8)
        x = stem(x, s)
        for stage, stride in ((1, 1), (2, 2), (3, 2)):
            for i, own_stride in enumerate((stride, 1)):
                name = f"block{stage}.layer.{i}"
                x = basic_block(x, s, name, own_stride, FORMULAS[act], "convShortcut")
        x = FORMULAS[act](batch_norm(x, s, "bn1")).mean((2, 3)) @ s["fc.weight"].T + s["fc.bias"]
        torch.testing.assert_close(model(batch), x)
        names = {name.split(".")[0] for name in s}
        assert names == {"normalize", "conv1", "block1", "block2", "block3", "bn1", "fc"}
        sizes = sizes_on_the_way(model.float(), ["conv1", "block1", "block2", "block3"])
        k = 16 * width
        assert sizes == [(16, 32, 32), (k, 32, 32), (2 * k, 16, 16), (4 * k, 8, 8)]

    def test_initialization(self):
        torch.manual_seed(0)
        model = WideResNet(10, 8)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert not model.fc.bias.any()


class TestDeepMindWideResNet:
    """The functional network and its names are those of Gowal et al.'s published code."""

    @staticmethod
    def weights(depth, width, num_classes=10):
        """A checkpoint in their naming, of random numbers."""
        torch.manual_seed(0)
        s = {"init_conv.weight": torch.randn(16, 3, 3, 3) / 5}

        def add_batch_norm(name, planes):
            s[f"{name}.weight"], s[f"{name}.running_var"] = torch.rand(2, planes) + 0.5
            s[f"{name}.bias"], s[f"{name}.running_mean"] = torch.rand(2, planes) - 0.5
            s[f"{name}.num_batches_tracked"] = torch.tensor(7)

        before = 16
        for stage, planes in enumerate((16 * width, 32 * width, 64 * width)):
            for i in range((depth - 4) // 6):
                name = f"layer.{stage}.block.{i}"
                add_batch_norm(f"{name}.batchnorm_0", before)
                s[f"{name}.conv_0.weight"] = torch.randn(planes, before, 3, 3) / before**0.5 / 3
                add_batch_norm(f"{name}.batchnorm_1", planes)
                s[f"{name}.conv_1.weight"] = torch.randn(planes, planes, 3, 3) / planes**0.5 / 3
                if before != planes:
                    s[f"{name}.shortcut.weight"] = torch.randn(planes, before, 1, 1) / before**0.5
                before = planes
        add_batch_norm("batchnorm", before)
        s["logits.weight"] = torch.randn(num_classes, before)
        s["logits.bias"] = torch.randn(num_classes)
        return s

    @staticmethod
    def forward(x, s, depth, activation, mean, std):
        """Their forward pass, written out."""

        def normalized(x, name):
            names = ("running_mean", "running_var", "weight", "bias")
            return F.batch_norm(x, *(s[f"{name}.{key}"] for key in names), eps=1e-5)

        mean, std = (torch.tensor(t).view(3, 1, 1).to(x) for t in (mean, std))
        x = F.conv2d((x - mean) / std, s["init_conv.weight"], padding=1)
        for stage, first_stride in enumerate((1, 2, 2)):
            for i in range((depth - 4) // 6):
                name = f"layer.{stage}.block.{i}"
                out = activation(normalized(x, f"{name}.batchnorm_0"))
                stride = first_stride if i == 0 else 1
                if f"{name}.shortcut.weight" in s:
                    x = F.conv2d(out, s[f"{name}.shortcut.weight"], stride=stride)
                out = F.pad(out, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
                out = F.conv2d(out, s[f"{name}.conv_0.weight"], stride=stride)
                out = activation(normalized(out, f"{name}.batchnorm_1"))
                x = x + F.conv2d(out, s[f"{name}.conv_1.weight"], padding=1)
        x = F.avg_pool2d(activation(normalized(x, "batchnorm")), 8).flatten(1)
        return F.linear(x, s["logits.weight"], s["logits.bias"])

    @pytest.mark.parametrize("width", [1, 2])  # with 1, the first block's shortcut is the identity
    @two_activations
    def test_forward_equals_the_layout_written_out(self, width, act):
        s = {k: v.double() for k, v in self.weights(16, width).items()}
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
        model = DeepMindWideResNet(16, width, mean=mean, std=std, activation=ACTIVATIONS[act])
        model = model.double().eval()
        missing, unexpected = model.load_state_dict(s, strict=False)
        assert sorted(missing) == ["mean", "std"]
        assert unexpected == []
        x = images(3, 3, 32, 32)
        expected = self.forward(x, s, 16, FORMULAS[act], mean, std)
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)  # mean in float32

    @pytest.mark.parametrize(("num_classes", "mean", "std"), [
        (10, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
        (100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ])  # fmt: skip
    @pytest.mark.parametrize(
        ("entry", "prefix"),
        [(None, ""), ("state_dict", "module."), ("model_state_dict", "module.0.")],
    )
    def test_a_published_checkpoint(self, tmp_path, num_classes, mean, std, entry, prefix):
        """SiLU and the statistics of CIFAR, unless the file has others."""
        s = self.weights(10, 2, num_classes)
        x = torch.rand(3, 3, 32, 32)

        def logits(more):
            content = {f"{prefix}{k}": v for k, v in (s | more).items()}
            torch.save({entry: content, "epoch": 3} if entry else content, tmp_path / "wrn.pt")
            # Papers call it as they call the other layout.
            models = [from_checkpoint(tmp_path / "wrn.pt", arch=name)
                      for name in ("WRN-10-2", "dm_wide_resnet10_2")]  # fmt: skip
            with torch.no_grad():
                a, b = (model(x) for model in models)
            assert torch.equal(a, b)
            return a

        expected = self.forward(x, s, 10, FORMULAS["silu"], mean, std)
        torch.testing.assert_close(logits({}), expected, rtol=1e-4, atol=1e-4)
        other = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
        own = {k: torch.tensor(v).view(3, 1, 1) for k, v in zip(("mean", "std"), other)}
        expected = self.forward(x, s, 10, FORMULAS["silu"], *other)
        torch.testing.assert_close(logits(own), expected, rtol=1e-4, atol=1e-4)


class TestVGG:
    def test_layers_of_vgg19(self):
        """16 convolutions and a linear layer; a pool after each stage, down to one pixel."""
        with torch.device("meta"):
            model = MODELS["vgg19"]()
        pools = [
            f"features.{i}" for i, m in enumerate(model.features) if "Pool" in type(m).__name__
        ]
        channels = (64, 128, 256, 512, 512)
        sizes = [(c, 16 // 2**i, 16 // 2**i) for i, c in enumerate(channels)]
        assert sizes_on_the_way(model, pools) == sizes
        convs = [name for name, p in model.named_parameters() if p.ndim == 4]
        # Conv, BN, activation: three places each, and one for each pool.
        starts = [*range(0, 6, 3), *range(7, 13, 3), *range(14, 26, 3), *range(27, 39, 3)]
        starts += range(40, 52, 3)
        assert convs == [f"features.{i}.weight" for i in starts]
        assert model.classifier.weight.shape == (10, 512)

    @two_activations
    def test_forward_equals_the_layout_written_out(self, act):
        torch.manual_seed(0)
        model = VGG((1, 2), 3, num_classes=5, mean=0.4, std=0.3, activation=ACTIVATIONS[act])
        s = unsettled(model).state_dict()
        x = batch = images(3, 3, 8, 8)
        x = (x - s["normalize.mean"]) / s["normalize.std"]
        for i in (0, None, 4, 7, None):
            if i is None:  # the largest of each 2x2
                x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
                continue
            x = F.conv2d(x, s[f"features.{i}.weight"], s[f"features.{i}.bias"], padding=1)
            x = FORMULAS[act](batch_norm(x, s, f"features.{i + 1}"))
        x = x.mean((2, 3)) @ s["classifier.weight"].T + s["classifier.bias"]
        torch.testing.assert_close(model(batch), x)


@pytest.mark.parametrize("kind", TINY)
class TestEveryKind:
    """What holds for each layout, on a tiny one."""

    def test_any_size_of_image(self, kind):
        model = TINY[kind](num_classes=7, in_channels=1).eval()
        for size in ((1, 1), (8, 8), (9, 13), (32, 32)):
            assert model(torch.rand(2, 1, *size)).shape == (2, 7)

    def test_gradients_reach_every_parameter_and_the_input(self, kind):
        torch.manual_seed(0)
        # In eval mode: in train mode, BN removes a bias before it. SiLU is nowhere flat.
        model = unsettled(TINY[kind](activation=F.silu))
        x = images(4, 3, 8, 8).requires_grad_()
        F.cross_entropy(model(x), torch.arange(4)).backward()
        for name, tensor in (("x", x), *model.named_parameters()):
            assert tensor.grad is not None, name
            assert tensor.grad.abs().amax() > 1e-7, name

    def test_channels_last_and_bfloat16(self, kind):
        torch.manual_seed(0)
        model, x = unsettled(TINY[kind]()).float(), torch.rand(2, 3, 16, 16)
        expected = model(x)
        model = model.to(memory_format=torch.channels_last)
        kept = []
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d, Normalize)):
                module.register_forward_hook(
                    lambda *call: kept.append(
                        call[2].ndim != 4  # logits
                        or call[2].is_contiguous(memory_format=torch.channels_last)
                    )
                )
        x = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
        assert len(kept) > 4
        assert all(kept)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x).float(), expected, atol=0.1, rtol=0.05)

    def test_the_activation_replaces_every_relu(self, kind):
        """Without any, a network in eval mode is an affine function of the image."""
        if kind == "vgg":
            pytest.skip("a max-pool is not affine")
        torch.manual_seed(0)
        a, b = images(2, 2, 3, 8, 8)
        model = unsettled(TINY[kind](activation=lambda x: x))
        torch.testing.assert_close(model((a + b) / 2), (model(a) + model(b)) / 2)
        relu = unsettled(TINY[kind]())
        assert not torch.allclose(relu((a + b) / 2), (relu(a) + relu(b)) / 2)

    def test_the_activation_adds_nothing_to_the_checkpoint(self, kind):
        saved = TINY[kind]().state_dict()
        TINY[kind](activation=nn.SiLU()).load_state_dict(saved, strict=True)

    def test_the_forward_is_one_graph(self, kind):
        model, x = TINY[kind]().eval(), torch.rand(2, 3, 8, 8)
        graph = torch.export.export(model, (x,))  # refuses data-dependent Python
        torch.testing.assert_close(graph.module()(x), model(x))

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ({"num_classes": 0}, "num_classes must be at least 1"),
            ({"in_channels": 0}, "in_channels must be at least 1"),
            ({"mean": (0.1, 0.2), "std": (0.3, 0.4)}, "2 channels, the images 3"),
        ],
    )
    def test_bad_settings(self, kind, bad, message):
        with pytest.raises(ValueError, match=message):
            TINY[kind](**bad)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PreActResNet(()), "blocks"),
        (lambda: PreActResNet((1, 0)), "blocks"),
        (lambda: PreActResNet(width=0), "width"),
        (lambda: VGG(()), "convs"),
        (lambda: VGG((1, 0)), "convs"),
        (lambda: WideResNet(10, 0), "width"),
        (lambda: WideResNet(30), r"6n \+ 4"),
        (lambda: WideResNet(4), r"6n \+ 4"),
    ],
)
def test_bad_sizes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


class TestNormalize:
    def test_values(self):
        x = torch.rand(2, 3, 4, 4)
        out = Normalize(CIFAR10_MEAN, CIFAR10_STD)(x)
        for c in range(3):
            torch.testing.assert_close(out[:, c], (x[:, c] - CIFAR10_MEAN[c]) / CIFAR10_STD[c])
        torch.testing.assert_close(Normalize(0.5, 2)(x), (x - 0.5) / 2)
        assert torch.equal(Normalize(0, 1)(x), x)
        assert not list(Normalize(0.5, 0.5).parameters())

    def test_several_numbers_for_gray_images(self):
        with pytest.raises(ValueError, match="3 channels, the images 1"):
            Normalize(CIFAR10_MEAN, CIFAR10_STD)(torch.rand(2, 1, 4, 4))

    def test_a_checkpoint_brings_its_statistics(self):
        saved = TINY["preact"](mean=0.3, std=0.4).state_dict()
        model = TINY["preact"]()
        model.load_state_dict(saved)
        assert model.normalize.mean.item() == pytest.approx(0.3)
        assert model.normalize.std.item() == pytest.approx(0.4)

    @pytest.mark.parametrize(
        ("mean", "std", "message"),
        [
            (0.0, 0.0, "std must be above zero"),
            ((0.0,) * 3, (0.2, -1.0, 0.2), "std must be above zero"),
            (0.0, float("nan"), "std must be above zero"),
            ((0.1, 0.2, 0.3), 1.0, "same length"),
        ],
    )
    def test_bad_statistics(self, mean, std, message):
        with pytest.raises(ValueError, match=message):
            Normalize(mean, std)


# --- By name ------------------------------------------------------------------------------------

LARGE = {
    "wide_resnet34_20",
    "wide_resnet70_16",
    "dm_wide_resnet70_16",
}  # hundreds of millions: shapes alone


class TestRegistry:
    @pytest.mark.parametrize("name", sorted(MODELS))
    def test_every_model(self, name):
        with torch.device("meta" if name in LARGE else "cpu"):
            model = build_model(
                name, num_classes=4, in_channels=2, mean=(0.1, 0.2), std=(0.3, 0.4),
                activation="tanh",
            )  # fmt: skip
            assert model.eval()(torch.rand(2, 2, 8, 8)).shape == (2, 4)
        (normalize,) = (m for m in model.modules() if isinstance(m, Normalize))
        assert len(normalize.mean) == 2
        used = [m.activation for m in model.modules() if hasattr(m, "activation")]
        assert used
        assert all(activation is torch.tanh for activation in used)

    def test_wide_resnets_by_depth_and_width(self):
        with torch.device("meta"):
            models = [build_model(f"{layout}_resnet16_4", num_classes=7, in_channels=3)
                      for layout in ("wide", "dm_wide")]  # fmt: skip
        assert [count(model) for model in models] == [wide_count(16, 4, 7)] * 2
        with pytest.raises(ValueError, match=r"depth must be 6n \+ 4 .* got 17"):
            build_model("wide_resnet17_4", num_classes=10, in_channels=3)

    def test_preact_resnets_by_depth_and_width(self):
        def built(name):
            with torch.device("meta"):
                return count(build_model(name, num_classes=10, in_channels=3))

        narrow = basic_count((32, 64, 128, 256), (1, 1, 1, 1))
        assert built("preact_resnet10_32") == narrow == 1_228_074
        assert built("preact_resnet18_16") == basic_count((16, 32, 64, 128), (2, 2, 2, 2))
        assert built("preact_resnet50_8") == bottleneck_count(8, (3, 4, 6, 3))
        assert built("preact_resnet34_64") == built("preact_resnet34")
        with pytest.raises(ValueError, match=r"depth must be one of .*10, 18, .* got 17"):
            built("preact_resnet17_32")
        with pytest.raises(ValueError, match="width must be at least 1"):
            built("preact_resnet18_0")

    @pytest.mark.parametrize(
        "name",
        ["vgg", "resnet18", "preact_resnet12", "preact_resnet18_32_2", "preact_resnet18_",
         "wide_resnet34", "wide_resnet34_10_2", "wide_resnet34_1.5", "Wide_ResNet34_10",
         "xwide_resnet34_10", "wide_resnet34_10\n", ""],
    )  # fmt: skip
    def test_bad_names(self, name):
        with pytest.raises(ValueError, match=r"no model .*preact_resnet18, .*wide_resnetDEPTH_WID"):
            build_model(name, num_classes=10, in_channels=3)


class TestActivationsByName:
    def test_each_has_its_formula(self):
        x = torch.linspace(-4, 4, 801, dtype=torch.float64)
        assert ACTIVATIONS.keys() == FORMULAS.keys()
        for name, activation in ACTIVATIONS.items():
            torch.testing.assert_close(activation(x), FORMULAS[name](x))

    @pytest.mark.parametrize("arch", ["preact_resnet_small", "wide_resnet10_1"])
    def test_the_network_computes_with_it(self, arch):
        settings = {"num_classes": 5, "in_channels": 3}
        model = unsettled(build_model(arch, activation="mish", **settings))
        twin, relu = (build_model(arch, **settings).double().eval() for _ in range(2))
        for other in (twin, relu):
            other.load_state_dict(model.state_dict())
        for module in twin.modules():
            if hasattr(module, "activation"):
                module.activation = FORMULAS["mish"]
        x = images(4, 3, 8, 8)
        torch.testing.assert_close(model(x), twin(x))
        assert not torch.allclose(model(x), relu(x), rtol=1e-3)

    @pytest.mark.parametrize("name", ["sine", "ReLU", "", "relu "])
    @pytest.mark.parametrize("arch", ["preact_resnet_small", "wide_resnet10_1", "nonsense"])
    def test_an_unknown_name_is_an_error(self, arch, name):
        with pytest.raises(ValueError, match=f"no activation '{name}'; there are: relu, "):
            build_model(arch, num_classes=5, in_channels=1, activation=name)


class TestTorchvision:
    def build(self, name, **kw):
        pytest.importorskip("torchvision")
        return build_model(f"torchvision/{name}", **{"num_classes": 10, "in_channels": 3, **kw})

    def test_it_is_torchvisions_after_the_normalization(self):
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
    def test_only_logits_in_train_mode(self, name):
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("error")
            out = self.build(name).train()(torch.rand(2, 3, 299, 299))
        assert out.shape == (2, 10)

    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            *((name, {}, "no classifier .* it has: .*resnet18, ")
              for name in ("resnet_18", "fasterrcnn_resnet50_fpn", "list_models", "")),
            ("resnet18", {"in_channels": 1}, "RGB images, not 1 channels"),
            ("resnet18", {"mean": (0.1, 0.2), "std": (0.3, 0.4)}, "2 channels, the images 3"),
            ("resnet18", {"activation": "silu"}, "has its own activation"),
        ],
    )  # fmt: skip
    def test_errors(self, name, settings, message):
        with pytest.raises(ValueError, match=message):
            self.build(name, **settings)

    def test_imported_only_then(self):
        code = (
            "import sys, awp_optim.lab.models as m;"
            "m.build_model('preact_resnet_small', num_classes=10, in_channels=1);"
            "assert 'torchvision' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
