"""The data set that every loader returns, the digits, and loading by name."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

from awp_optim.lab.data import DATASETS, ImageData, load, load_digits

# Pinned, so that figures of different releases belong to the same split.
DIGITS_SHA256 = "4d4c77c6ac8f35feb200bbcaed23c1da8497bc3412f25acb19a2ef6745024746"
PARTS = ("x_train", "y_train", "x_test", "y_test")


def tiny(n_train=20, n_test=8, **changes):
    """Images of one value each, which identifies them."""
    generator = torch.Generator().manual_seed(0)
    fields = {
        "x_train": torch.arange(n_train, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 3, 3),
        "y_train": torch.randint(4, (n_train,), generator=generator),
        "x_test": torch.arange(n_test, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 3, 3),
        "y_test": torch.randint(4, (n_test,), generator=generator),
        "classes": ("a", "b", "c", "d"),
        "name": "tiny",
        "mean": (0.25,),
    }
    return ImageData(**(fields | changes))


def values(x):
    return x[:, 0, 0, 0].long()


class TestImageData:
    def test_derived_and_frozen(self):
        assert (tiny().num_classes, tiny().in_channels) == (4, 2)
        with pytest.raises(dataclasses.FrozenInstanceError):
            tiny().name = "other"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x_train": torch.zeros(20, 2, 3, 3)}, "x_train must be uint8"),
            ({"x_test": torch.zeros(8, 3, 3, dtype=torch.uint8)}, "x_test must be uint8"),
            ({"y_train": torch.zeros(20)}, "y_train must be int64"),
            ({"y_test": torch.zeros(7).long()}, r"y_test must be int64 of shape \(8,\)"),
            ({"y_test": torch.full((8,), 4)}, "y_test must hold labels from 0 and below 4"),
            ({"y_train": torch.full((20,), -1)}, "y_train must hold labels"),
            ({"x_test": torch.zeros(8, 2, 4, 3, dtype=torch.uint8)}, "differ in shape"),
        ],
    )
    def test_bad_fields(self, changes, message):
        with pytest.raises(ValueError, match=message):
            tiny(**changes)

    def test_limit(self):
        full = tiny()
        part = full.limit(6, 3)
        assert (len(part.x_train), len(part.x_test)) == (6, 3)
        assert (part.classes, part.name, part.mean) == (full.classes, full.name, full.mean)
        # Images keep their labels, none comes twice, and it is not just the head of the data.
        for x, y, labels in (
            (part.x_train, part.y_train, full.y_train),
            (part.x_test, part.y_test, full.y_test),
        ):
            index = values(x)
            assert torch.equal(labels[index], y)
            assert len(index.unique()) == len(index)
            assert index.tolist() != list(range(len(index)))

    def test_limit_is_seeded_and_nested_and_may_keep_a_part(self):
        full = tiny()
        assert torch.equal(full.limit(6).x_train, full.limit(15).x_train[:6])
        assert not torch.equal(full.limit(6).x_train, full.limit(6, seed=1).x_train)
        assert full.limit(None, 3).x_train is full.x_train
        assert full.limit(5).x_test is full.x_test

    @pytest.mark.parametrize(
        ("n", "what"), [((0,), "n_train"), ((21,), "n_train"), ((5, 9), "n_test")]
    )
    def test_limit_out_of_range(self, n, what):
        with pytest.raises(ValueError, match=f"{what} must be between 1 and"):
            tiny().limit(*n)

    def test_balanced(self):
        full = tiny(40, y_train=torch.arange(40).remainder(4).flip(0))
        data = full.balanced(14)
        index = values(data.x_train)
        assert index.tolist() == sorted(set(index.tolist()))  # none twice, in the original order
        assert torch.equal(data.y_train, full.y_train[index])
        assert data.y_train.bincount().tolist() == [4, 4, 3, 3]
        assert data.is_balanced_subset
        assert data.x_test is full.x_test
        # The same images every time, with those of smaller subsets; other ones by another seed.
        assert set(values(full.balanced(9).x_train).tolist()) < set(index.tolist())
        assert torch.equal(full.balanced(14).x_train, data.x_train)
        assert not torch.equal(full.balanced(14, seed=1).x_train, data.x_train)
        # It is not the head of each class.
        assert (data.y_train == 0).nonzero().flatten().tolist() != [0, 1, 2, 3]
        assert not data.limit(5).is_balanced_subset

    @pytest.mark.parametrize(("n", "what"), [(3, "at least 4"), (41, "class a, which has 10")])
    def test_balanced_out_of_range(self, n, what):
        with pytest.raises(ValueError, match=what):
            tiny(40, y_train=torch.arange(40) % 4).balanced(n)

    def test_split(self):
        full = tiny()
        data, (x_val, y_val) = full.split(6)
        index, held = values(data.x_train), values(x_val)
        # Every image is on one side, with its label, in the original order.
        assert sorted([*index.tolist(), *held.tolist()]) == list(range(20))
        assert torch.equal(data.y_train, full.y_train[index])
        assert torch.equal(y_val, full.y_train[held])
        assert all(i.tolist() == sorted(i.tolist()) for i in (index, held))
        # The images held out are those that limit keeps.
        assert sorted(values(full.limit(6).x_train).tolist()) == held.tolist()
        assert data.x_test is full.x_test
        assert data.mean == full.mean

    def test_every_image_is_as_likely_to_be_held_out(self):
        full, before = tiny(), torch.get_rng_state()
        held = [values(full.split(5, seed)[1][0]).tolist() for seed in range(400)]
        assert torch.equal(before, torch.get_rng_state())
        counts = np.bincount(np.ravel(held), minlength=20)  # expected: 100, deviation 8.7
        assert abs(counts - 100).max() < 40

    @pytest.mark.parametrize("n", [0, -1, 20])
    def test_split_out_of_range(self, n):
        with pytest.raises(ValueError, match="n must be between 1 and 19"):
            tiny().split(n)

    def test_statistics(self):
        x = torch.randint(256, (50, 3, 5, 7), dtype=torch.uint8)
        x[:, 1] //= 4
        x[:, 2] = 77  # a channel that never changes
        data = tiny(50, x_train=x, x_test=x[:8]).with_statistics()
        expected = x.numpy().astype(np.float64) / 255
        assert data.mean == pytest.approx(expected.mean((0, 2, 3)), abs=1e-12)
        assert data.std == pytest.approx((*expected[:, :2].std((0, 2, 3)), 1.0), abs=1e-12)
        with pytest.raises(ValueError, match="no training images"):
            tiny(0).with_statistics()

    @pytest.mark.parametrize(
        "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
            not torch.cuda.is_available(), reason="needs a CUDA device")])],
    )  # fmt: skip
    def test_to_a_device(self, device):
        moved = tiny().to(device)
        assert all(getattr(moved, name).device.type == device for name in PARTS)
        assert moved.with_statistics().mean == tiny().with_statistics().mean
        # The subsets do not depend on the device.
        assert torch.equal(moved.split(6)[0].x_train.cpu(), tiny().split(6)[0].x_train)
        assert torch.equal(moved.limit(6).x_train.cpu(), tiny().limit(6).x_train)


class TestDigits:
    def test_images_and_labels_are_scikit_learns(self):
        from sklearn.datasets import load_digits as original

        digits = load_digits()
        assert (digits.x_train.shape, digits.x_test.shape) == ((898, 1, 8, 8), (899, 1, 8, 8))
        x, y = (
            torch.cat([getattr(digits, f"{name}_{part}") for part in ("train", "test")])
            for name in "xy"
        )
        sixteenths = x.double() / 255 * 16
        assert (sixteenths - sixteenths.round()).abs().max() <= 16 * 0.5 / 255 + 1e-12
        # Compared as multisets of images with labels.
        rows = torch.cat([sixteenths.round().flatten(1), y[:, None]], dim=1).tolist()
        source = original()
        expected = np.concatenate([source.images.reshape(-1, 64), source.target[:, None]], axis=1)
        assert sorted(rows) == sorted(expected.tolist())

    def test_split_and_statistics(self):
        digits = load_digits()
        counts = digits.y_train.bincount() - digits.y_test.bincount()
        assert counts.abs().max() <= 2
        assert hashlib.sha256(digits.x_train.numpy().tobytes()).hexdigest() == DIGITS_SHA256
        x = digits.x_train.float() / 255
        assert digits.mean == pytest.approx((x.mean().item(),), abs=1e-5)
        assert digits.std == pytest.approx((x.std().item(),), abs=1e-5)


class TestByName:
    def test_the_loader_gets_the_path_and_the_options(self, monkeypatch):
        calls = []
        for name in set(DATASETS) - {"digits"}:
            monkeypatch.setitem(
                DATASETS, name, lambda *a, name=name, **k: calls.append((name, a, k))
            )
            load(name, "here", option=1)
            assert calls[-1] == (name, ("here",), {"option": 1})
        assert load("digits", "here").name == load("digits").name == "digits"
        assert set(DATASETS) == {"cifar10", "cifar100", "svhn", "digits", "folder", "npz"}

    def test_errors(self):
        with pytest.raises(ValueError, match="'mnist'; there are cifar10, "):
            load("mnist", "data")
        with pytest.raises(ValueError, match="'npz' needs a path"):
            load("npz")
