"""Many runs: in order, side by side, on a cluster, kept in a file; and what a failure leaves."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from awp_optim.lab import sweep as module
from awp_optim.lab.config import Config
from awp_optim.lab.data import load_digits
from awp_optim.lab.sweep import RunFailed, sweep
from awp_optim.lab.trainer import fit

CONFIGS = {f"run {seed}": Config(seed=seed) for seed in range(3)}


def quiet():
    return Console(file=io.StringIO(), width=100)


class Train:
    """Remembers what it was asked to train."""

    def __init__(self, fails_on=()):
        self.trained = []
        self.fails_on = fails_on

    def __call__(self, config, report):
        if config.seed in self.fails_on:
            raise FloatingPointError("the loss is not finite")
        self.trained.append(config)
        report(1, 2)
        report(2, 2)
        return rows_of(config)


def rows_of(config):
    return [{"epoch": 0.0, "test_robust_acc": config.seed / 7 + config.gamma}]


def run(configs, train, file=None, **kwargs):
    return sweep(configs, train, file=file, workers=1, console=quiet(), **kwargs)


def test_one_worker_trains_in_order_in_this_process():
    train = Train()
    found = run(CONFIGS, train)
    assert train.trained == list(CONFIGS.values())
    assert found == {name: rows_of(config) for name, config in CONFIGS.items()}
    assert list(found) == list(CONFIGS)


def test_equal_settings_are_trained_once():
    train = Train()
    found = run({"a": Config(), "b": Config(seed=1), "c": Config()}, train)
    assert train.trained == [Config(), Config(seed=1)]
    assert found["a"] == found["c"] == rows_of(Config())
    assert list(found) == ["a", "b", "c"]


def test_continues_with_what_the_file_has(tmp_path):
    file = tmp_path / "folder" / "runs.json"
    first = run({"run 1": CONFIGS["run 1"]}, Train(), file)
    train = Train()
    found = run(CONFIGS, train, file)
    assert [config.seed for config in train.trained] == [0, 2]
    assert list(found) == list(CONFIGS)
    assert found["run 1"] == first["run 1"]
    again = Train()
    assert run(CONFIGS, again, file) == found  # numbers come back as they were
    assert again.trained == []
    assert run({}, Train(), file) == {}
    assert [p.name for p in file.parent.iterdir()] == ["runs.json"]


def test_other_settings_are_trained_and_the_old_ones_kept(tmp_path):
    file = tmp_path / "runs.json"
    before = run(CONFIGS, Train(), file)
    train = Train()
    changed = CONFIGS | {"run 1": replace(CONFIGS["run 1"], gamma=0.01)}
    after = run(changed, train, file)
    assert train.trained == [changed["run 1"]]
    assert after["run 1"] == rows_of(changed["run 1"]) != before["run 1"]
    again = Train()
    assert run(CONFIGS, again, file) == before
    assert again.trained == []


def test_other_data_are_other_runs(tmp_path):
    file = tmp_path / "runs.json"
    run(CONFIGS, Train(), file, about={"images": 450, "shape": (8, 8)})
    same, other = Train(), Train()
    run(CONFIGS, same, file, about={"images": 450, "shape": (8, 8)})
    run(CONFIGS, other, file, about={"images": 64, "shape": (8, 8)})
    assert same.trained == []
    assert len(other.trained) == 3


def test_a_file_older_than_a_setting_had_its_default(tmp_path):
    file = tmp_path / "runs.json"
    run(CONFIGS, Train(), file)
    content = json.loads(file.read_text())
    for saved in content["runs"]:
        del saved["config"]["mixup"]
    file.write_text(json.dumps(content))
    train = Train()
    mixed = replace(CONFIGS["run 0"], mixup=1.4)
    run(CONFIGS | {"mixed": mixed}, train, file)
    assert train.trained == [mixed]


def test_every_run_is_in_the_file_at_once(tmp_path):
    file = tmp_path / "runs.json"
    seen = []

    def train(config, report):
        names = [r["name"] for r in json.loads(file.read_text())["runs"]] if file.exists() else []
        seen.append(names)
        return rows_of(config)

    run(CONFIGS, train, file)
    assert seen == [[], ["run 0"], ["run 0", "run 1"]]


def test_a_run_that_fails_is_named_and_the_others_kept(tmp_path):
    file = tmp_path / "runs.json"
    with pytest.raises(RunFailed, match=r"'run 1' failed: FloatingPointError: the loss") as info:
        run(CONFIGS, Train(fails_on=[1]), file)
    assert isinstance(info.value.__cause__, FloatingPointError)
    train = Train()
    run(CONFIGS, train, file)
    assert [config.seed for config in train.trained] == [1, 2]


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"epochs": 3}',
        '{"runs": [{"name": "run 0", "config": {}}]}',
        '{"runs": [{"name": "run 0", "config": {}, "rows": [3]}]}',
        '{"runs": [3]}',
    ],
)
def test_a_damaged_file_is_an_error_and_left_alone(tmp_path, content):
    file = tmp_path / "runs.json"
    file.write_text(content)
    train = Train()
    with pytest.raises(ValueError, match=r"runs.json is damaged"):
        run(CONFIGS, train, file)
    assert train.trained == []
    assert file.read_text() == content


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "runs.json"
    run({"run 0": CONFIGS["run 0"]}, Train(), file)
    before = file.read_text()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*runs.json"):
        run(CONFIGS, Train(), file)
    assert file.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["runs.json"]


def test_no_pool_of_processes(monkeypatch):
    def no_memory(*args):
        raise OSError("no /dev/shm")

    monkeypatch.setattr(module, "ProcessPoolExecutor", no_memory)
    with pytest.raises(OSError, match="no /dev/shm"):
        sweep(CONFIGS, Train(), workers=2, console=quiet())


def test_no_workers():
    with pytest.raises(ValueError, match="workers"):
        sweep(CONFIGS, Train(), workers=0)


def test_bars(tmp_path):
    console = quiet()
    configs = {f"run {seed:02}": Config(seed=seed) for seed in range(10)}
    file = tmp_path / "runs.json"
    run(dict(list(configs.items())[:1]), Train(), file)
    sweep(configs, Train(), file=file, workers=1, console=console)
    shown = console.file.getvalue()
    assert "10 of 10 runs" in shown
    assert "18/18 steps" in shown  # one was there before
    assert "run 01" not in shown  # only those that are running have bars


# --- In other processes -----------------------------------------------------------------------

TRAINS = '''
import os
import time
import torch


class Odd(Exception):
    def __init__(self, one, two):  # cannot be sent from one process to another
        super().__init__(f"{one} and {two}")


def train(config, report):
    if config.seed == 0:
        time.sleep(0.5)
    report(1, 1)
    threads = torch.get_num_threads()
    return [{"epoch": 0.0, "seed": config.seed, "pid": os.getpid(), "threads": threads}]


def wait_for(config):
    """For a run that has finished, so that the order is certain."""
    while not os.path.exists(config.arch):
        time.sleep(0.02)


def fail(config, report):
    if config.seed == 0:
        return []
    if config.seed == 2:
        wait_for(config)
        raise Odd("this", "that")
    while True:
        time.sleep(0.05)


def die(config, report):
    if config.seed == 2:
        wait_for(config)
        os._exit(3)
    return fail(config, report)
'''


@pytest.fixture
def trains(tmp_path, monkeypatch):
    """Functions in a module that other processes can import, too."""
    (tmp_path / "trains_of_sweep.py").write_text(TRAINS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trains_of_sweep", raising=False)
    import trains_of_sweep

    return trains_of_sweep


def test_side_by_side(trains, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_cores", lambda: 7)
    file, threads = tmp_path / "runs.json", torch.get_num_threads()
    found = sweep(CONFIGS, trains.train, workers=2, file=file, console=quiet())
    assert list(found) == list(CONFIGS)
    rows = [found[name][0] for name in CONFIGS]
    assert [row["seed"] for row in rows] == [0, 1, 2]
    assert os.getpid() not in {row["pid"] for row in rows}
    assert {row["threads"] for row in rows} == {3}
    assert torch.get_num_threads() == threads
    saved = [saved["name"] for saved in json.loads(file.read_text())["runs"]]
    assert sorted(saved) == sorted(CONFIGS)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fail", "'run 2' failed: Odd: this and that"),
        ("die", "one of 'run 1', 'run 2' failed: its process ended"),
    ],
)
def test_a_failure_elsewhere_ends_the_others(trains, tmp_path, name, message):
    file = tmp_path / "runs.json"
    # The third run waits until the first is in the file; the second would never end.
    configs = {n: replace(config, arch=str(file)) for n, config in CONFIGS.items()}
    with pytest.raises(RunFailed, match=message) as info:
        sweep(configs, getattr(trains, name), workers=3, file=file, console=quiet())
    assert [saved["name"] for saved in json.loads(file.read_text())["runs"]] == ["run 0"]
    assert multiprocessing.active_children() == []
    if name == "fail":
        assert "in fail" in str(info.value.__cause__)  # where it happened


def test_bars_of_other_processes(trains):
    console = quiet()
    sweep(CONFIGS, trains.train, workers=2, console=console)
    assert "3/3 steps" in console.file.getvalue()


SCRIPT = """
import os, sys, time
from pathlib import Path
from awp_optim.lab.config import Config
from awp_optim.lab.sweep import sweep


