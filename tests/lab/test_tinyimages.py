"""The conversion of the published pickle, and hostile pickles."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from awp_optim.lab.pseudo import load_pseudo_labeled
from awp_optim.lab.tinyimages import convert_tinyimages


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def published(n=12, **changes):
    """The layout of ti_500K_pseudo_labeled.pickle, and more beside."""
    entries = {
        "data": noise(n, 32, 32, 3),
        "extrapolated_targets": np.random.default_rng(1).integers(0, 10, n),
        "prediction_model": "cifar10-vanilla/checkpoint-epoch200.pt",
        "index": np.arange(n, dtype=np.int32),
    }
    return {key: value for key, value in (entries | changes).items() if value is not None}


@pytest.fixture
def convert(tmp_path):
    """Converts an object, or the bytes of a pickle; nothing is written if that fails."""

    def convert(content, protocol=4, **options):
        content = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
        (tmp_path / "in.pickle").write_bytes(content)
        try:
            convert_tinyimages(tmp_path / "in.pickle", tmp_path / "out.npz", **options)
        except ValueError:
            assert not (tmp_path / "out.npz").exists()
            raise
        return load_pseudo_labeled(tmp_path / "out.npz")

    return convert


def with_old_names(content):
    """A pickle of protocol 3, as numpy before 2.0 would have written it."""
    return content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


@pytest.mark.parametrize("old_names", [True, False])
@pytest.mark.parametrize("protocol", [3, 4])
def test_the_published_layout(convert, protocol, old_names):
    content = published()
    written = pickle.dumps(content, protocol)
    if old_names and protocol == 3:
        written = with_old_names(written)
        assert b"numpy._core" not in written
        with warnings.catch_warnings():  # still a pickle that numpy reads
            warnings.simplefilter("ignore")
            assert np.array_equal(pickle.loads(written)["data"], content["data"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labeled = convert(written)
    assert torch.equal(labeled.x[:], torch.from_numpy(content["data"]).permute(0, 3, 1, 2))
    assert labeled.y.tolist() == content["extrapolated_targets"].tolist()


@pytest.mark.parametrize(
    "data",
    [
        noise(12, 3, 32, 32),
        np.asfortranarray(noise(12, 32, 32, 3)),
        noise(12, 3, 32, 32).transpose(0, 2, 3, 1),
        noise(12, 8, 8, 1),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_other_layouts_and_types(convert, data, dtype):
    targets = np.arange(24)[::-2].astype(dtype)
    labeled = convert(published(data=data, extrapolated_targets=targets))
    expected = torch.from_numpy(np.ascontiguousarray(data))
    first = expected if data.shape[1] < data.shape[3] else expected.permute(0, 3, 1, 2)
    assert torch.equal(labeled.x[:], first)
    assert labeled.y.tolist() == targets.tolist()


def test_the_digest_is_checked(convert):
    written = pickle.dumps(published(), 4)
    digest = hashlib.sha256(written).hexdigest()
    assert len(convert(written, sha256=digest.upper())) == 12
    with pytest.raises(FileNotFoundError):
        convert_tinyimages("none.pickle", "out.npz", sha256=digest)


def test_another_digest_is_refused(convert):
    with pytest.raises(ValueError, match=r"in\.pickle has the SHA-256"):
        convert(published(), sha256="0" * 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, r"in\.pickle .*not the published pickle"),
        ({"extrapolated_targets": None}, "not the published pickle"),
        ({"data": noise(12, 32, 32, 3) / 255}, "data is float64; it must be uint8"),
        ({"data": noise(12, 3072)}, r"data must be .* not \(12, 3072\)"),
        ({"data": "images.npy"}, "not the published pickle"),
        ({"extrapolated_targets": np.zeros(12)}, "targets must be integers .* not float64"),
        ({"extrapolated_targets": np.full(12, -1)}, "labels from 0, not -1 to -1"),
        ({"extrapolated_targets": np.ones(12, bool)}, "must be integers .* not bool"),
        ({"extrapolated_targets": np.arange(12, dtype=">i4")}, "byte order"),
    ],
)
def test_bad_content(convert, changes, message):
    with pytest.raises(ValueError, match=message):
        convert(published(**changes))


def test_as_many_labels_as_images(tmp_path):
    (tmp_path / "in.pickle").write_bytes(
        pickle.dumps(published(extrapolated_targets=np.arange(11)))
    )
    with pytest.raises(ValueError, match=r"int64 of shape \(12,\)"):
        convert_tinyimages(tmp_path / "in.pickle", tmp_path / "out.npz")


def test_damaged_files(convert):
    complete = pickle.dumps(published(), 4)
    for part in (0.0, 1e-4, 0.01, 0.5, 0.99):
        with pytest.raises(ValueError, match="is damaged"):
            convert(complete[: int(part * len(complete))])
    for content in (b"text", b"PK", pickle.dumps([1, 2])):
        with pytest.raises(ValueError, match="is damaged, or not the published pickle"):
            convert(content)
    # The bytes of 12 images under the shape of 13.
    changed = complete.replace(b"(K\x0cK K K\x03t", b"(K\x0dK K K\x03t")
    assert changed != complete
    with pytest.raises(ValueError, match="cannot reshape"):
        convert(changed)


# --- Hostile pickles ----------------------------------------------------------------------------


class Calls:
    """Unpickling it calls a function."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def hostile(call):
    """Places where a call may hide."""
    return {
        "data": published(data=call),
        "beside": published(prediction_model=call),
        "key": {call: 1, **published()},
        "alone": call,
        "in an array": published(data=np.array([call], object)),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("where", hostile(0))
def test_code_is_refused_and_does_not_run(convert, tmp_path, where, protocol):
    proof = tmp_path / "it-ran"
    written = pickle.dumps(hostile(Calls(os.system, f"touch {proof}"))[where], protocol)
    with pytest.raises(ValueError, match="damaged, or not the published pickle"):
        convert(written)
    assert not proof.exists()
    pickle.loads(written)  # which is what the file is meant for
    assert proof.exists()


@pytest.mark.parametrize(
    "call",
    [
        Calls(eval, "1"),
        Calls(getattr, "text", "upper"),
        Calls(pickle.loads, b"N."),
        Calls(np.load, "x.npy"),
        Calls(io.open, "x"),
        Calls(np.frombuffer, b"x"),
    ],
)
def test_nothing_else_is_called_either(convert, call):
    with pytest.raises(ValueError, match="it asks for"):
        convert(published(data=call))


def test_names_with_dots(convert):
    # In protocol 4 a name may walk from one attribute to the next.
    with pytest.raises(ValueError, match=r"it asks for numpy\.dtype\.newbyteorder"):
        convert(b"\x80\x04\x8c\x05numpy\x8c\x12dtype.newbyteorder\x93.")


def test_bytes_are_not_taken_for_objects(convert):
    """numpy itself, given this, reads a pointer out of the file."""
    dtype = Calls(np.dtype, "O8", False, True, state=(3, "|", *[None] * 3, -1, -1, 0))
    reconstruct = np.zeros(1).__reduce__()[0]
    state = (1, (1,), dtype, False, b"A" * 8)
    array = Calls(reconstruct, np.ndarray, (0,), b"b", state=state)
    with pytest.raises(ValueError, match="dtype 'O8'"):
        convert(published(data=array))


@pytest.mark.parametrize(
    "array",
    [np.array(["a"]), np.array([b"a"]), np.zeros(1, "M8[s]"), np.zeros(1, [("a", "u1")])],
)
def test_arrays_of_other_things(convert, array):
    with pytest.raises(ValueError, match="an array of dtype"):
        convert(published(index=array))


@pytest.mark.parametrize("state", [b"}U\x05valueK\x01s", b"(N}U\x05valueK\x01st"])
@pytest.mark.parametrize(
    "name", [b"numpy\ndtype", b"numpy\nndarray", b"numpy.core.multiarray\n_reconstruct"]
)
def test_it_cannot_change_the_reader(convert, name, state):
    with pytest.raises(ValueError, match="is damaged"):
        convert(b"\x80\x02c" + name + b"\n" + state + b"b.")
    assert len(convert(published())) == 12


def test_an_array_that_never_got_its_state(convert):
    with pytest.raises(ValueError, match="is damaged"):
        convert(b"\x80\x02}U\x04datacnumpy\nndarray\n)\x81s.")


# --- The command --------------------------------------------------------------------------------


def test_the_command(tmp_path):
    (tmp_path / "in.pickle").write_bytes(
        pickle.dumps(published(extrapolated_targets=np.arange(12)))
    )
    command = [sys.executable, "-m", "awp_optim.lab.tinyimages", tmp_path / "in.pickle"]
    done = subprocess.run(
        [*command, tmp_path / "out.npz"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "12 images" in done.stdout
    assert len(load_pseudo_labeled(tmp_path / "out.npz")) == 12
    (tmp_path / "in.pickle").write_bytes(b"text")
    done = subprocess.run(
        [*command, tmp_path / "2.npz"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
