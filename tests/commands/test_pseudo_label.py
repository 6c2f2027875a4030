"""``awp pseudo-label``: the labels it gives, and to which images."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from awp_optim.lab.models import build_model
from awp_optim.lab.pseudo import load_pseudo_labeled


def pictures(n=60, channels=3):
    """Blots of many colors, uint8 (N, 8, 8, channels)."""
    generator = np.random.default_rng(0)
    colors = generator.integers(0, 256, (n, 2, 1, 1, channels)) * np.ones((1, 1, 8, 8, 1))
    mask = generator.random((n, 8, 8, 1)) < 0.5
    return np.where(mask, colors[:, 0], colors[:, 1]).astype(np.uint8)


def network(num_classes=4, mean=(0.3, 0.5, 0.6), std=(0.2, 0.3, 0.4), channels=3, **settings):
    """A small network, made to give the pictures labels of all classes."""
    torch.manual_seed(2)
    settings |= {"num_classes": num_classes, "in_channels": channels, "mean": mean, "std": std}
    model = build_model("preact_resnet_small", **settings)
    x = torch.from_numpy(pictures(channels=channels)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        for _ in range(20):
            model(x)  # BatchNorm's statistics
        model.eval()
        model.linear.weight.mul_(5)
        model.linear.bias.sub_(model(x).mean(0))
    return model


def truth(model, x):
    """Labels and confidences in float64."""
    with torch.no_grad():
        images = torch.from_numpy(x).permute(0, 3, 1, 2).double() / 255
        p = model.double()(images).softmax(1)
    model.float()
    top = p.topk(2).values
    assert (top[:, 0] - top[:, 1]).min() > 1e-5
    assert len(p.argmax(1).unique()) > 1
    return p.argmax(1), top[:, 0]


@pytest.fixture
def label(awp):
    """Labels ``x.npz`` or the images named, into ``xy.npz``."""

    def label(*arguments, images="x.npz", by=("--checkpoint", "best.pt")):
        return awp("pseudo-label", "--images", images, *by, "--out", "out/xy.npz", *arguments)

    return label


@pytest.fixture
def checkpoint(tmp_path):
    model = network()
    content = {"model": model.state_dict(), "config": {"arch": "preact_resnet_small"}, "row": {}}
    torch.save(content, tmp_path / "best.pt")
    return model


def test_labels_images_and_counts_what_agrees(label, checkpoint, tmp_path):
    x = pictures()
    y, confidence = truth(checkpoint, x)
    given = y.clone()
    given[:15] = 3 - given[:15]  # a quarter disagrees, whatever the label
    np.savez(tmp_path / "x.npz", x=x, y=given.numpy())
    ended = label()
    assert ended.status == 0, ended.err
    out = " ".join(ended.out.split())
    mean = f"{confidence.mean():.2%}"
    assert f"60 images of 3x8x8, 60 kept (100.00%), with a mean confidence of {mean}." in out
    assert "Of those kept, 75.00% agree with the labels in x.npz." in out
    for value, n in zip(*y.unique(return_counts=True)):
        assert re.search(rf"│ +{value} │ +{n} │ +{n / 60:.1%} │", out), out
    labeled = load_pseudo_labeled(tmp_path / "out/xy.npz")
    assert torch.equal(labeled.x[:], torch.from_numpy(x).permute(0, 3, 1, 2))
    assert torch.equal(labeled.y, y)


def test_only_confident_ones(label, checkpoint, tmp_path):
    x = pictures()
    y, confidence = truth(checkpoint, x)
    least = float(confidence.sort().values[19:21].mean())
    kept = confidence >= least
    given = y.clone()
    given[kept.nonzero()[:10, 0]] = 9
    given[~kept] = 9  # and these do not count
    np.savez(tmp_path / "x.npz", x=x, y=given.numpy())
    ended = label("--min-confidence", least, "--batch-size", 7)
    mean = f"{confidence[kept].mean():.2%}"
    assert f"60 images of 3x8x8, 40 kept (66.67%), with a mean confidence of {mean}" in ended.out
    assert "75.00% agree" in ended.out
    labeled = load_pseudo_labeled(tmp_path / "out/xy.npz")
    assert torch.equal(labeled.x[:], torch.from_numpy(x).permute(0, 3, 1, 2)[kept])
    assert torch.equal(labeled.y, y[kept])


def test_a_state_dict_of_a_network_without_statistics(label, tmp_path):
    model = network(7, mean=0.0, std=1.0, channels=1)
    x = pictures(channels=1)
    y, _ = truth(model, x)
    state = {f"module.{k}": v for k, v in model.state_dict().items() if "normalize" not in k}
    torch.save(state, tmp_path / "w.pt")
    np.save(tmp_path / "x.npy", x)
    weights = {"images": "x.npy", "by": ("--checkpoint", "w.pt")}
    assert "--arch" in label(**weights).err
    ended = label("--arch", "preact_resnet_small", **weights)
    assert ended.status == 0
    assert "agree" not in ended.out
    assert torch.equal(load_pseudo_labeled(tmp_path / "out/xy.npz").y, y)


def test_the_activation_is_the_checkpoints(label, tmp_path):
    model = network(activation="tanh")
    y, _ = truth(model, pictures())
    assert not torch.equal(y, truth(network(), pictures())[0])
    config = {"arch": "preact_resnet_small", "activation": "tanh"}
    torch.save({"model": model.state_dict(), "config": config}, tmp_path / "best.pt")
    np.savez(tmp_path / "x.npz", x=pictures())
    assert label().status == 0
    assert torch.equal(load_pseudo_labeled(tmp_path / "out/xy.npz").y, y)


def test_the_classes_are_those_of_the_last_layer(label, tmp_path):
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    arch = "torchvision/mobilenet_v3_small"  # which has two linear layers
    model = build_model(arch, num_classes=6, in_channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    torch.save({"model": model.state_dict(), "config": {"arch": arch}}, tmp_path / "best.pt")
    np.savez(tmp_path / "x.npz", x=pictures())
    assert label().status == 0
    assert int(load_pseudo_labeled(tmp_path / "out/xy.npz").y.max()) < 6


def test_a_function_of_ones_own(label, tmp_path):
    (tmp_path / "mine_to_label_by.py").write_text(
        "from torch import nn\n"
        "class Brightest(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.mean((2, 3))\n"
        "def none():\n"
        "    return 3\n"
    )
    np.savez(tmp_path / "x.npz", x=pictures())
    assert label(by=("--model", "mine_to_label_by:Brightest")).status == 0
    labeled = load_pseudo_labeled(tmp_path / "out/xy.npz")
    assert labeled.y.tolist() == pictures().astype(int).sum((1, 2)).argmax(1).tolist()
    for name, words in {"other": "has no function 'other'", "none": "not int"}.items():
        ended = label(by=("--model", f"mine_to_label_by:{name}"))
        assert ended.status == 2
        assert words in ended.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--checkpoint", "other.pt"), "--num-classes"),
        (("--checkpoint", "nan.pt"), "not finite: linear"),
        (("--arch", "vgg19"), "as vgg19: the weights do not fit"),
        (("--num-classes", 3), "head for 4 classes, not 3"),
        (("--min-confidence", 1), "for all 60 images"),
    ],
)
def test_classifiers_and_images_that_do_not_go_together(
    label, checkpoint, tmp_path, arguments, words
):
    np.savez(tmp_path / "x.npz", x=pictures())
    content = torch.load(tmp_path / "best.pt")
    torch.save({**content, "model": {"a": torch.zeros(3)}}, tmp_path / "other.pt")
    content["model"]["linear.bias"][0] = float("nan")
    torch.save(content, tmp_path / "nan.pt")
    ended = label(*arguments)
    assert ended.status == 2
    assert words in ended.err
    assert not (tmp_path / "out/xy.npz").exists()
