"""Pseudo-labels: what a classifier says, and files in the genuine layouts, hostile ones among them.

The independent truths are a linear classifier in float64, and pickle and numpy themselves.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import pickle
import struct
import warnings

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
    load_labels,
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
            (images(2), torch.tensor([3, -2]), "labels from 0 on, not -2"),
        ],
    )
    def test_bad_fields(self, x, y, message):
        with pytest.raises(ValueError, match=message):
            PseudoLabeled(x, y)

    def test_it_is_frozen_and_has_a_length(self):
        assert len(some(20)) == 20
        with pytest.raises(dataclasses.FrozenInstanceError):
            some().x = images()

    def test_limit(self):
        whole = some()
        part = whole.limit(6)
        index = part.x[:, 0, 0, 0].long()
        assert torch.equal(part.y, whole.y[index])
        assert len(index.unique()) == 6
        assert index.tolist() != list(range(6))
        assert torch.equal(whole.limit(15).x[:6], part.x)
        assert not torch.equal(whole.limit(6, seed=1).x, part.x)
        for n in (0, 21):
            with pytest.raises(ValueError, match=f"between 1 and 20, not {n}"):
                whole.limit(n)

    def test_check_fits(self):
        some().check_fits(data_of(images(), 4))
        with pytest.raises(ValueError, match="go up to 3, but mine has 3 classes"):
            some().check_fits(data_of(images(), 3))
        for x in (images()[:, :1], images()[:, :, :5], images()[..., :4]):
            with pytest.raises(ValueError, match=r"of shape \(3, 6, 5\) .* those of mine of \("):
                some().check_fits(data_of(x, 4))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_to_cuda(self):
        moved = some().to("cuda")
        assert moved.x.is_cuda
        assert moved.y.is_cuda
        assert torch.equal(moved.limit(6).x.cpu(), some().limit(6).x)


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
        model, x = Linear(), images()
        y, confidence = model.truth(x)
        least = float(np.sort(confidence)[9:11].mean())
        kept = confidence >= least
        labeled = pseudo_label(model, x, min_confidence=least)
        assert len(labeled) == kept.sum() == 20
        assert torch.equal(labeled.x, x[torch.from_numpy(kept)])
        assert labeled.y.tolist() == y[kept].tolist()

    def test_as_confident_as_asked_is_enough(self):
        half = answering(torch.zeros(30, 2))  # each class has exactly 1/2, and the first is taken
        assert pseudo_label(half, images(), min_confidence=0.5).y.tolist() == [0] * 30
        assert confident(torch.tensor([0.5, 0.25]), 0.5).tolist() == [True, False]
        with pytest.raises(ValueError, match=r"below 0\.51 for all 30 images, at most 0\.5;"):
            pseudo_label(half, images(), min_confidence=0.51)

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
            (answering(torch.zeros(30)), r"shape \(N, classes\), .* not \(7,\) for 7 images"),
            (answering(torch.zeros(30, 1)), r"of 2 classes or more, not \(7, 1\)"),
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
            (images(), {"min_confidence": 1.01}, r"must be in \[0, 1\], not 1\.01"),
            (images(), {"min_confidence": -0.1}, r"must be in \[0, 1\]"),
            (images(), {"min_confidence": float("nan")}, r"must be in \[0, 1\], not nan"),
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


# --- Pickles ----------------------------------------------------------------------------------


def published(n=12, **changes):
    """The layout of ti_500K_pseudo_labeled.pickle, with what it has beside."""
    entries = {
        "data": noise(n, 32, 32, 3),
        "extrapolated_targets": np.random.default_rng(1).integers(0, 10, n),
        "prediction_model": "cifar10-vanilla/checkpoint-epoch200.pt",
        "index": np.arange(n, dtype=np.int32),
    }
    return {key: value for key, value in (entries | changes).items() if value is not None}


def put(path, content, protocol=4):
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


def with_old_names(content):
    """A pickle of one frame, as numpy before 2.0 would have written it."""
    for module in (b"multiarray", b"numeric"):
        new, old = b"numpy._core." + module, b"numpy.core." + module
        content = content.replace(
            b"\x8c" + bytes([len(new)]) + new, b"\x8c" + bytes([len(old)]) + old
        )
        content = content.replace(b"c" + new, b"c" + old)
    if content[2:3] == b"\x95":
        content = content[:3] + struct.pack("<Q", len(content) - 11) + content[11:]
    return content


def python2(x, y):
    """As cPickle of Python 2 writes it in protocol 2: bytes and names are strings of one kind."""

    def string(text):
        return b"T" + struct.pack("<i", len(text)) + text

    def array(a, code):
        shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in a.shape) + b"t"
        dtype = b"cnumpy\ndtype\n" + string(code) + b"K\x00K\x01\x87R(K\x03" + string(b"<")
        dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        new = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b")
        return new + b"\x87R(K\x01" + shape + dtype + b"\x89" + string(a.tobytes()) + b"tb"

    entries = string(b"data") + array(x, b"u1")
    entries += string(b"extrapolated_targets") + array(y, b"i8")
    return b"\x80\x02}(" + entries + b"u."


def check_published(labeled, content):
    assert torch.equal(labeled.x, torch.from_numpy(content["data"]).permute(0, 3, 1, 2))
    assert labeled.x.is_contiguous()
    assert labeled.y.tolist() == list(content["extrapolated_targets"])


class TestPickle:
    @pytest.mark.parametrize("names", ["new", "old"])
    @pytest.mark.parametrize("protocol", range(6))
    def test_the_published_layout(self, tmp_path, protocol, names):
        content = published()
        written = pickle.dumps(content, protocol)
        written = with_old_names(written) if names == "old" else written
        path = put(tmp_path / "ti_500K_pseudo_labeled.pickle", written)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_published(load_pseudo_labeled(path), content)
            assert torch.equal(load_images(path), load_pseudo_labeled(str(path)).x)
        if names == "old":
            assert b"numpy._core" not in written
            with warnings.catch_warnings():  # still a pickle that numpy reads
                warnings.simplefilter("ignore")
                assert np.array_equal(pickle.loads(written)["data"], content["data"])

    def test_of_python_2(self, tmp_path):
        content = published(prediction_model=None, index=None)
        written = python2(content["data"], content["extrapolated_targets"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = pickle.loads(written, encoding="latin1")
        assert np.array_equal(reference["data"], content["data"])
        check_published(load_pseudo_labeled(put(tmp_path / "p.pickle", written)), content)

    @pytest.mark.parametrize("protocol", [2, 4, 5])
    @pytest.mark.parametrize(
        "targets",
        [
            [3, 1, 0, 2] * 3,
            (3, 1, 0, 2) * 3,
            [np.int64(3), np.int64(1), np.uint8(0), np.int32(2)] * 3,
            np.array([3, 1, 0, 2] * 3, np.uint8),
            np.array([3, 1, 0, 2] * 3, ">i4"),
            np.arange(24)[::-2] // 6,
        ],
    )
    def test_targets(self, tmp_path, targets, protocol):
        path = put(tmp_path / "p.pickle", published(extrapolated_targets=targets), protocol)
        assert load_pseudo_labeled(path).y.tolist() == [int(y) for y in targets]

    @pytest.mark.parametrize("protocol", [2, 4, 5])
    @pytest.mark.parametrize(
        "data",
        [
            noise(12, 3, 32, 32),
            np.asfortranarray(noise(12, 32, 32, 3)),
            noise(12, 3, 32, 32).transpose(0, 2, 3, 1),
            noise(12, 32, 3, 32).transpose(2, 0, 3, 1)[:12],
            noise(12, 8, 8, 1),
        ],
    )
    def test_images(self, tmp_path, data, protocol):
        path = put(tmp_path / "p.pickle", published(len(data), data=data), protocol)
        expected = torch.from_numpy(np.ascontiguousarray(data))
        if data.shape[1] > data.shape[3]:
            expected = expected.permute(0, 3, 1, 2)
        x = load_images(path)
        assert torch.equal(x, expected)
        x.zero_()  # they are the caller's own, not the file's bytes

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"data": None}, "has no images, x or data; it has extrapolated_targets, prediction_m"),
            (
                {"extrapolated_targets": None},
                r"has no labels, y or extrapolated_targets; it has data, .* examples/pseudo_label",
            ),
            ({"data": noise(12, 32, 32, 3) / 255}, "data is float64; it must be uint8"),
            ({"data": noise(12, 3072)}, r"data must be .* not \(12, 3072\)"),
            ({"data": "images.npy"}, "data is <U10; it must be uint8"),
            ({"data": {"x": 1}}, "data is object; it must be uint8"),
            ({"extrapolated_targets": np.arange(11)}, r"y must be int64 of shape \(12,\), .*\(11"),
            ({"extrapolated_targets": np.zeros(12)}, "targets must be integers .* not float64"),
            ({"extrapolated_targets": ["cat"] * 12}, "targets must be integers"),
            ({"extrapolated_targets": [[1], [1, 2]]}, "extrapolated_targets cannot be read"),
            ({"extrapolated_targets": [-1] * 12}, "labels from 0 on, not -1 to -1"),
            ({"extrapolated_targets": [True] * 12}, "must be integers .* not bool"),
        ],
    )
    def test_bad_content(self, tmp_path, changes, message):
        path = put(tmp_path / "bad.pickle", published(**changes))
        with pytest.raises(ValueError, match=message) as error:
            load_pseudo_labeled(path)
        assert str(path) in str(error.value)

    def test_not_a_dict(self, tmp_path):
        with pytest.raises(ValueError, match="is a pickle of list; it must be a dict"):
            load_pseudo_labeled(put(tmp_path / "p.pickle", [1, 2]))

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_truncated(self, tmp_path, protocol):
        whole = pickle.dumps(published(), protocol)
        for part in (0.0, 1e-4, 0.01, 0.5, 0.99):
            path = put(tmp_path / "cut.pickle", whole[: int(part * len(whole))])
            with pytest.raises(ValueError, match=r"cut\.pickle cannot be read as an \.npz, \.npy"):
                load_pseudo_labeled(path)
        with pytest.raises(ValueError, match="cannot be read"):
            load_pseudo_labeled(put(tmp_path / "cut.pickle", whole[:-1]))

    def test_a_state_that_does_not_fit(self, tmp_path):
        # The bytes of 12 images under the shape of 13.
        whole = pickle.dumps(published(data=noise(12, 32, 32, 3)), 2)
        changed = whole.replace(b"(K\x0cK K K\x03t", b"(K\x0dK K K\x03t")
        assert changed != whole
        with pytest.raises(ValueError, match="cannot reshape"):
            load_pseudo_labeled(put(tmp_path / "p.pickle", changed))


class Calls:
    """What, unpickled, is a call."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def hostile(call):
    """Places where a call may hide."""
    return {
        "data": published(data=call),
        "targets": published(extrapolated_targets=[1] * 11 + [call]),
        "beside": published(prediction_model=call),
        "key": {call: 1, **published()},
        "alone": call,
        "in an array": published(data=np.array([call], object)),
    }