def train(config, report):
    Path(sys.argv[1], str(os.getpid())).touch()
    for i in range(10**6):
        time.sleep(0.05)
        report(i, 10**6)


if __name__ == "__main__":
    sweep({str(seed): Config(seed=seed) for seed in range(2)}, train, workers=2)
"""


def is_alive(pid):
    """Whether there is such a process, other than as a dead one nobody has asked for."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_sweep_is_the_end_of_its_processes(tmp_path, number):
    pids = tmp_path / "pids"
    pids.mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(pids)]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        while len(children := [int(p.name) for p in pids.iterdir()]) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        if number == signal.SIGINT:
            for child in children:
                os.kill(child, number)
            time.sleep(0.5)
            assert all(map(is_alive, children))  # Ctrl-C is for the parent
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.kill()
        _, said = process.communicate(timeout=20)
        assert process.returncode == -number
        assert said.decode().count("Traceback") == (number == signal.SIGINT)  # the parent's own
        deadline = time.monotonic() + 20
        while any(map(is_alive, children)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()


# --- On an executor of the caller -------------------------------------------------------------


TINY = Config(
    arch="preact_resnet_small", eps=0.2, step_size=0.1, train_steps=1, test_steps=1, epochs=1,
    batch_size=16, train_eval=8, augment=False,
)  # fmt: skip


def train_tiny(config, report):
    """A run in earnest."""
    return fit(config, load_digits().limit(32, 16), on_step=report)[1]


def without_times(found):
    return {
        name: [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
        for name, rows in found.items()
    }


@pytest.mark.filterwarnings("ignore")  # those of dask's own
def test_runs_on_a_dask_cluster_are_those_of_one_process(tmp_path, trains, one_thread):
    distributed = pytest.importorskip("distributed")
    configs = {
        f"gamma {gamma:g}, seed {seed}": replace(TINY, gamma=gamma, seed=seed)
        for seed in (0, 1)
        for gamma in (0.0, 0.01)
    }
    settings = {
        "processes": True,
        "n_workers": 2,
        "threads_per_worker": 1,
        "dashboard_address": None,
        "local_directory": str(tmp_path),
    }
    file = tmp_path / "runs.json"
    with distributed.LocalCluster(**settings) as cluster, distributed.Client(cluster) as client:
        client.run(sys.path.insert, 0, str(tmp_path))
        executor = client.get_executor()
        found = sweep(configs, train_tiny, file=file, executor=executor, console=quiet())
        pids = sweep(CONFIGS, trains.train, executor=executor, console=quiet())
        with pytest.raises(RunFailed, match="'run 2' failed: Odd: this and that"):
            wait = {name: replace(config, arch=str(file)) for name, config in CONFIGS.items()}
            del wait["run 1"]
            sweep(wait, trains.fail, executor=executor, console=quiet())
        # The executor is the caller's: it still works.
        assert executor.submit(os.getpid).result() not in (None, os.getpid())
    assert os.getpid() not in {rows[0]["pid"] for rows in pids.values()}
    assert len(json.loads(file.read_text())["runs"]) == 4
    alone = sweep(configs, train_tiny, workers=1, console=quiet())
    assert without_times(found) == without_times(alone)


class Job:
    """A future of another library, such as submitit: ``done``, ``result`` and ``cancel`` alone."""

    def __init__(self, function, arguments):
        self._call, self._looks = (function, arguments), 0

    def done(self):
        self._looks += 1
        return self._looks > 2

    def result(self):
        function, arguments = self._call
        return function(*arguments)

    def cancel(self):
        self._looks = 0


class Cluster:
    def submit(self, function, *arguments):
        return Job(function, arguments)


def test_any_executor_will_do():
    train = Train()
    found = sweep(CONFIGS, train, executor=Cluster(), console=quiet())
    assert found == {name: rows_of(config) for name, config in CONFIGS.items()}

    class Lost(Cluster):
        def submit(self, function, *arguments):
            return super().submit(lambda *_: (_ for _ in ()).throw(KeyError("node 7")), ())

    with pytest.raises(RunFailed, match="'run 0' failed: KeyError: 'node 7'"):
        sweep(CONFIGS, train, executor=Lost(), console=quiet())
