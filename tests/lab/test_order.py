"""Which images an epoch shows."""

from __future__ import annotations

import pytest
import torch

from awp_optim.lab.order import epoch_order, steps_per_epoch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("images", "batch", "steps"), [(10, 5, 2), (11, 5, 2), (12, 5, 3), (1, 5, 1), (3, 5, 1)]
)
def test_an_image_left_over_makes_no_step(images, batch, steps):
    assert steps_per_epoch(images, batch) == steps


def test_an_epoch_is_a_permutation():
    order = epoch_order(50, 50, 8, generator())
    assert sorted(order.tolist()) == list(range(50))
    assert torch.equal(order, torch.randperm(50, generator=generator()))


def test_a_longer_or_shorter_epoch_goes_on_in_permutations():
    order = epoch_order(10, 25, 8, generator())
    assert sorted(order[:10].tolist()) == sorted(order[10:20].tolist()) == list(range(10))
    assert len(set(order[20:].tolist())) == 5
    assert len(epoch_order(10, 4, 8, generator())) == 4


@pytest.mark.parametrize(("share", "of_unlabeled"), [(0.5, 4), (0.25, 2), (0.8, 6)])
def test_every_batch_has_its_share_of_unlabelled_images(share, of_unlabeled):
    order = epoch_order(20, 41, 8, generator(), unlabeled=100, share=share)
    batches = order.view(-1, 8)
    assert len(batches) == steps_per_epoch(41, 8) == 5
    assert ((batches >= 20).sum(1) == of_unlabeled).all()
    assert order.min() >= 0
    assert order.max() < 120
    unlabeled = order[order >= 20]
    assert len(unlabeled.unique()) == len(unlabeled)  # no image again before all have been
    first = order[order < 20][:20]
    assert len(first.unique()) == len(first)


def test_unlabelled_images_come_again_once_all_have_been():
    order = epoch_order(20, 40, 8, generator(), unlabeled=7)
    counts = order[order >= 20].bincount(minlength=27)[20:]
    assert counts.sum() == 20
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_that_leaves_a_kind_out_is_an_error(share):
    with pytest.raises(ValueError, match="images of both kinds"):
        epoch_order(20, 40, 8, generator(), unlabeled=7, share=share)


def test_the_generator_decides():
    first, again, other = (
        epoch_order(20, 40, 8, generator(seed), unlabeled=30) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
