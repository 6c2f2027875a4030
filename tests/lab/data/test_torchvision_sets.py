"""CIFAR-100 and SVHN, from small files in the genuine layout that torchvision reads."""

from __future__ import annotations

import hashlib
import pickle
import socket

import numpy as np
import pytest
import torch
from torchvision import datasets

from awp_optim.lab.data import load_cifar100, load_svhn, sources

pytestmark = pytest.mark.filterwarnings("error:The given NumPy array")


def md5(file):
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.fixture
def cifar100(folder, monkeypatch):
    """torchvision's folder with 12 training and 5 test images: rows and two kinds of labels."""
    target = folder / "cifar-100-python"
    target.mkdir(parents=True)
    rng = np.random.default_rng(1)
    arrays = {}
    for part, n in (("train", 12), ("test", 5)):
        x = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        y = np.r_[99, rng.integers(0, 100, n - 1)]
        arrays |= {f"x_{part}": x, f"y_{part}": y}
        entry = {
            "fine_labels": y.tolist(),
            "coarse_labels": (y // 5).tolist(),
            "data": x.reshape(n, 3072),
        }
        (target / part).write_bytes(pickle.dumps(entry, protocol=2))
    names = {"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": []}
    (target / "meta").write_bytes(pickle.dumps(names, protocol=2))
    source = datasets.CIFAR100
    for part in ("train", "test"):
        monkeypatch.setattr(source, f"{part}_list", [[part, md5(target / part)]])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5(target / "meta")})
    return arrays


@pytest.fixture
def svhn(folder, monkeypatch):
    """SVHN's two files with 12 and 5 images: X of (32, 32, 3, N), y of (N, 1) from 1 to 10."""
    scipy_io = pytest.importorskip("scipy.io")
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(2)
    arrays, files = {}, {}
    for part, n in (("train", 12), ("test", 5)):
        x = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        y = np.r_[0, rng.integers(0, 10, n - 1)]
        arrays |= {f"x_{part}": x, f"y_{part}": y}
        file = folder / f"{part}_32x32.mat"
        stored = np.where(y == 0, 10, y).astype(np.uint8)[:, None]
        scipy_io.savemat(file, {"X": x.transpose(2, 3, 1, 0), "y": stored})
        files[part] = [datasets.SVHN.split_list[part][0], file.name, md5(file)]
    monkeypatch.setattr(datasets.SVHN, "split_list", files)
    return arrays


def check(data, arrays):
    for key, array in arrays.items():
        ours = getattr(data, key)
        assert torch.equal(ours, torch.from_numpy(array))
        assert ours.is_contiguous()


def test_cifar100(cifar100, folder):
    data = load_cifar100(folder)
    check(data, cifar100)
    assert (data.name, data.num_classes, data.in_channels) == ("cifar100", 100, 3)
    assert data.classes[99] == "fine99"


def test_svhn(svhn, folder):
    data = load_svhn(folder)
    check(data, svhn)
    assert (data.name, data.in_channels) == ("svhn", 3)
    assert data.classes == tuple("0123456789")


def test_cifar100_download(cifar100, folder, tmp_path, serve, packed, monkeypatch):
    archive = packed(folder / "cifar-100-python")
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", hashlib.md5(archive).hexdigest())
    serve(datasets.CIFAR100, archive)
    check(load_cifar100(tmp_path / "new", download=True), cifar100)


LOADERS = {"CIFAR100": load_cifar100, "SVHN": load_svhn}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(("download", "reason"), [(False, "not found"), (True, "URLError")])
def test_absent(name, download, reason, folder):
    with pytest.raises(RuntimeError, match=f"{name} could not be loaded from .*{reason}") as error:
        LOADERS[name](folder, download=download)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("name", "file"),
    [*(("CIFAR100", f"cifar-100-python/{part}") for part in ("train", "test", "meta")),
     ("SVHN", "test_32x32.mat")],
)  # fmt: skip
def test_damaged(name, file, cifar100, svhn, folder):
    with open(folder / file, "ab") as stream:
        stream.write(b"more")
    with pytest.raises(RuntimeError, match=f"{name} could not be loaded"):
        LOADERS[name](folder, download=False)


def test_a_download_without_answer_is_given_up(folder, monkeypatch, silent_server):
    monkeypatch.setattr(sources, "DOWNLOAD_TIMEOUT", 0.3)
    before = socket.getdefaulttimeout()
    with pytest.raises(RuntimeError, match="timed out"):
        load_cifar100(folder, download=True)
    assert socket.getdefaulttimeout() == before


def test_data_dir_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="data_dir"):
        load_cifar100(tmp_path / "file")
