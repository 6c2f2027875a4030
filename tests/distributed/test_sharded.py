"""AWP on parameters sharded over processes equals AWP in one process."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def figures(launch, tmp_path_factory):
    return launch("sharded", 4, 2, directory=tmp_path_factory.mktemp("sharded"))


# The figures are relative differences in float64, and 1.0 for what must not be.
@pytest.mark.parametrize(
    ("processes", "scenario"),
    [
        (2, "fsdp2"),
        (4, "fsdp2"),
        (4, "hsdp"),
        (2, "tensor_parallelism"),
        (4, "fsdp2_of_tensor_parallel"),
    ],
)
def test_twenty_steps_equal_those_of_one_process(figures, processes, scenario):
    for way, difference in figures[str(processes)][scenario].items():
        assert difference < 1e-12, way


@pytest.mark.parametrize(
    ("processes", "scenario"),
    [
        (4, "placements"),
        (4, "collectives"),
        (4, "other_gradients"),
        (4, "random_directions"),
        (2, "refusals"),
    ],
)
def test_an_ascent_of_parts(figures, processes, scenario):
    for what, difference in figures[str(processes)][scenario].items():
        assert difference < 1e-12, what
