"""The same images as torchattacks, from the same start, to float32 rounding."""

from __future__ import annotations

import pytest
import torch

from awp_optim.attacks import FGSM, PGD

from .conftest import seeded

torchattacks = pytest.importorskip("torchattacks")

EPS = {"linf": 0.05, "l2": 0.4}


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", EPS)
def test_pgd(norm, random_start, cnn, batch):
    eps, peer = EPS[norm], {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    attack = PGD(eps, eps / 4, 10, norm, random_start=random_start)
    other = peer(cnn, eps=eps, alpha=eps / 4, steps=10, random_start=random_start)
    ours, theirs = seeded(4, attack, cnn, *batch), seeded(4, other, *batch)
    assert (ours - batch[0]).abs().max() > eps / 100
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_fgsm(cnn, batch):
    theirs = torchattacks.FGSM(cnn, eps=0.05)(*batch)
    torch.testing.assert_close(FGSM(eps=0.05)(cnn, *batch), theirs, atol=1e-6, rtol=0)
