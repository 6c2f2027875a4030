"""The weights of GKL's classes, against means taken one example at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from awp_optim.lab import trainer
from awp_optim.lab.class_means import ClassMeans
from awp_optim.lab.trainer import fit
from awp_optim.objectives import GKL

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(batches, before):
    """The mean of softmax(z / 4) over each class; a class without examples keeps its row."""
    rows = []
    for c in range(len(before)):
        p = [
            (z.double() / 4).softmax(0)
            for logits, y in batches
            for z, label in zip(logits, y, strict=True)
            if label == c
        ]
        rows.append(torch.stack(p).mean(0) if p else before[c].double())
    return torch.stack(rows)


def test_means_of_two_epochs():
    means, before = ClassMeans(4, torch.device("cpu")), torch.full((4, 4), 0.25)
    address = means.means.data_ptr()
    assert torch.equal(means.means, before)
    for epoch in range(2):
        batches = [(torch.randn(9, 4) * 5, torch.randint(3 + epoch, (9,))) for _ in range(3)]
        for logits, y in batches:
            means.sums += means.sums_of(logits, y)
        assert torch.equal(means.means, before)
        means.end_epoch()
        torch.testing.assert_close(means.means.double(), by_hand(batches, before))
        torch.testing.assert_close(means.means.sum(1), torch.ones(4))
        before = means.means.clone()
    assert means.means.data_ptr() == address


def test_probabilities_count_in_part():
    logits, y = torch.randn(6, 3).bfloat16(), torch.rand(6, 3).softmax(1).double()
    p = (logits.double() / 4).softmax(1)
    expected = sum(y[i, :, None] * p[i] for i in range(6))
    sums = ClassMeans.sums_of(logits, y)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("captured", [False, True])
def test_a_run_weights_each_epoch_by_the_last(config, data, monkeypatch, captured, request):
    if captured:
        request.getfixturevalue("cpu_graphs")
    step, seen = trainer.AdversarialStep.__call__, []

    def watched(self, x, y):
        probs = self.objective.class_probs.clone()
        out = step(self, x, y)
        seen.append((probs, self.logits_nat.clone(), y.clone()))
        return out

    monkeypatch.setattr(trainer.AdversarialStep, "__call__", watched)
    fit(replace(config, method="gkl", epochs=3), data)
    expected = torch.full((10, 10), 0.1)
    for epoch in range(3):
        steps = seen[3 * epoch :][:3]
        for probs, _, _ in steps:
            torch.testing.assert_close(probs.double(), expected.double(), rtol=1e-5, atol=1e-7)
        expected = by_hand([(z, y) for _, z, y in steps], expected)
    assert len(seen) == 9
    assert not torch.equal(seen[3][0], seen[6][0])


def test_other_methods_have_none(config, data):
    run = trainer._Run(config, data, None, None, trainer.TrainingRanks())
    assert run.state.class_means is None
    assert "class_means" not in run.state.state_dict()
    assert replace(config, method="gkl").objective == GKL(4.0, 6.0)
