"""examples/pseudo_label.py, as a user starts it and in this process."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from awp_optim.lab.models import PreActResNet, build_model
from awp_optim.lab.pseudo import load_pseudo_labeled

SCRIPT = Path(__file__).parent.parent / "examples" / "pseudo_label.py"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.fixture
def start(folder, monkeypatch, capsys):
    """Runs the script here; returns its exit status, what it says and what it complains of."""
    spec = importlib.util.spec_from_file_location("pseudo_label", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def start(*args):
        monkeypatch.setattr(sys, "argv", ["pseudo_label.py", *map(str, args), "--device", "cpu"])
        status = None
        try:
            module.main()
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr().out
        return status, said

    return start


def network(num_classes=4, mean=(0.3, 0.5, 0.6), std=(0.2, 0.3, 0.4), channels=3):
    """preact_resnet_small, made to give the pictures labels of all classes."""
    torch.manual_seed(2)
    settings = {"num_classes": num_classes, "in_channels": channels, "mean": mean, "std": std}
    model = PreActResNet((1, 1, 1), 16, **settings)
    x = torch.from_numpy(pictures(channels=channels)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        for _ in range(20):
            model(x)  # BatchNorm's statistics
        model.eval()
        model.linear.weight.mul_(5)
        model.linear.bias.sub_(model(x).mean(0))
    return model


def pictures(n=60, channels=3):
    """Blots of many colours, uint8 (N, 8, 8, channels)."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (n, 2, 1, 1, channels)) * np.ones((1, 1, 8, 8, 1))
    mask = generator.random((n, 8, 8, 1)) < 0.5
    return np.where(mask, colours[:, 0], colours[:, 1]).astype(np.uint8)


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
def checkpoint(folder):
    model = network()
    content = {"model": model.state_dict(), "config": {"arch": "preact_resnet_small"}, "row": {}}
    torch.save(content, "best.pt")
    return model


def squeezed(text):
    return " ".join(text.split())


def test_as_a_user_starts_it(folder, checkpoint):
    x = pictures()
    y, confidence = truth(checkpoint, x)
    given = y.clone()
    given[:15] = 3 - given[:15]  # a quarter disagrees, whatever the label
    np.savez("x.npz", x=x, y=given.numpy())
    args = ("--images", "x.npz", "--checkpoint", "best.pt", "--out", "out/xy.npz")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    said = squeezed(done.stdout)
    mean = f"{confidence.mean():.2%}"
    assert f"60 images of 3x8x8, 60 kept (100.00%), with a mean confidence of {mean}." in said
    assert "Of those kept, 75.00% agree with the labels in x.npz." in said
    for label, n in zip(*y.unique(return_counts=True)):
        assert re.search(rf"│ +{label} │ +{n} │ +{n / 60:.1%} │", said), said
    labeled = load_pseudo_labeled("out/xy.npz")
    assert torch.equal(labeled.x, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert torch.equal(labeled.y, y)

    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args[:3], "none.pt", *args[4:]],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*none\.pt'?\n", done.stderr)


def test_only_confident_ones(start, checkpoint):
    x = pictures()
    y, confidence = truth(checkpoint, x)
    least = float(confidence.sort().values[19:21].mean())
    kept = confidence >= least
    given = y.clone()
    given[kept.nonzero()[:10, 0]] = 9
    given[~kept] = 9  # and these do not count
    np.savez("x.npz", x=x, y=given.numpy())
    args = ("--images", "x.npz", "--checkpoint", "best.pt", "--out", "xy.npz", "--batch-size", 7)
    status, said = start(*args, "--min-confidence", least)
    assert status is None
    mean = f"{confidence[kept].mean():.2%}"
    assert f"60 images of 3x8x8, 40 kept (66.67%), with a mean confidence of {mean}" in said
    assert "75.00% agree" in said
    labeled = load_pseudo_labeled("xy.npz")
    assert torch.equal(labeled.x, torch.from_numpy(x).permute(0, 3, 1, 2)[kept])
    assert torch.equal(labeled.y, y[kept])


def test_a_bare_state_dict_of_a_network_without_statistics(start, folder):
    model = network(7, mean=0.0, std=1.0, channels=1)
    x = pictures(channels=1)
    y, _ = truth(model, x)
    state = {f"module.{k}": v for k, v in model.state_dict().items() if "normalize" not in k}
    torch.save(state, "w.pt")
    np.save("x.npy", x)
    args = ("--images", "x.npy", "--checkpoint", "w.pt", "--out", "xy.npz")
    status, _ = start(*args)
    assert status == "error: w.pt does not name its network: give --arch"
    status, said = start(*args, "--arch", "preact_resnet_small")
    assert status is None
    assert "agree" not in said
    assert torch.equal(load_pseudo_labeled("xy.npz").y, y)


