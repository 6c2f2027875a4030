"""As strong as the reference implementations on a CIFAR-10 ResNet-18."""

from __future__ import annotations

import os

import pytest
import torch

from awp_optim.attacks import APGD, CW, PGD, SPSA, AutoAttack
from awp_optim.attacks.losses import cw

from .conftest import seeded, wrong

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
EPS = [("linf", 1 / 255), ("linf", 2 / 255), ("l2", 0.1)]


@pytest.fixture(autouse=True)
def _all_threads(_one_thread: None) -> None:
    torch.set_num_threads(os.cpu_count() or 1)


def torchattacks_pgd(model, norm, eps, steps):
    torchattacks = pytest.importorskip("torchattacks")
    make = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    return make(model, eps=eps, alpha=eps / 4, steps=steps)


def authors_apgd(model, norm, eps, steps):
    autopgd = pytest.importorskip("pyautoattack.autopgd_base")
    name = {"linf": "Linf", "l2": "L2"}[norm]
    return autopgd.APGDAttack(model, n_iter=steps, norm=name, eps=eps, seed=0, device="cpu").perturb


def still_right(resnet18, x, y):
    return int((~wrong(resnet18, x, y)).sum())


@pytest.mark.parametrize(("norm", "eps"), [("linf", 1 / 255), ("l2", 32 / 255)])
def test_pgd(norm, eps, resnet18, cifar10):
    """As many images of 100 stay right as under torchattacks' PGD, give or take one."""
    x, y = (t[:100] for t in cifar10)
    ours = seeded(4, PGD(eps, eps / 4, 10, norm), resnet18, x, y)
    theirs = seeded(4, torchattacks_pgd(resnet18, norm, eps, 10), x, y)
    clean, a, b = (still_right(resnet18, z, y) for z in (x, ours, theirs))
    assert clean > 85
    assert a < clean - 20
    assert abs(a - b) <= 1


@pytest.mark.parametrize(("norm", "eps"), EPS)
@pytest.mark.parametrize(
    ("make", "peer", "images", "steps", "fooled", "lost"),
    [
        (lambda eps, norm: CW(eps, norm=norm), torchattacks_pgd, 32, 100, 6, 1),
        (lambda eps, norm: APGD(eps, 20, norm, drop_fooled=True), authors_apgd, 200, 20, 1, 2),
    ],
    ids=["cw", "apgd"],
)
def test_leaves_no_more_images_right(
    make, peer, images, steps, fooled, lost, norm, eps, resnet18, cifar10
):
    """Fools at least ``fooled`` images, and up to ``lost`` fewer than the peer."""
    x, y = (t[:images] for t in cifar10)
    right = ~wrong(resnet18, x, y)
    x, y = x[right], y[right]
    ours = seeded(4, make(eps, norm), resnet18, x, y)
    theirs = seeded(4, peer(resnet18, norm, eps, steps), x, y)
    a, b = (still_right(resnet18, z, y) for z in (ours, theirs))
    assert a <= len(x) - fooled
    assert a <= b + lost


def test_spsa(resnet18, cifar10):
    torchattacks = pytest.importorskip("torchattacks")
    x, y = (t[:16] for t in cifar10)
    eps, steps, samples = 8 / 255, 6, 16
    peer = torchattacks.SPSA(
        resnet18, eps=eps, delta=0.001, lr=0.01, nb_iter=steps, nb_sample=samples, max_batch_size=2
    )
    theirs = peer(x, y)
    ours = SPSA(eps, steps, samples=samples, drop_fooled=False)(resnet18, x, y)
    with torch.no_grad():
        clean, a, b = (cw(resnet18(t), y) for t in (x, ours, theirs))
    assert a.mean() > clean.mean() + 1
    assert abs(a.mean() - b.mean()) < 0.35 * (b.mean() - clean.mean())
    assert abs(int((a > 0).sum()) - int((b > 0).sum())) <= 3


def test_both_backends_of_autoattack(resnet18, cifar10):
    """At 1/255 with five restarts: who is fooled by whose APGD."""
    pytest.importorskip("pyautoattack")
    x, y = (t[:40] for t in cifar10)
    a, b = (
        wrong(
            resnet18,
            AutoAttack(1 / 255, "linf", "custom", ("apgd-ce",), backend)(resnet18, x, y),
            y,
        )
        for backend in ("reference", "native")
    )
    assert (a != b).sum() <= 1
