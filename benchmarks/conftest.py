"""Options of the suites, the fixture that hands measured times to pytest-benchmark, the tables.

``pytest benchmarks --benchmark-only --benchmark-json=FILE`` runs everything.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.harness import environment
from benchmarks.report import markdown
from benchmarks.suites import Comparison, Record, Setting

SETTING = pytest.StashKey[Setting]()
ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("awp_optim benchmarks")
    group.addoption("--arch", default="preact_resnet18", help="network (default: %(default)s)")
    group.addoption("--batch", type=int, help="images a batch (default: 32, on CUDA 128)")
    group.addoption("--rounds", type=int, default=10, help="timed rounds (default: %(default)s)")
    group.addoption("--device", default="cpu", help="cpu or cuda (default: %(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no CUDA device here")
    config.option.benchmark_quiet = True  # our tables are shown in place of its own, unless -v
    config.stash[ROWS] = []
    config.stash[SETTING] = Setting(
        arch=config.getoption("--arch"),
        batch=config.getoption("--batch") or (128 if device.startswith("cuda") else 32),
        rounds=config.getoption("--rounds"),
        device=device,
    )


class Clock:
    """A clock that stands still until it is put forward."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "replay" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        if config.pluginmanager.hasplugin("timeout"):
            item.add_marker(pytest.mark.timeout(0))  # measuring takes what it takes


@pytest.fixture(scope="session")
def setting(request: pytest.FixtureRequest) -> Setting:
    return request.config.stash[SETTING]


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Record:
    """Keep a row of results: in pytest-benchmark's JSON as ``extra_info``, and for the tables."""

    def keep(row: dict[str, Any]) -> None:
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)

    return keep


@pytest.fixture
def replay(benchmark: Any, record: Record) -> Record:
    """Hand the times that one contestant took to pytest-benchmark, and keep its row.

    pytest-benchmark times one function after another, which on a machine that drifts compares
    nothing. The contestants were timed in turn before; here their times pass once more, on a clock
    that is put forward by each.
    """

    def play(comparison: Comparison, name: str, **extra: Any) -> None:
        CLOCK.now = 0.0  # a large number would swallow the digits of a short time
        seconds = iter(comparison.seconds[name])
        rounds = len(comparison.seconds[name])
        benchmark.group = comparison.title
        benchmark.pedantic(lambda: CLOCK.advance(next(seconds)), rounds=rounds)
        record(comparison.row(name, **extra))

    return play


@pytest.fixture(autouse=True, scope="session")
def _no_progress_bars() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        yield


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Where and with what the figures were taken, in place of the machine's name and make."""
    args = [a for a in config.invocation_params.args if not a.startswith("--benchmark-json")]
    about = environment(config.stash[SETTING].device)
    return {**about, "command": shlex.join(["pytest", *map(str, args)])}


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if rows := config.stash[ROWS]:
        terminalreporter.section("medians and ratios")
        terminalreporter.write_line(markdown(rows))
