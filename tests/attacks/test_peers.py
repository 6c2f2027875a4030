"""The same images as torchattacks, from the same start, to float32 rounding."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

from awp_optim.attacks import FGSM, PGD

torchattacks = pytest.importorskip("torchattacks")

EPS = {"linf": 0.05, "l2": 0.4}


def both(model: nn.Module, x: Tensor, y: Tensor, norm: str, **settings) -> tuple[Tensor, Tensor]:
    """PGD by us and by them, after the same seed."""
    peer = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    torch.manual_seed(4)
    theirs = peer(
        model,
        eps=settings["eps"],
        alpha=settings["step_size"],
        steps=settings["steps"],
        random_start=settings["random_start"],
    )(x, y)
    torch.manual_seed(4)
    return PGD(norm=norm, **settings)(model, x, y), theirs


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("norm", EPS)
def test_pgd(norm, random_start, cnn, batch):
    eps = EPS[norm]
    ours, theirs = both(
        cnn, *batch, norm, eps=eps, step_size=eps / 4, steps=10, random_start=random_start
    )
    assert (ours - batch[0]).abs().max() > eps / 100
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_fgsm(cnn, batch):
    theirs = torchattacks.FGSM(cnn, eps=0.05)(*batch)
    torch.testing.assert_close(FGSM(eps=0.05)(cnn, *batch), theirs, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("linf", 1 / 255), ("l2", 32 / 255)])
def test_robust_accuracy_of_a_trained_resnet(norm, eps, resnet18, cifar10):
    x, y = (t[:100] for t in cifar10)
    torch.set_num_threads(os.cpu_count() or 1)
    ours, theirs = both(
        resnet18, x, y, norm, eps=eps, step_size=eps / 4, steps=10, random_start=True
    )
    with torch.no_grad():
        clean, a, b = (int((resnet18(t).argmax(1) == y).sum()) for t in (x, ours, theirs))
    assert clean > 85
    assert a < clean - 20
    assert abs(a - b) <= 1