STAND_INS = [
    b"numpy\ndtype",
    b"numpy\nndarray",
    b"_codecs\nencode",
    b"numpy.core.multiarray\n_reconstruct",
    b"numpy._core.multiarray\nscalar",
    b"numpy._core.numeric\n_frombuffer",
]


class TestHostilePickle:
    @pytest.mark.parametrize("protocol", [2, 4, 5])
    @pytest.mark.parametrize("where", hostile(0))
    def test_it_is_refused_and_does_not_run(self, tmp_path, where, protocol):
        proof = tmp_path / "it-ran"
        content = hostile(Calls(os.system, f"touch {proof}"))[where]
        written = pickle.dumps(content, protocol)
        path = put(tmp_path / "evil.pickle", written)
        for load in (load_pseudo_labeled, load_images, load_labels):
            with pytest.raises(ValueError, match=rf"evil\.pickle .*({os.name}\.system|dtype 'O8')"):
                load(path)
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
            Calls(np.lib.npyio.NpzFile, "x"),
        ],
    )
    def test_nothing_else_is_called_either(self, tmp_path, call):
        with pytest.raises(ValueError, match="it asks for"):
            load_pseudo_labeled(put(tmp_path / "evil.pickle", published(data=call)))

    def test_names_with_dots(self, tmp_path):
        # In protocol 4 a name may walk from one attribute to the next.
        written = b"\x80\x04\x8c\x05numpy\x8c\x12dtype.newbyteorder\x93."

        with pytest.raises(ValueError, match=r"it asks for numpy\.dtype\.newbyteorder"):
            load_pseudo_labeled(put(tmp_path / "evil.pickle", written))

    def test_other_codecs(self, tmp_path):
        import _codecs

        content = published(data=Calls(_codecs.encode, "abc", "rot13"))
        with pytest.raises(ValueError, match="bytes in the encoding 'rot13'"):
            load_pseudo_labeled(put(tmp_path / "evil.pickle", content))

    def test_bytes_are_not_taken_for_objects(self, tmp_path):
        """numpy itself, given this, reads a pointer out of the file."""
        dtype = Calls(np.dtype, "O8", False, True, state=(3, "|", *[None] * 3, -1, -1, 0))
        reconstruct = np.zeros(1).__reduce__()[0]
        state = (1, (1,), dtype, False, b"A" * 8)
        array = Calls(reconstruct, np.ndarray, (0,), b"b", state=state)
        with pytest.raises(ValueError, match="an array of dtype 'O8'; they must be of numbers"):
            load_pseudo_labeled(put(tmp_path / "evil.pickle", published(data=array)))

    @pytest.mark.parametrize(
        "array",
        [np.array(["a"]), np.array([b"a"]), np.zeros(1, "M8[s]"), np.zeros(1, [("a", "u1")])],
    )
    def test_arrays_of_other_things(self, tmp_path, array):
        with pytest.raises(ValueError, match="an array of dtype"):
            load_pseudo_labeled(put(tmp_path / "p.pickle", published(index=array)))

    @pytest.mark.parametrize("state", [b"}U\x05_fillK\x01s", b"(N}U\x05_fillK\x01st"])
    @pytest.mark.parametrize("name", STAND_INS)
    def test_it_cannot_change_the_reader(self, tmp_path, name, state):
        written = b"\x80\x02c" + name + b"\n" + state + b"b."
        with pytest.raises(ValueError, match="cannot be read"):
            load_pseudo_labeled(put(tmp_path / "evil.pickle", written))
        for protocol in (2, 5):
            content = published()
            path = put(tmp_path / "good.pickle", content, protocol)
            check_published(load_pseudo_labeled(path), content)

    def test_bytes_have_no_state(self, tmp_path):
        written = b"\x80\x02c_codecs\nencode\n(U\x01aU\x06latin1tR}b."
        with pytest.raises(ValueError, match="bytes have no state"):
            load_images(put(tmp_path / "evil.pickle", written))

    def test_an_array_that_never_got_its_state(self, tmp_path):
        written = b"\x80\x02}U\x04datacnumpy\nndarray\n)\x81s."
        with pytest.raises(ValueError, match="data cannot be read"):
            load_images(put(tmp_path / "evil.pickle", written))