def test_the_activation_is_the_checkpoints(start, folder):
    model = network()
    relu = truth(model, pictures())[0]
    for module in model.modules():
        if hasattr(module, "activation"):
            module.activation = torch.tanh
    y, _ = truth(model, pictures())
    assert not torch.equal(y, relu)
    config = {"arch": "preact_resnet_small", "activation": "tanh"}
    torch.save({"model": model.state_dict(), "config": config}, "best.pt")
    np.save("x.npy", pictures())
    assert start("--images", "x.npy", "--checkpoint", "best.pt", "--out", "xy.npz")[0] is None
    assert torch.equal(load_pseudo_labeled("xy.npz").y, y)


def test_the_classes_are_those_of_the_last_layer(start, folder):
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    arch = "torchvision/mobilenet_v3_small"  # which has two linear layers
    model = build_model(arch, num_classes=6, in_channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    torch.save({"model": model.state_dict(), "config": {"arch": arch}}, "best.pt")
    np.save("x.npy", pictures())
    assert start("--images", "x.npy", "--checkpoint", "best.pt", "--out", "xy.npz")[0] is None
    assert int(load_pseudo_labeled("xy.npz").y.max()) < 6


def test_a_function_of_ones_own(start, folder):
    Path("mine_to_label_by.py").write_text(
        "from torch import nn\n"
        "class Brightest(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.mean((2, 3))\n"
        "def none():\n"
        "    return 3\n"
        "def raises():\n"
        "    raise ValueError('no\\n  weights')\n"
    )
    np.save("x.npy", pictures())
    args = ("--images", "x.npy", "--out", "xy.npz", "--model")
    assert start(*args, "mine_to_label_by:Brightest")[0] is None
    labeled = load_pseudo_labeled("xy.npz")
    assert labeled.y.tolist() == pictures().astype(int).sum((1, 2)).argmax(1).tolist()
    for name, message in {
        "mine_to_label_by": "error: --model must be module:function, not 'mine_to_label_by'",
        "mine_to_label_by:other": "error: mine_to_label_by has no function 'other'",
        "mine_to_label_by:none": "error: mine_to_label_by:none must return a torch module, not int",
        "mine_to_label_by:raises": "error: no weights",
        "nowhere_at_all:f": "error: No module named 'nowhere_at_all'",
    }.items():
        assert start(*args, name)[0] == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--images": "none.npz"}, r"No such file.*none\.npz"),
        ({"--images": "best.pt"}, r"best\.pt has no images, .*; it has \S+data\.pkl"),
        ({"--images": "y.npz"}, r"y\.npz has 60 images and 3 labels"),
        (
            {"--images": "grey.npy"},
            r"best\.pt, as preact_resnet_small: .*conv1|mean and std have 3",
        ),
        ({"--checkpoint": "x.npz"}, r"x\.npz"),
        ({"--checkpoint": "nan.pt"}, r"nan\.pt, as preact_resnet_small: .*not finite: linear"),
        ({"--checkpoint": "other.pt"}, r"other\.pt does not show the number of classes: give"),
        ({"--arch": "magic"}, "no model 'magic'"),
        ({"--arch": "vgg19"}, r"best\.pt, as vgg19: the weights do not fit the network"),
        ({"--num-classes": "3"}, "head for 4 classes, not 3: leave out --num-classes"),
        ({"--batch-size": "0"}, "batch_size must be at least 1"),
        ({"--min-confidence": "1"}, r"confidence is below 1 for all 60 images"),
        ({"--out": "x.npz"}, "--out would take the place of --images"),
        ({"--out": "best.pt/xy.npz"}, r"best\.pt"),
    ],
)
def test_it_names_what_is_wrong_in_a_line(start, checkpoint, changes, message):
    np.savez("x.npz", x=pictures())
    np.savez("y.npz", x=pictures(), y=np.arange(3))
    np.save("grey.npy", pictures(channels=1))
    content = torch.load("best.pt")
    torch.save({**content, "model": {"a": torch.zeros(3)}}, "other.pt")
    content["model"]["linear.bias"][0] = float("nan")
    torch.save(content, "nan.pt")
    args = {"--images": "x.npz", "--checkpoint": "best.pt", "--out": "xy.npz"} | changes
    before = Path("x.npz").read_bytes()
    status, _ = start(*(word for pair in args.items() for word in pair))
    assert re.match(f"error: .*({message})", status), status
    assert "\n" not in status
    assert not Path("xy.npz").exists()
    assert Path("x.npz").read_bytes() == before


@pytest.mark.parametrize(
    "args",
    [
        ("--min-confidence", "1.5"),
        ("--min-confidence", "high"),
        ("--model", "a:b"),  # beside --checkpoint
    ],
)
def test_usage(start, checkpoint, args):
    np.savez("x.npz", x=pictures())
    needed = ("--images", "x.npz", "--checkpoint", "best.pt", "--out", "xy.npz")
    assert start(*needed, *args)[0] == 2
