"""The command line of the suites, and the fixtures through which they report.

``pytest benchmarks --benchmark-only --benchmark-json=FILE`` runs everything.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.comparison import AddRow, Comparison, Setting
from benchmarks.environment import environment
from benchmarks.report import markdown

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
    config.option.benchmark_quiet = True  # our tables are shown instead of its own
    config.stash[ROWS] = []
    config.stash[SETTING] = Setting(
        arch=config.getoption("--arch"),
        batch=config.getoption("--batch") or (128 if device.startswith("cuda") else 32),
        rounds=config.getoption("--rounds"),
        device=device,
    )


class Clock:
    """A clock that advances only when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "add_times" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        if config.pluginmanager.hasplugin("timeout"):
            item.add_marker(pytest.mark.timeout(0))  # a measurement takes as long as it takes


@pytest.fixture(scope="session")
def setting(request: pytest.FixtureRequest) -> Setting:
    return request.config.stash[SETTING]


@pytest.fixture
def add_row(request: pytest.FixtureRequest, benchmark: Any) -> AddRow:
    """Record a row of results: in pytest-benchmark's JSON as ``extra_info``, and for the tables."""

    def add(row: dict[str, Any]) -> None:
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)

    return add


@pytest.fixture
def add_times(benchmark: Any, add_row: AddRow) -> AddRow:
    """Give the times of one contestant to pytest-benchmark, and record its row.

    pytest-benchmark times one function after another, which compares nothing on a machine that
    drifts. The contestants were timed in turn; here each measured time passes on a clock that
    pytest-benchmark reads.
    """

    def add(comparison: Comparison, name: str, **extra: Any) -> None:
        CLOCK.now = 0.0  # a large number would lose the digits of a short time
        seconds = iter(comparison.seconds[name])
        benchmark.group = comparison.title
        benchmark.pedantic(
            lambda: CLOCK.advance(next(seconds)), rounds=len(comparison.seconds[name])
        )
        add_row(comparison.row(name, **extra))

    return add


@pytest.fixture(autouse=True, scope="session")
def _no_progress_bars() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        yield


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """What the figures were measured with, instead of the machine's name and make."""
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
