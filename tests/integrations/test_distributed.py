"""Two processes that accumulate three batches each equal one process with the large batch."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.integrations.toolbox import GAMMA, data, gradients, network, step_by_hand

HERE = Path(__file__).parent

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ddp")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
        *(str(HERE / "two_processes.py"), str(folder)),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def reference(first: int) -> dict[str, Tensor]:
    """Two updates of 24 rows, perturbed from the update ``first`` on."""
    x, y = data(batches=12)
    net = network()
    base = torch.optim.SGD(net.parameters(), lr=0.1)

    for i, batch in enumerate(zip(x.split(24), y.split(24))):
        gamma = GAMMA if i >= first else 0.0
        step_by_hand(net.parameters(), partial(gradients, net, *batch), base.step, gamma)
    return net.state_dict()


@pytest.mark.parametrize(("what", "first"), [("accelerate", 0), ("trainer", 1)])
def test_two_processes_equal_the_large_batch(weights, what, first):
    expected = reference(first)
    for rank in (0, 1):
        for name, t in expected.items():
            got = weights[rank][what][f"layers.{name}"]
            torch.testing.assert_close(got, t, rtol=1e-9, atol=1e-12)
