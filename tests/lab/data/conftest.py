"""What the tests of the data sets share."""

from __future__ import annotations

import functools
import http.server
import io
import socket
import tarfile
import threading
from pathlib import Path

import pytest

datasets = pytest.importorskip("torchvision.datasets")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def no_outside_world(monkeypatch, tmp_path):
    """torchvision's addresses do not answer, and there is no npm, unless a test says so."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/archive.tar.gz"
    for source in (datasets.CIFAR10, datasets.CIFAR100):
        monkeypatch.setattr(source, "url", url)
    silent = {part: [url, *rest] for part, (_, *rest) in datasets.SVHN.split_list.items()}
    monkeypatch.setattr(datasets.SVHN, "split_list", silent)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Serve bytes where a data set of torchvision looks for its archive."""
    servers = []

    def start(source: type, content: bytes) -> None:
        root = tmp_path / "www"
        root.mkdir()
        (root / "archive.tar.gz").write_bytes(content)

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        handler = functools.partial(Quiet, directory=str(root))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/archive.tar.gz"
        monkeypatch.setattr(source, "url", url)
        monkeypatch.setattr(source, "filename", "archive.tar.gz")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def silent_server(monkeypatch):
    """A server that accepts connections and never answers, for the data sets of torchvision."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/archive.tar.gz"
        for source in (datasets.CIFAR10, datasets.CIFAR100):
            monkeypatch.setattr(source, "url", url)
        yield


@pytest.fixture
def packed():
    """Pack a folder as the archive that torchvision unpacks."""

    def pack(source: Path) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            tar.add(source, source.name)
        return buffer.getvalue()

    return pack
