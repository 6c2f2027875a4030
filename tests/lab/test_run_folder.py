"""What a run writes, and what it refuses to write over or to resume from."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from awp_optim.lab import tensorboard, trainer
from awp_optim.lab.lock import FolderLock
from awp_optim.lab.models import build_model
from awp_optim.lab.run_folder import best, read_metrics, reported
from awp_optim.lab.trainer import fit

pytestmark = pytest.mark.usefixtures("one_thread")


def content(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}


def begin(config, data, folder, epochs=1):
    """A run that was stopped after some epochs."""
    done = []
    return fit(config, data, folder, on_epoch=done.append, stop=lambda: len(done) == epochs)


def test_a_run_writes_its_folder(config, data, tmp_path):
    steps, epochs = [], []
    run = tmp_path / "run"
    model, rows = fit(config, data, run, on_step=lambda *s: steps.append(s), on_epoch=epochs.append)
    names = {p.name for p in run.iterdir()} - {"tensorboard"}
    assert names == {"best.pt", "best.safetensors", "config.json", "last.pt", "metrics.csv"}
    assert steps == [(i, 9) for i in range(1, 10)]
    assert epochs == rows
    about = json.loads((run / "config.json").read_text())
    assert (about["gamma"], about["dataset"], about["train_images"]) == (0.01, data.name, 60)
    for ours, read in zip(rows, read_metrics(run), strict=True):
        assert read.keys() == ours.keys()
        assert all(math.isclose(read[k], ours[k], rel_tol=1e-5, abs_tol=1e-9) for k in ours)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    last, top = (torch.load(run / name, weights_only=True) for name in ("last.pt", "best.pt"))
    for name, value in model.state_dict().items():
        assert torch.equal(last["model"][name], value)
    assert top["row"] == best(rows)
    loaded = build_model("preact_resnet_small", num_classes=10, in_channels=1)
    loaded.load_state_dict(top["model"])


def test_checkpoints_of_epochs_are_kept(config, data, tmp_path):
    config = replace(config, epochs=5, eval_every=5, save_every=2)
    fit(config, data, tmp_path / "run")
    kept = sorted(p.name for p in (tmp_path / "run").glob("epoch_*.pt"))
    assert kept == ["epoch_0002.pt", "epoch_0004.pt"]
    two = torch.load(tmp_path / "run/epoch_0002.pt", weights_only=True)
    assert two["row"]["epoch"] == 1
    shorter, _ = begin(config, data, tmp_path / "other", epochs=2)
    for name, value in shorter.state_dict().items():
        assert torch.equal(two["model"][name], value)


def test_best_prefers_held_out_images():
    rows = [
        {"epoch": 0, "test_robust_acc": 0.9, "val_robust_acc": 0.1},
        {"epoch": 1},
        {"epoch": 2, "test_robust_acc": 0.1, "val_robust_acc": 0.5},
        {"epoch": 3, "test_robust_acc": 0.8, "val_robust_acc": 0.5},
    ]
    assert best(rows)["epoch"] == 2
    assert best([{"epoch": 0, "test_robust_acc": 0.9}])["epoch"] == 0


def test_best_prefers_the_averaged_weights():
    rows = [
        {"epoch": 0, "test_robust_acc": 0.9, "ema_test_robust_acc": 0.1},
        {"epoch": 1},
        {"epoch": 2, "test_robust_acc": 0.1, "ema_test_robust_acc": 0.5},
        {"epoch": 3, "test_robust_acc": 0.8, "ema_test_robust_acc": 0.4},
    ]
    assert best(rows) is rows[2]
    for row, held_out in zip(rows, (0.2, None, 0.1, 0.3)):
        if held_out is not None:
            row |= {"val_robust_acc": 1 - held_out, "ema_val_robust_acc": held_out}
    assert best(rows) is rows[3]
    seen = reported({"epoch": 3, "lr": 0.1, "test_robust_acc": 0.8, "ema_test_robust_acc": 0.4})
    assert (seen["test_robust_acc"], seen["lr"]) == (0.4, 0.1)


# -------------------------------------------------------------------------------- what is refused


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(config, data, tmp_path):
    config = replace(config, epochs=1)
    fit(config, data, tmp_path)
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match="--resume"):
        fit(config, data, tmp_path)
    with pytest.raises(ValueError, match=r"gamma was 0\.01, is 0\.02"):
        fit(replace(config, gamma=0.02), data, tmp_path, resume=True)
    fit(config, data, tmp_path, resume=True)  # nothing left to do
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "damaged"),
        ("[1, 2]", "damaged"),
        ('{"gamma": 0.0', "damaged"),
        ('{"x": 1}', "does not belong to a run"),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_a_damaged_or_foreign_config_is_not_overwritten(config, data, tmp_path, text, match, begun):
    if begun:
        begin(config, data, tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json .*{match}"):
        fit(config, data, tmp_path, resume=True)
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "metrics.csv"])
def test_a_run_without_its_config_is_not_overwritten(config, data, tmp_path, name):
    (tmp_path / name).write_bytes(b"a run's")
    with pytest.raises(FileExistsError, match="--resume"):
        fit(config, data, tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        fit(config, data, tmp_path, resume=True)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_run_that_has_saved_nothing_takes_new_settings(config, data, tmp_path):
    fit(config, data, tmp_path, stop=lambda: True)
    with pytest.raises(FileExistsError):
        fit(config, data, tmp_path)
    fit(replace(config, lr=0.01, epochs=1), data, tmp_path, resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.01


def test_a_run_of_an_older_version_is_resumed_unless_it_used_what_is_gone(config, data, tmp_path):
    begin(config, data, tmp_path)
    file = tmp_path / "config.json"
    about = json.loads(file.read_text())
    for name in ("precision", "ascent", "mixup", "unlabeled_images", "init"):
        del about[name]
    for used, gone in (("interval", 4), ("ascent", "momentum"), ("direction", "momentum")):
        file.write_text(json.dumps({**about, "interval": 1, used: gone}))
        with pytest.raises(ValueError, match=f"{used} was {gone}, is"):
            fit(config, data, tmp_path, resume=True)
    file.write_text(json.dumps({**about, "interval": 1}))
    with pytest.raises(ValueError, match="precision was float32, is bfloat16"):
        fit(replace(config, precision="bfloat16"), data, tmp_path, resume=True)
    # last.pt repeats the settings, and held the state of the training step once.
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    last["config"]["interval"] = 1
    torch.save({**last, "step": {"steps": 3, "kept": {}}}, tmp_path / "last.pt")
    _, rows = fit(config, data, tmp_path, resume=True)
    assert len(rows) == config.epochs


def test_other_data_of_the_same_size_are_refused(config, data, tmp_path):
    config = replace(config, epochs=1)
    fit(config, data, tmp_path)
    changed = data.x_test.clone()
    changed[7, 0, 3, 3] ^= 1
    others = (
        replace(data, x_test=changed),
        replace(data, y_train=(data.y_train + 1) % 10),
        replace(data, x_train=data.x_train.flip(0), y_train=data.y_train.flip(0)),
    )
    for other in others:
        with pytest.raises(ValueError, match=r"data was .*, is"):
            fit(config, other, tmp_path, resume=True)
    fit(config, data, tmp_path, resume=True)


# ----------------------------------------------------------------------------- damaged checkpoints


def saving(content):
    return lambda file: torch.save(content, file)


def without(*path):
    """A checkpoint in which one part is None."""

    def damage(file):
        saved = part = torch.load(file, weights_only=True)
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = None
        torch.save(saved, file)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:1000]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("not a checkpoint"),
        saving([1, 2]),
        saving(torch.nn.Linear(1, 1)),
        saving({"model": {}, "optimizer": {}}),
        *(without(name) for name in ("model", "optimizer", "scheduler", "rows", "random")),
        *(without(name) for name in ("config", "ema", "epoch")),
        without("rows", 0),
        without("rows", 0, "epoch"),
        without("random", 1),
        without("epoch", "order"),
        without("epoch", "step"),
        without("model", "conv1.weight"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_a_clear_error(config, data, tmp_path, damage):
    config = replace(config, ema=0.5)
    asked = iter([False] * 8 + [True])
    fit(config, data, tmp_path, stop=lambda: next(asked))  # in the middle of the second epoch
    complete = (tmp_path / "last.pt").read_bytes()
    damage(tmp_path / "last.pt")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"last\.pt is not a checkpoint of this run") as raised:
        fit(config, data, tmp_path, resume=True)
    assert "weights_only" not in str(raised.value)  # no advice to load it without protection
    assert content(tmp_path) == before
    (tmp_path / "last.pt").write_bytes(complete)
    fit(config, data, tmp_path, resume=True)


def test_a_checkpoint_of_another_run_or_device_is_refused(config, data, tmp_path):
    config = replace(config, epochs=1)
    for name, c in (("ours", config), ("other", replace(config, seed=5, gamma=0.02))):
        fit(c, data, tmp_path / name)
    last = tmp_path / "ours/last.pt"
    saved = torch.load(last, weights_only=True)
    last.write_bytes((tmp_path / "other/last.pt").read_bytes())
    with pytest.raises(ValueError, match=r"gamma was 0\.02, is 0\.01, seed was 5, is 0"):
        fit(config, data, tmp_path / "ours", resume=True)
    torch.save({**saved, "device": "cuda"}, last)
    with pytest.raises(ValueError, match="the run was on cuda"):
        fit(config, data, tmp_path / "ours", resume=True)


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("no")])
def test_other_errors_are_not_called_damage(config, data, tmp_path, monkeypatch, error):
    fit(replace(config, epochs=1), data, tmp_path)

    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(type(error)):
        fit(replace(config, epochs=1), data, tmp_path, resume=True)


# ------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "metrics.csv"])
def test_a_file_is_never_half_written(config, data, tmp_path, monkeypatch, name):
    begin(config, data, tmp_path)
    before = content(tmp_path)
    replace_file = os.replace

    def failing(source, target):
        if target.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(trainer, "best", lambda rows: rows[-1])  # each epoch is the best
    with pytest.raises(OSError, match=rf"No space left.*{name}"):
        fit(config, data, tmp_path, resume=True)
    assert (tmp_path / name).read_bytes() == before[name]
    assert not list(tmp_path.glob(".*"))
    # What comes after a file is not written without it: no best epoch is forgotten.
    assert torch.load(tmp_path / "last.pt", weights_only=True)["rows"][-1]["epoch"] == 0
    monkeypatch.undo()
    _, rows = fit(config, data, tmp_path, resume=True)
    assert len(rows) == 3


def test_what_a_kill_left_is_mended(config, data, tmp_path):
    fit(config, data, tmp_path)
    metrics = tmp_path / "metrics.csv"
    complete = metrics.read_text()
    metrics.write_text("".join(complete.splitlines(keepends=True)[:-1]))
    (tmp_path / ".last.pt.1234.part").write_bytes(b"half")
    fit(config, data, tmp_path, resume=True)
    assert metrics.read_text() == complete
    assert not list(tmp_path.glob(".*"))


# --------------------------------------------------------------------------------------------- lock


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_has_one_run_at_a_time(config, data, tmp_path, resume):
    def second(row):
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on .* is running in"):
            fit(config, data, tmp_path / "run", resume=resume)

    _, rows = fit(config, data, tmp_path / "run", on_epoch=second)
    assert len(rows) == 3
    assert not list((tmp_path / "run").glob(".*"))


def test_a_killed_run_leaves_no_lock(tmp_path):
    hold = (
        "import pathlib, sys, time; from awp_optim.lab.lock import FolderLock; "
        "lock = FolderLock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"process {process.pid} on"):
            FolderLock(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    FolderLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------- TensorBoard


def logged(folder):
    """TensorBoard's own reading of its logs: values by tag and epoch."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_metrics(config, data, tmp_path):
    begin(config, data, tmp_path, epochs=2)
    time.sleep(1.1)  # the order of its files is that of their seconds
    fit(config, data, tmp_path, resume=True)
    logs = logged(tmp_path)
    for row in read_metrics(tmp_path):
        epoch = int(row["epoch"])
        assert logs["lr"][epoch] == pytest.approx(row["lr"])
        for name in ("acc", "loss"):
            expected = pytest.approx(row[f"test_robust_{name}"], rel=1e-4)
            assert logs[f"{name}/test_robust"][epoch] == expected


def test_logs_that_cannot_be_written_do_not_stop_a_run(config, data, tmp_path, monkeypatch):
    class Full:
        def add_scalar(self, *args):
            raise OSError(errno.ENOSPC, "No space left on device")

        close = add_scalar

    monkeypatch.setattr(tensorboard, "_open_writer", lambda *args: Full())
    with pytest.warns(RuntimeWarning, match="no more logs for TensorBoard.*No space") as warned:
        _, rows = fit(config, data, tmp_path)
    assert len(rows) == 3
    assert len(warned) == 1
