"""Which images an epoch shows."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from awp_optim.lab import training_set
from awp_optim.lab.training_set import epoch_order, split_batch, steps_per_epoch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("images", "batch", "steps"),
    [(10, 5, 2), (11, 5, 2), (12, 5, 3), (1, 5, 1), (3, 5, 1), (64, 1, 64)],
)
def test_a_single_image_left_over_makes_no_step(images, batch, steps):
    assert steps_per_epoch(images, batch) == steps


def test_an_epoch_is_a_permutation_or_several():
    assert torch.equal(
        epoch_order(50, 50, 8, generator()), torch.randperm(50, generator=generator())
    )
    order = epoch_order(10, 25, 8, generator())
    assert sorted(order[:10].tolist()) == sorted(order[10:20].tolist()) == list(range(10))
    assert len(set(order[20:].tolist())) == 5
    assert len(epoch_order(10, 4, 8, generator())) == 4


@pytest.mark.parametrize(("share", "per_batch"), [(0.5, 4), (0.25, 2), (0.8, 6)])
@pytest.mark.parametrize("unlabeled", [7, 100])
def test_every_batch_has_its_share_of_unlabeled_images(share, per_batch, unlabeled):
    order = epoch_order(20, 41, 8, generator(), unlabeled=unlabeled, share=share)
    batches = order.view(-1, 8)
    assert len(batches) == steps_per_epoch(41, 8) == 5
    assert ((batches >= 20).sum(1) == per_batch).all()
    # No image comes again before all of its kind have been shown.
    for first, end in ((0, 20), (20, 20 + unlabeled)):
        counts = order[(order >= first) & (order < end)].bincount(minlength=end)[first:]
        assert counts.max() - counts.min() <= 1
    assert 0 <= order.min() <= order.max() < 20 + unlabeled


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_batch_has_images_of_both_kinds(share):
    with pytest.raises(ValueError, match="images of both kinds"):
        split_batch(8, share)


def test_the_generator_decides():
    first, again, other = (
        epoch_order(20, 40, 8, generator(seed), unlabeled=30) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_few_of_millions_are_drawn_without_a_permutation_of_them(monkeypatch):
    monkeypatch.setattr(torch, "randperm", None)
    n = 50_000_000
    first, again = (training_set._permutations(n, 200_000, generator(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert len(first.unique()) == len(first) == 200_000
    assert 0 <= first.min() < 1000 < n - 1000 < first.max() < n
    # As many from each of ten parts, within five standard deviations.
    assert (first // (n // 10)).bincount().sub(20_000).abs().max() < 5 * 18_000**0.5


def test_every_order_of_a_few_is_as_likely(monkeypatch):
    """With three of nine, repeated values are common: a third of the draws has some."""
    monkeypatch.setattr(training_set, "MANY", 0)
    source, draws = generator(), 20_000
    found = Counter(tuple(training_set._distinct(9, 3, source).tolist()) for _ in range(draws))
    counts = torch.tensor([found[order] for order in itertools.permutations(range(9), 3)])
    assert counts.sum() == draws  # no order repeats a value
    expected = draws / len(counts)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 503) < 5 * (2 * 503) ** 0.5
