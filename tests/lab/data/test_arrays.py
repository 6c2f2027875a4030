"""``.npz`` and ``.npy`` files, written by numpy."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from awp_optim.lab.data import load_npz
from awp_optim.lab.data.arrays import ArrayFile

ADVICE = ("allow_pickle", "weights_only", "unsafe")


def noise(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def four(**changes):
    """Arrays of 6 training and 4 test images in (N, H, W, C)."""
    arrays = {
        "x_train": noise(6, 5, 7, 3),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": noise(4, 5, 7, 3, seed=1),
        "y_test": np.array([3, 0, 0, 1]),
    }
    return {key: array for key, array in (arrays | changes).items() if array is not None}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, ">i4", np.uint64])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_it_loads(tmp_path, layout, dtype, save):
    arrays = four()
    first = {key: arrays[key].transpose(0, 3, 1, 2) for key in ("x_train", "x_test")}
    labels = {key: arrays[key].astype(dtype) for key in ("y_train", "y_test")}
    save(tmp_path / "mine.npz", **(arrays | labels | (first if layout == "NCHW" else {})))
    data = load_npz(tmp_path / "mine.npz")
    for key, array in four(**first).items():
        assert torch.equal(getattr(data, key), torch.from_numpy(array))
    assert data.x_train.is_contiguous()
    assert (data.name, data.classes) == ("mine", ("0", "1", "2", "3"))
    assert data.mean == pytest.approx(arrays["x_train"].mean((0, 1, 2)) / 255, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None}, "has no array, x_test; it has x_train, y_train, y_test"),
        ({"x_train": noise(6, 5, 7, 3) / 255}, "x_train is float64; it must be uint8"),
        ({"x_train": noise(6, 5, 7)}, r"x_train must be .* not \(6, 5, 7\); gray images need"),
        ({"x_test": noise(4, 105)}, r"x_test must be .* not \(4, 105\)"),
        ({"x_train": noise(6, 5, 4, 5)}, "x_train .* second or the last axis"),
        ({"x_test": noise(4, 7, 5, 3)}, "differ in shape"),
        ({"y_train": np.arange(5)}, r"y_train must be int64 of shape \(6,\), not .*\(5,\)"),
        ({"y_train": np.zeros((6, 1), int)}, r"y_train must be integers of shape \(N,\)"),
        ({"y_test": np.zeros(4)}, "y_test must be integers .* not float64"),
        ({"y_test": np.zeros(4, bool)}, "y_test must be integers .* not bool"),
        ({"y_test": np.array([0, -1, 0, 0])}, "y_test must hold labels from 0, not -1 to 0"),
        ({"y_test": np.array([0, 2**40, 0, 0])}, "y_test must hold labels from 0"),
        ({"y_train": np.zeros(0, int), "x_train": noise(0, 5, 7, 3)}, "y_train is empty"),
        ({"y_test": np.array(["a", "b", "c", None], object)}, "y_test is damaged, or .*objects"),
    ],
)
def test_bad_arrays(tmp_path, changes, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **four(**changes))
    with pytest.raises(ValueError, match=message) as error:
        load_npz(path)
    assert str(path) in str(error.value)
    assert not any(word in str(error.value) for word in ADVICE)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        load_npz(tmp_path / "none.npz")
    with pytest.raises(IsADirectoryError):
        load_npz(tmp_path)
    path = tmp_path / "file.npz"
    np.savez(path, **four())
    complete = path.read_bytes()
    for content in (b"", b"text", b"PK", complete[: len(complete) // 2], pickle.dumps(four())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"file\.npz is damaged, or not an \.npz") as error:
            load_npz(path)
        assert not any(word in str(error.value) for word in ADVICE)
    flipped = bytearray(complete)
    flipped[len(complete) // 4] ^= 255  # inside x_train, which a checksum of the archive covers
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"file\.npz: x_train is damaged"):
        load_npz(path)


def test_a_single_array(tmp_path):
    np.save(tmp_path / "one.npy", noise(2, 5, 7, 3))
    assert ArrayFile(tmp_path / "one.npy").images("x").shape == (2, 3, 5, 7)
    with pytest.raises(ValueError, match=r"one\.npy has no array, x_train; it has x"):
        load_npz(tmp_path / "one.npy")


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_it_runs_no_code(tmp_path, suffix):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'it-ran'}",)

    path, evil = tmp_path / f"evil.{suffix}", np.array([Evil()])
    if suffix == "npz":
        np.savez(path, x=evil)
    else:
        np.save(path, evil)
    with pytest.raises(ValueError, match="damaged"):
        ArrayFile(path).images("x")
    assert not (tmp_path / "it-ran").exists()
