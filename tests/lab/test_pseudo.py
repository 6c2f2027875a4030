"""Pseudo-labels: what a classifier says, and files with them.

The independent truths are a linear classifier in float64, and numpy itself.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from awp_optim.lab.data import ImageData
from awp_optim.lab.pseudo import (
    PseudoLabeled,
    classify,
    confident,
    load_images,
    load_pseudo_labeled,
    pseudo_label,
    save_pseudo_labeled,
)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def images(n=30, seed=0):
    return torch.from_numpy(noise(n, 3, 6, 5, seed=seed))


# --- PseudoLabeled ----------------------------------------------------------------------------


def some(n=20):
    """Images of one value each, which tells them apart."""
    x = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 6, 5)
    return PseudoLabeled(x, torch.arange(n) * 7 % 4)


def data_of(x, classes):
    part = x[:2], torch.zeros(2, dtype=torch.int64)
    return ImageData(*part, *part, classes=tuple("abcdefgh"[:classes]), name="mine")


class TestPseudoLabeled:
    @pytest.mark.parametrize(
        ("x", "y", "message"),
        [
            (torch.zeros(2, 3, 6, 5), torch.zeros(2).long(), "x must be uint8 .* not torch.float"),
            (images(2)[0], torch.zeros(3).long(), r"x must be uint8 of shape \(N, C, H, W\)"),
            (images(2), torch.zeros(2), r"y must be int64 of shape \(2,\), not torch.float32"),
            (images(2), torch.zeros(3).long(), r"of shape \(2,\), not torch.int64 of \(3,\)"),
            (images(2), torch.zeros(2, 1).long(), r"not torch.int64 of \(2, 1\)"),
            (images(2), torch.tensor([3, -2]), "labels from 0, not -2"),
        ],
    )
    def test_bad_fields(self, x, y, message):
        with pytest.raises(ValueError, match=message):
            PseudoLabeled(x, y)

    def test_it_is_frozen_and_has_a_length(self):
        assert len(some(20)) == 20
        with pytest.raises(dataclasses.FrozenInstanceError):
            some().x = images()

    def test_check_fits(self):
        some().check_fits(data_of(images(), 4))
        with pytest.raises(ValueError, match="go up to 3, but mine has 3 classes"):
            some().check_fits(data_of(images(), 3))
        for x in (images()[:, :1], images()[:, :, :5], images()[..., :4]):
            with pytest.raises(ValueError, match=r"shape \(3, 6, 5\) .* those of mine have \("):
                some().check_fits(data_of(x, 4))


# --- By a classifier --------------------------------------------------------------------------


class Linear(nn.Module):
    """A classifier whose answer is known: W (pixels of [0, 1]) + b."""

    def __init__(self, classes=4, features=90):
        super().__init__()
        generator = np.random.default_rng(5)
        self.w, self.b = generator.normal(size=(classes, features)), generator.normal(size=classes)
        self.w -= self.w.mean(1, keepdims=True)  # so that no class has all the images
        self.weight = nn.Parameter(torch.from_numpy(self.w).float())
        self.bias = nn.Parameter(torch.from_numpy(self.b).float())
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        assert x.dtype == torch.float32
        return x.flatten(1) @ self.weight.T + self.bias

    def truth(self, x):
        """Labels and confidences in float64."""
        logits = x.numpy().reshape(len(x), -1).astype(np.float64) / 255 @ self.w.T + self.b
        e = np.exp(logits - logits.max(1, keepdims=True))
        return logits.argmax(1), (e / e.sum(1, keepdims=True)).max(1)


def answering(logits):
    """A model that gives these logits, whatever it is shown."""
    return lambda x: logits[: len(x)]


class TestPseudoLabel:
    @pytest.mark.parametrize("batch_size", [1, 7, 30, 100])
    def test_it_agrees_with_float64(self, batch_size):
        model, x = Linear(), images()
        y, confidence = model.truth(x)
        assert len(set(y)) == 4
        labeled = pseudo_label(model, x, batch_size)
        assert torch.equal(labeled.x, x)
        assert labeled.y.tolist() == y.tolist()
        assert max(model.batches) == min(batch_size, 30)
        labels, sure = classify(model, x, batch_size)
        assert labels.dtype == torch.int64
        assert labels.tolist() == y.tolist()
        assert sure.tolist() == pytest.approx(confidence, abs=1e-5)

    def test_only_confident_ones_are_kept(self):
        confidence = torch.tensor([0.5, 0.25, 0.75])
        assert confident(confidence, 0.5).tolist() == [True, False, True]
        assert confident(confidence, 0).all()
        with pytest.raises(ValueError, match=r"below 0\.76 for all 3 images, at most 0\.75;"):
            confident(confidence, 0.76)

    def test_labels_are_the_logits_largest_where_probabilities_are_equal(self):
        logits = torch.tensor([[-1.0, 0.0, 1e-9]]).expand(30, 3)  # in float32, exp(1e-9) is 1
        labels, confidence = classify(answering(logits), images())
        assert labels.tolist() == [2] * 30
        assert confidence.tolist() == pytest.approx([1 / (2 + np.exp(-1))] * 30, abs=1e-6)

    def test_confidence_is_in_float32_whatever_the_logits_are(self):
        # A sum of 1,000 probabilities in bfloat16 would be off by percents.
        logits = torch.randn(30, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
        confidence = classify(answering(logits), images())[1]
        expected = logits.double().softmax(1).amax(1)
        assert confidence.dtype == torch.float32
        assert torch.allclose(confidence.double(), expected, rtol=1e-5)

    def test_the_model_is_left_as_it_was(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.Linear(96, 4)
        )
        model[1].running_mean.normal_()
        model[1].eval()  # a mixture of modes, which must come back
        model[4].weight.requires_grad_(False)
        model[0].weight.grad = torch.ones_like(model[0].weight)
        modes = [m.training for m in model.modules()]
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            expected = copy.deepcopy(model).eval().double()(images().double() / 255).argmax(1)
        assert len(expected.unique()) > 1
        rng = torch.get_rng_state()
        assert torch.equal(pseudo_label(model, images(), 8).y, expected)
        assert torch.equal(torch.get_rng_state(), rng)
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False, True]
        assert (model[0].weight.grad == 1).all()
        assert torch.is_grad_enabled()

    def test_the_model_is_left_as_it_was_after_an_error(self):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(90, 4))
        with torch.no_grad():
            model[2].bias[1] = float("inf")
        with pytest.raises(ValueError, match="not finite"):
            pseudo_label(model, images())
        assert model.training
        assert model[1].training

    def test_no_graph_is_kept(self):
        confidence = classify(Linear(), images())[1]
        assert not confidence.requires_grad

    def test_progress(self):
        calls = []
        classify(Linear(), images(), 8, on_step=lambda *done: calls.append(done))
        assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (answering(torch.full((30, 2), float("nan"))), "not finite, from image 0 on"),
            (answering(torch.tensor([[0.0, -torch.inf]]).expand(30, 2)), "not finite"),
            (answering(torch.zeros(30, 2).long()), "tensor of logits, not torch.int64"),
            (lambda x: (x, x), "tensor of logits, not tuple"),
            (answering(torch.zeros(30)), r"shape \(N, classes\) .* not \(7,\) for 7 images"),
            (answering(torch.zeros(30, 1)), r"for 2 classes or more, not \(7, 1\)"),
            (answering(torch.zeros(1, 3)), r"not \(1, 3\) for 7 images"),
            (answering(torch.zeros(30, 2, 2)), r"not \(7, 2, 2\)"),
        ],
    )
    def test_bad_models(self, model, message):
        with pytest.raises(ValueError, match=message):
            pseudo_label(model, images(), 7)

    def test_where_it_is_not_finite(self):
        def model(x):
            return torch.where(x.mean((1, 2, 3))[:, None] > 0.9, torch.nan, torch.zeros(len(x), 2))

        x = images()
        x[17] = 255
        with pytest.raises(ValueError, match="not finite, from image 14 on"):
            pseudo_label(model, x, 7)

    @pytest.mark.parametrize(
        ("x", "settings", "message"),
        [
            (images() / 255, {}, "x must be uint8"),
            (images()[0], {}, "x must be uint8 of shape"),
            (images(0), {}, "no images to label"),
            (images(), {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ],
    )
    def test_bad_arguments_are_refused_before_any_work(self, x, settings, message):
        model = Linear()
        with pytest.raises(ValueError, match=message):
            pseudo_label(model, x, **settings)
        assert not model.batches

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_images_stay_where_they_are(self):
        model = Linear()
        y, _ = model.truth(images())
        for device in ("cpu", "cuda"):
            labeled = pseudo_label(model.cuda(), images().to(device))
            assert labeled.x.device.type == labeled.y.device.type == device
            assert labeled.y.tolist() == y.tolist()


# --- Files ------------------------------------------------------------------------------------


class TestLoad:
    @pytest.mark.parametrize("names", [("x", "y"), ("image", "label")])
    @pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
    def test_npz(self, tmp_path, layout, names):
        x, y = noise(6, 3, 7, 5), np.array([3, 0, 1, 2, 2, 9], np.uint8)
        given = x.transpose(0, 2, 3, 1) if layout == "NHWC" else x
        np.savez(tmp_path / "p.npz", **dict(zip(names, (given, y))), note=np.array("by hand"))
        labeled = load_pseudo_labeled(tmp_path / "p.npz")
        assert torch.equal(labeled.x[:], torch.from_numpy(x))
        assert labeled.y.tolist() == y.tolist()

    @pytest.mark.parametrize("name", ["x", "data", "anything", "x.npy"])
    def test_images_without_labels(self, tmp_path, name):
        expected = torch.from_numpy(x := noise(6, 3, 7, 5))
        if name == "x.npy":
            np.save(path := tmp_path / name, x)
        else:
            np.savez(path := tmp_path / "x.npz", **{name: x})
        images, labels = load_images(path)
        assert torch.equal(images[:], expected)
        assert labels is None
        with pytest.raises(ValueError, match=rf"{path.name} has no labels, .*awp pseudo-label"):
            load_pseudo_labeled(path)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"a": noise(6, 3, 7, 5), "b": noise(6, 3, 7, 5)}, "has no images, .*; it has a, b"),
            ({"y": np.arange(6)}, "has no images"),
            ({"x": noise(6, 3, 7, 5), "y": np.arange(5)}, "has 6 images and 5 labels"),
            ({"x": noise(6, 3, 7, 5), "y": np.array(["a", None])}, "y is damaged, or holds Python"),
        ],
    )
    def test_bad_arrays(self, tmp_path, arrays, message):
        np.savez(tmp_path / "p.npz", **arrays)
        with pytest.raises(ValueError, match=rf"p\.npz:? {message}"):
            load_pseudo_labeled(tmp_path / "p.npz")

    def test_a_pickle_must_be_converted(self, tmp_path):
        path = tmp_path / "ti_500K_pseudo_labeled.pickle"
        path.write_bytes(pickle.dumps({"data": noise(6, 8, 8, 3)}))
        with pytest.raises(ValueError, match=r"python -m awp_optim\.lab\.tinyimages"):
            load_pseudo_labeled(path)
        with pytest.raises(FileNotFoundError):
            load_pseudo_labeled(tmp_path / "none.pickle")


class TestSave:
    def test_it_comes_back(self, tmp_path):
        labeled = PseudoLabeled(images(), torch.arange(30) % 7)
        path = tmp_path / "new" / "folder" / "p.npz"
        save_pseudo_labeled(labeled, path)
        again = load_pseudo_labeled(path)
        assert torch.equal(again.x[:], labeled.x)
        assert torch.equal(again.y, labeled.y)
        with np.load(path) as file:
            assert (file["x"].dtype, file["x"].shape) == (np.uint8, (30, 3, 6, 5))
            assert (file["y"].dtype, file["y"].shape) == (np.int64, (30,))
        assert [p.name for p in path.parent.iterdir()] == ["p.npz"]

    def test_views(self, tmp_path):
        labeled = PseudoLabeled(
            images()[::3].contiguous(memory_format=torch.channels_last), some(10).y
        )
        save_pseudo_labeled(labeled, tmp_path / "p.npz")
        assert torch.equal(load_pseudo_labeled(tmp_path / "p.npz").x[:], images()[::3])

    def test_a_broken_write_leaves_what_was_there(self, tmp_path, monkeypatch):
        path = tmp_path / "p.npz"
        save_pseudo_labeled(some(5), path)

        def full_disk(stream, **arrays):
            stream.write(b"PK")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "savez", full_disk)
        with pytest.raises(OSError, match="No space"):
            save_pseudo_labeled(some(6), path)
        assert len(load_pseudo_labeled(path)) == 5
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize(
        ("labeled", "message"),
        [
            (PseudoLabeled(images()[..., :3], some(30).y), "fewer channels than columns"),
            (PseudoLabeled(images(0), some(0).y), "no images to save"),
        ],
    )
    def test_what_could_not_be_read_back_is_not_written(self, tmp_path, labeled, message):
        with pytest.raises(ValueError, match=message):
            save_pseudo_labeled(labeled, tmp_path / "p.npz")
        assert not list(tmp_path.iterdir())