# --- .npz and .npy ----------------------------------------------------------------------------


class TestNumpyFiles:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    @pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
    def test_npz(self, tmp_path, layout, save):
        x, y = noise(6, 3, 7, 5), np.array([3, 0, 1, 2, 2, 9], np.uint8)
        given = x.transpose(0, 2, 3, 1) if layout == "NHWC" else x
        save(tmp_path / "p.npz", x=given, y=y, note=np.array("made by hand"))
        labeled = load_pseudo_labeled(tmp_path / "p.npz")
        assert torch.equal(labeled.x, torch.from_numpy(x))
        assert labeled.y.tolist() == y.tolist()
        assert torch.equal(load_images(tmp_path / "p.npz"), labeled.x)
        assert load_labels(tmp_path / "p.npz").tolist() == y.tolist()

    @pytest.mark.parametrize("name", ["x", "data", "anything"])
    def test_images_of_npz(self, tmp_path, name):
        x = noise(6, 3, 7, 5)
        np.savez(tmp_path / "x.npz", **{name: x})
        assert torch.equal(load_images(tmp_path / "x.npz"), torch.from_numpy(x))
        assert load_labels(tmp_path / "x.npz") is None
        with pytest.raises(ValueError, match=rf"x\.npz has no labels, .* it has {name}\. Have a"):
            load_pseudo_labeled(tmp_path / "x.npz")

    def test_which_array(self, tmp_path):
        np.savez(tmp_path / "two.npz", a=noise(6, 3, 7, 5), b=noise(6, 3, 7, 5))
        with pytest.raises(ValueError, match=r"two\.npz has no images, x or data; it has a, b"):
            load_images(tmp_path / "two.npz")
        np.savez(tmp_path / "y.npz", y=np.arange(6))
        with pytest.raises(ValueError, match=r"y\.npz has no images, x or data; it has y"):
            load_images(tmp_path / "y.npz")

    def test_broken_labels_do_not_matter_to_images(self, tmp_path):
        np.savez(tmp_path / "x.npz", x=noise(6, 3, 7, 5), y=np.array(["a", None], object))
        assert len(load_images(tmp_path / "x.npz")) == 6
        for load in (load_labels, load_pseudo_labeled):
            with pytest.raises(ValueError, match=r"x\.npz: y cannot be read: .*allow_pickle"):
                load(tmp_path / "x.npz")

    def test_npy(self, tmp_path):
        x = noise(6, 7, 5, 3)
        np.save(tmp_path / "x.npy", x)
        expected = torch.from_numpy(x).permute(0, 3, 1, 2)
        assert torch.equal(load_images(tmp_path / "x.npy"), expected)
        assert load_labels(tmp_path / "x.npy") is None
        with pytest.raises(ValueError, match=r"x\.npy has no labels.*pseudo_label\.py --images"):
            load_pseudo_labeled(tmp_path / "x.npy")
        np.save(tmp_path / "o.npy", np.array([Calls(os.system, "true")]), allow_pickle=True)
        with pytest.raises(ValueError, match="allow_pickle=False"):
            load_images(tmp_path / "o.npy")

    def test_the_name_does_not_matter(self, tmp_path):
        np.savez(tmp_path / "p.npz", x=noise(6, 3, 7, 5), y=np.arange(6))
        os.rename(tmp_path / "p.npz", tmp_path / "p.pickle")
        assert len(load_pseudo_labeled(tmp_path / "p.pickle")) == 6

    def test_bad_files(self, tmp_path):
        path = tmp_path / "file.npz"
        np.savez(path, x=noise(6, 3, 7, 5), y=np.arange(6))
        whole = path.read_bytes()
        for content in (b"", b"text", b"PK", whole[: len(whole) // 2]):
            put(path, content)
            for load in (load_pseudo_labeled, load_images, load_labels):
                with pytest.raises(ValueError, match=r"file\.npz cannot be read as an \.npz"):
                    load(path)
        flipped = bytearray(whole)
        flipped[len(whole) // 4] ^= 255  # inside x, which a checksum of the archive covers
        put(path, bytes(flipped))
        with pytest.raises(ValueError, match=r"file\.npz: x cannot be read: BadZipFile"):
            load_images(path)
        np.save(tmp_path / "x.npy", noise(6, 3, 7, 5))
        cut = put(tmp_path / "x.npy", (tmp_path / "x.npy").read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"x\.npy cannot be read"):
            load_images(cut)
        with pytest.raises(FileNotFoundError):
            load_images(tmp_path / "none.npz")
        with pytest.raises(IsADirectoryError):
            load_images(tmp_path)


class TestSave:
    def test_it_comes_back(self, tmp_path):
        labeled = PseudoLabeled(images(), torch.arange(30) % 7)
        path = tmp_path / "new" / "folder" / "p.npz"
        save_pseudo_labeled(labeled, path)
        again = load_pseudo_labeled(path)
        assert torch.equal(again.x, labeled.x)
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
        assert torch.equal(load_pseudo_labeled(tmp_path / "p.npz").x, images()[::3])

    def test_who_reads_the_old_file_goes_on_with_it(self, tmp_path):
        path = tmp_path / "p.npz"
        save_pseudo_labeled(some(5), path)
        with np.load(path) as old:
            save_pseudo_labeled(some(6), path)
            assert np.array_equal(old["x"], some(5).x)
        assert len(load_pseudo_labeled(path)) == 6

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
            (PseudoLabeled(images()[..., :3], some(30).y), r"\(30, 3, 6, 3\) cannot be saved"),
            (PseudoLabeled(images(0), some(0).y), "no images to save"),
        ],
    )
    def test_what_could_not_be_read_back_is_not_written(self, tmp_path, labeled, message):
        with pytest.raises(ValueError, match=message):
            save_pseudo_labeled(labeled, tmp_path / "p.npz")
        assert not list(tmp_path.iterdir())
