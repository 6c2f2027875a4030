"""Batches with images that stay in files: the same as from memory, on any number of ranks."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from awp_optim.lab.data import load_digits
from awp_optim.lab.distributed import TrainingRanks
from awp_optim.lab.pseudo import PseudoLabeled, load_pseudo_labeled
from awp_optim.lab.run_folder import read_metrics
from awp_optim.lab.trainer import fit
from awp_optim.lab.training_set import TrainingSet, describe_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.fixture(scope="module")
def more():
    """90 more digits, sorted by class as in published files."""
    rest = load_digits().split(90)[0]
    order = rest.y_train[:90].argsort(stable=True)
    return PseudoLabeled(rest.x_train[:90][order], rest.y_train[:90][order])


@pytest.fixture(params=["NHWC", "NCHW", "compressed"])
def files(request, tmp_path, more):
    """The same in two files."""
    x = more.x.numpy() if request.param == "NCHW" else more.x.permute(0, 2, 3, 1).numpy()
    save = np.savez_compressed if request.param == "compressed" else np.savez
    for name, part in (("a.npz", slice(0, 37)), ("b.npz", slice(37, 90))):
        save(tmp_path / name, image=x[part], label=more.y[part].numpy())
    return tmp_path / "a.npz", tmp_path / "b.npz"


@pytest.fixture
def config(config):
    return replace(config, epochs=2, mixup=1.4, unlabeled_share=0.7, method="rst")


def epoch(config, data, unlabeled, ranks=None, first=0):
    """The batches of the first epoch."""
    torch.manual_seed(0)
    images = TrainingSet(config, data, unlabeled, ranks or TrainingRanks())
    return list(images.batches(images.shuffle(), first))


def equal(batches, others):
    assert len(batches) == len(others) > 0
    return all(torch.equal(a, b) for x, y in zip(batches, others) for a, b in zip(x, y))


@pytest.mark.parametrize("augment", [True, False])
def test_batches_from_files_are_those_from_memory(config, data, more, files, augment):
    config = replace(config, augment=augment, mixup=0.0)
    batches = epoch(config, data, load_pseudo_labeled(*files))
    assert equal(batches, epoch(config, data, more))
    if not augment:  # the labels belong to the images
        truth = {
            bytes(x.flatten().tolist()): int(y)
            for xs, ys in ((data.x_train, data.y_train), (more.x, more.y))
            for x, y in zip(xs, ys)
        }
        for x, _, y in batches:
            shown = [truth[bytes(i.flatten().tolist())] for i in (x * 255).round().byte()]
            assert shown == y.tolist()
        # All classes in every batch, although the files are sorted.
        assert min(len(y.unique()) for _, _, y in batches) > 5


def test_a_run_is_the_same_and_has_the_same_identity(config, data, more, files, tmp_path):
    stored = load_pseudo_labeled(*files)
    model, rows = fit(config, data, tmp_path / "memory", unlabeled=more)
    again, rows_again = fit(config, data, tmp_path / "files", unlabeled=stored)
    pairs = zip(model.state_dict().values(), again.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    assert rows[-1]["step_robust_loss"] == rows_again[-1]["step_robust_loss"]
    about = describe_inputs(data, stored, None)
    assert about == describe_inputs(data, more, None)
    assert about["unlabeled_images"] == 90
    backwards = load_pseudo_labeled(*files[::-1])
    assert describe_inputs(data, backwards, None)["data"] != about["data"]
    other = PseudoLabeled(more.x, (more.y + (torch.arange(90) == 50)) % 10)
    assert describe_inputs(data, other, None)["data"] != about["data"]


@pytest.mark.parametrize("stop_at", [2, 3, 5, 7])
def test_a_stopped_run_resumes_although_images_were_read_ahead(
    config, data, files, tmp_path, stop_at
):
    def run(folder, **options):
        return fit(
            config, data, tmp_path / folder, unlabeled=load_pseudo_labeled(*files), **options
        )

    model, _ = run("one")
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == stop_at

    run("parts", stop=stop)
    torch.manual_seed(77)
    resumed, _ = run("parts", resume=True)
    pairs = zip(model.state_dict().values(), resumed.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    ours, theirs = (
        [{k: v for k, v in row.items() if "seconds" not in k} for row in read_metrics(tmp_path / f)]
        for f in ("one", "parts")
    )
    assert ours == theirs


def test_a_file_that_fails_ends_the_run_with_its_error(config, data, files):
    stored = load_pseudo_labeled(*files)

    def shrink(done, steps):
        for file in files[0].parent.glob("b*"):
            os.truncate(file, 300)

    with pytest.raises(OSError, match=r"b.*become shorter"):
        fit(replace(config, epochs=9), data, unlabeled=stored, on_step=shrink)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_with_a_run_that_fails(config, data, files, error):
    def fail(done, steps):
        raise error

    with pytest.raises(error):
        fit(config, data, unlabeled=load_pseudo_labeled(*files), on_step=fail)


# --- Several processes ------------------------------------------------------------------------


class OneOf(TrainingRanks):
    """One of several ranks; the rows of the others come from a complete source."""

    def __init__(self, rank, world, complete):
        super().__init__()
        self.rank, self.world, self.complete, self.given = rank, world, complete, []

    def assemble(self, rows, n):
        self.given.append(rows.clone())
        return next(self.complete)


def record_reads(images, monkeypatch):
    """How many images are read at a time, as a list that grows."""
    asked, read = [], images.read

    def recorded(index, out):
        asked.append(len(index))
        return read(index, out)

    monkeypatch.setattr(images, "read", recorded)
    return asked


@pytest.mark.parametrize("world", [2, 3, 25])
def test_each_rank_reads_its_share_alone(config, data, more, files, world, monkeypatch):
    config = replace(config, augment=False, mixup=0.0)
    alone = epoch(config, data, more)
    n = 17  # of 24
    given = []
    for rank in range(world):
        stored = load_pseudo_labeled(*files)
        asked = record_reads(stored.x, monkeypatch)
        ranks = OneOf(rank, world, iter([(x[-n:] * 255).round().byte() for x, _, _ in alone]))
        assert equal(epoch(config, data, stored, ranks), alone)
        assert asked == [n * (rank + 1) // world - n * rank // world] * 3
        given.append(ranks.given)
    for (x, _, _), rows in zip(alone, zip(*given)):
        assert torch.equal(torch.cat(rows).float() / 255, x[-n:])


@pytest.mark.parametrize(
    ("labels", "channels", "message"),
    [
        (np.array([0, 10, 1]), 1, r"b\.npz go up to 10, but digits has 10 classes"),
        (np.array([0, -1, 1]), 1, r"b\.npz: label must hold labels from 0, not -1"),
        (np.array([0, 1]), 1, r"b\.npz has 3 images and 2 labels"),
        (np.array([0, 1, 2.5]), 1, r"b\.npz: label must be integers"),
        (np.array([0, 1, 2]), 3, r"b\.npz has images of"),
        (None, 1, r"b\.npz has no labels"),
    ],
)
def test_bad_files_are_named_before_training(config, data, tmp_path, labels, channels, message):
    np.savez(tmp_path / "a.npz", image=np.zeros((4, 8, 8, 1), np.uint8), label=np.arange(4))
    x = np.zeros((3, 8, 8, channels), np.uint8)
    np.savez(tmp_path / "b.npz", image=x, **({} if labels is None else {"label": labels}))
    with pytest.raises(ValueError, match=message):
        fit(
            config,
            data,
            tmp_path / "run",
            unlabeled=load_pseudo_labeled(tmp_path / "a.npz", tmp_path / "b.npz"),
        )
    assert not (tmp_path / "run").exists()
