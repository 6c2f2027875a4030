"""Images that stay in their files, against what numpy reads from the same files."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
import torch

from awp_optim.lab.data.arrays import ArrayFile
from awp_optim.lab.data.stored import StoredImages


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def stored(*files, name="image"):
    return StoredImages([ArrayFile(file).stored(name) for file in files])


def indices(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("channels", [1, 3])
def test_parts_read_as_one(tmp_path, channels, layout, save):
    shape = (5, 7, channels) if layout == "NHWC" else (channels, 5, 7)
    parts = [noise(n, *shape, seed=n) for n in (11, 1, 6)]
    for i, part in enumerate(parts):
        save(tmp_path / f"{i}.npz", before=np.arange(i), image=part, label=np.arange(len(part)))
    images = stored(*(tmp_path / f"{i}.npz" for i in range(3)))
    truth = np.concatenate(parts)
    truth = torch.from_numpy(truth.transpose(0, 3, 1, 2) if layout == "NHWC" else truth)
    assert len(images) == 18
    assert (images.shape, images.dtype, images.ndim) == (truth.shape, truth.dtype, truth.ndim)
    index = torch.randint(18, (50,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(images[index], truth[index])
    assert torch.equal(images[indices(17, 11, 0, 10)], truth[[17, 11, 0, 10]])
    for part in (slice(None), slice(3, 15, 4), slice(16, 99), slice(4, 4)):
        assert torch.equal(images[part], truth[part])
    assert [images.file_of(i).name[0] for i in (0, 10, 11, 12, 17)] == list("00122")


def test_an_npy_file_too_large_for_memory(tmp_path):
    """92 GB, nearly all of it a hole."""
    path, n = tmp_path / "x.npy", 30_000_000
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, 32, 32, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        os.truncate(path, start + n * 3072)
        file.seek(start + (n - 2) * 3072)
        file.write(bytes([7]) * 3072)
    images = stored(path, name="x")
    assert images.shape == (n, 3, 32, 32)
    assert images[indices(n - 2, n - 1, 0)].flatten(1).sum(1).tolist() == [7 * 3072, 0, 0]


@pytest.mark.parametrize("index", [(0, 6), (-1, 2)])
def test_there_is_no_such_image(tmp_path, index):
    np.save(tmp_path / "x.npy", noise(6, 8, 8, 3))
    with pytest.raises(IndexError, match="6 images"):
        stored(tmp_path / "x.npy", name="x")[indices(*index)]


# --- Files that cannot be used ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "npy"])
@pytest.mark.parametrize("kept", [0.3, 0.97])
def test_a_truncated_file(tmp_path, kind, kept):
    path = tmp_path / f"part2.{kind}"
    x = noise(6, 8, 8, 3)
    np.save(path, x) if kind == "npy" else np.savez(path, image=x, label=np.arange(6))
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(ValueError, match=rf"part2\.{kind} is damaged"):
        stored(path)


def test_a_file_that_shrinks_while_it_is_used(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, noise(6, 8, 8, 3))
    images = stored(path, name="x")
    os.truncate(path, path.stat().st_size - 1)
    assert len(images[indices(0, 4)]) == 2
    with pytest.raises(OSError, match=r"x\.npy has become shorter"):
        images[indices(0, 5)]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (noise(4, 8, 8, 1), r"b\.npz has images of \(8, 8, 1\), .*a\.npz of \(8, 8, 3\)"),
        (noise(4, 3, 8, 8), r"b\.npz has images of \(3, 8, 8\)"),
        (noise(4, 8, 8, 3).astype(np.float32), r"b\.npz: image is float32"),
        (noise(4, 8, 8), r"b\.npz: image must be \(N, H, W, C\)"),
        (noise(4, 8, 9, 8), r"b\.npz: image .* second or the last axis"),
        (np.asfortranarray(noise(4, 8, 8, 3)), r"b\.npz: image is in Fortran order"),
        (np.array([None, 1]), r"b\.npz: image is damaged, or holds Python objects"),
    ],
)
def test_parts_that_cannot_be_used(tmp_path, other, message):
    np.savez(tmp_path / "a.npz", image=noise(6, 8, 8, 3))
    np.savez(tmp_path / "b.npz", image=other)
    with pytest.raises(ValueError, match=message):
        stored(tmp_path / "a.npz", tmp_path / "b.npz")


# --- Compressed files -------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path):
    """A compressed file in a folder of its own, and how to write another in its place."""
    path = tmp_path / "folder" / "p.npz"
    path.parent.mkdir()

    def write(seed):
        x = noise(60, 8, 8, 3, seed=seed)
        np.savez_compressed(path, image=x)
        return torch.from_numpy(x).permute(0, 3, 1, 2)

    return path, write


def unpacked(path):
    return [p for p in path.parent.iterdir() if p != path]


def test_it_is_unpacked_once(packed):
    path, write = packed
    truth = write(0)
    assert torch.equal(stored(path)[:], truth)
    (beside,) = unpacked(path)
    before = beside.stat()
    assert torch.equal(stored(path)[:], truth)
    after = beside.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_another_archive_of_the_same_name_is_unpacked_anew(packed):
    path, write = packed
    first = write(0)
    assert torch.equal(stored(path)[:], first)
    second = write(1)
    assert torch.equal(stored(path)[:], second)


def test_what_was_half_unpacked_is_not_used(packed):
    path, write = packed
    truth = write(0)
    stored(path)
    (beside,) = unpacked(path)
    os.truncate(beside, 5000)
    assert torch.equal(stored(path)[:], truth)


@pytest.mark.parametrize("how", ["flipped", "killed"])
def test_nothing_is_left_of_an_archive_that_cannot_be_unpacked(packed, how, monkeypatch):
    path, write = packed
    write(0)
    if how == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"p\.npz: image.npy is damaged"):
            stored(path)
    else:

        def interrupted(self, n=-1):
            raise KeyboardInterrupt

        monkeypatch.setattr(zipfile.ZipExtFile, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stored(path)
    assert unpacked(path) == []


def test_a_disk_without_room_for_it(packed, monkeypatch):
    path, write = packed
    write(0)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"p\.npz is compressed"):
        stored(path)
    assert unpacked(path) == []
