"""Trees of image files, written by Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from awp_optim.lab.data import folders, load_folder

Image = pytest.importorskip("PIL.Image")


def put_images(folder, images, mode="RGB", suffix=".png"):
    """Write numpy images, (H, W) or (H, W, 3), as ``000.png``, ``001.png``, ..."""
    folder.mkdir(parents=True)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03}{suffix}")


def noise(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "pets").mkdir()
    return tmp_path / "pets"


@pytest.fixture
def _half(monkeypatch):
    """Half of a single tree becomes the test part."""
    monkeypatch.setattr(folders, "TEST_FRACTION", 0.5)


def test_two_trees(root):
    x = {name: noise(n, 5, 7, 3, seed=n) for name, n in (("cat", 4), ("ape", 3))}
    for name, images in x.items():
        put_images(root / "train" / name, images[1:])
        put_images(root / "test" / name, images[:1])
    (root / "train" / "cat" / "notes.txt").touch()
    data = load_folder(root)
    assert (data.classes, data.name) == (("ape", "cat"), "pets")
    expected = np.concatenate([x["ape"][1:], x["cat"][1:]])
    assert torch.equal(data.x_train, torch.from_numpy(expected).permute(0, 3, 1, 2))
    held = np.concatenate([x["ape"][:1], x["cat"][:1]])
    assert torch.equal(data.x_test, torch.from_numpy(held).permute(0, 3, 1, 2))
    assert data.y_train.tolist() == [0, 0, 1, 1, 1]
    assert data.y_test.tolist() == [0, 1]
    assert data.mean == pytest.approx(expected.mean((0, 1, 2)) / 255, abs=1e-12)
    assert data.std == pytest.approx(expected.std((0, 1, 2)) / 255, abs=1e-12)


def test_one_tree(root, monkeypatch):
    # Images of one value each, which identifies them: 10 of class a, 20 of b, 1 of c.
    label = [0] * 10 + [1] * 20 + [2]
    for name, span in (("a", (0, 10)), ("b", (10, 30)), ("c", (30, 31))):
        values = np.arange(*span, dtype=np.uint8)[:, None, None]
        put_images(root / name, np.broadcast_to(values, (len(values), 4, 4)), "L")
    monkeypatch.setattr(folders, "TEST_FRACTION", 0.3)
    data = load_folder(root)
    train, test = (x[:, 0, 0, 0].tolist() for x in (data.x_train, data.x_test))
    assert data.in_channels == 1
    assert sorted(train + test) == list(range(31))
    assert data.y_train.tolist() == [label[i] for i in train]
    assert data.y_test.tolist() == [label[i] for i in test]
    assert data.y_test.bincount(minlength=3).tolist() == [3, 6, 0]
    assert test != [0, 1, 2, *range(10, 16)]
    assert torch.equal(load_folder(root).x_test, data.x_test)
    # One image of a class always stays to train on.
    monkeypatch.setattr(folders, "TEST_FRACTION", 0.99)
    assert load_folder(root).y_train.tolist() == [0, 1, 2]


@pytest.mark.usefixtures("_half")
def test_jpeg_and_upper_case(root):
    flat = np.full((2, 8, 8, 3), [200, 100, 50], np.uint8)
    put_images(root / "a", flat, suffix=".JPG")
    put_images(root / "b", flat, suffix=".jpeg")
    data = load_folder(root)
    expected = torch.tensor([200, 100, 50]).view(3, 1, 1)
    assert ((data.x_train.int() - expected).abs() <= 3).all()


@pytest.mark.parametrize(
    ("modes", "color", "channels"),
    [(("L", "1"), False, 1), (("L", "LA"), False, 1), (("L", "RGB"), True, 3),
     (("P", "RGBA"), True, 3), (("P", "RGBA"), False, 1)],
)  # fmt: skip
@pytest.mark.usefixtures("_half")
def test_one_channel_if_every_image_is_gray(root, modes, color, channels):
    white = np.full((2, 4, 4, 3), 255, np.uint8)
    red = white * np.array([1, 0, 0], np.uint8)
    for mode in modes:
        put_images(root / mode, red if color and mode != "L" else white, mode)
    data = load_folder(root)
    assert data.x_train.shape == (2, channels, 4, 4)
    assert (data.x_train[:, 0] == 255).all()
    if color:
        assert (data.x_train[data.classes.index(modes[1]), 1:] == 0).all()


@pytest.mark.usefixtures("_half")
def test_size(root):
    ramp = np.linspace(0, 255, 12).astype(np.uint8)
    put_images(root / "a", [np.broadcast_to(ramp, (6, 12))] * 2, "L")
    put_images(root / "b", [np.full((9, 3), 50, np.uint8)] * 2, "L")
    with pytest.raises(ValueError, match=r"differ in size: .*12x6, .*3x9"):
        load_folder(root)
    x = load_folder(root, size=4).x_train
    assert x.shape == (2, 1, 4, 4)
    expected = Image.fromarray(np.broadcast_to(ramp, (6, 12))).resize((4, 4), Image.BILINEAR)
    assert torch.equal(x[0, 0], torch.from_numpy(np.array(expected)))
    assert (x[1] == 50).all()


@pytest.mark.parametrize("part", ["train", "test"])
def test_train_and_test_must_have_the_same_classes(root, part):
    for name in ("train/a", "test/a", f"{part}/z"):
        put_images(root / name, noise(1, 4, 4))
    with pytest.raises(ValueError, match="same classes; one lacks z"):
        load_folder(root)


def test_bad_trees(root):
    with pytest.raises(NotADirectoryError, match="not a folder of images"):
        load_folder(root / "none")
    with pytest.raises(ValueError, match="layout is path/train"):
        load_folder(root)
    put_images(root / "train" / "a", noise(1, 4, 4))  # without a test part
    with pytest.raises(ValueError, match=r"000\.png is too deep in .*pets .*layout is path/train"):
        load_folder(root)
    (root / "test" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="classes a"):
        load_folder(root)
    with pytest.raises(ValueError, match=r"too few images for a test part of 0\.2"):
        load_folder(root / "train")


@pytest.mark.parametrize("keep", [0, 20, 90])
def test_a_damaged_image(root, keep):
    put_images(root / "a", noise(3, 16, 16))
    file = root / "a" / "001.png"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"001\.png cannot be read"):
        load_folder(root)


@pytest.mark.usefixtures("_half")
def test_sixteen_bits(root):
    (root / "a").mkdir()
    for i in range(2):
        Image.fromarray(np.full((4, 4), 60_000, np.uint16)).save(root / "a" / f"{i}.png")
    with pytest.raises(ValueError, match=r"0\.png cannot be read: .*more than 8 bits"):
        load_folder(root)


def test_bad_arguments(root):
    with pytest.raises(ValueError, match="size must be 1 or more"):
        load_folder(root, size=0)
