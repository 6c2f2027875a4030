"""AWP where every process holds all weights: DistributedDataParallel, ZeroRedundancyOptimizer."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def figures(launch, tmp_path_factory):
    return launch("replicated", 2, directory=tmp_path_factory.mktemp("replicated"))


SCENARIOS = ["same_v_for_all", "a_v_for_each", "all_reduces", "accumulated", "overflow_in_one"]
SCENARIOS += ["random_directions", "in_one_call", "sync_batch_norm", "zero_redundancy"]


# The figures are relative differences in float64, and 1.0 for what must not be.
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_copies_stay_equal(figures, scenario):
    assert figures["2"][scenario]
    for what, difference in figures["2"][scenario].items():
        assert difference < 1e-12, what
