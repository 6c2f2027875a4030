"""The training steps that are compared: AT, AT-AWP, and the plain implementation of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from awp_optim import AWP, AdversarialStep
from awp_optim.attacks import PGD
from awp_optim.lab.models import build_model
from benchmarks.reference import ReferenceStep

EPS, STEP_SIZE, GAMMA = 8 / 255, 2 / 255, 5e-3
# A step takes the same time at any learning rate. At a low one a network that is trained on one
# batch over and over hardly changes; else its gradients shrink to denormal numbers, which are slow.
SGD_SETTINGS: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}

AT, EXACT, ATTACK = "AT", "AT-AWP exact", "AT-AWP attack"
REFERENCE_AT, REFERENCE_AWP = "reference AT", "reference AT-AWP"
METHODS = (AT, EXACT, ATTACK, REFERENCE_AT, REFERENCE_AWP)

Step = Callable[[Tensor, Tensor], Any]


def network(
    arch: str,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.channels_last,
) -> nn.Module:
    """A CIFAR-10 network with the same weights at every call, in training mode."""
    torch.manual_seed(0)
    model = build_model(arch, num_classes=10, in_channels=3)
    return model.to(device).to(memory_format=memory_format).train()


def images(
    n: int,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.channels_last,
) -> tuple[Tensor, Tensor]:
    """A batch of random images, shape (n, 3, 32, 32) in [0, 1], and random labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 3, 32, 32, generator=generator)
    y = torch.randint(10, (n,), generator=generator)
    return x.to(device).contiguous(memory_format=memory_format), y.to(device)


def training_step(
    method: str,
    model: nn.Module,
    *,
    attack_steps: int = 10,
    autocast: torch.dtype | None = None,
    cuda_graph: bool | str = "auto",
) -> Step:
    """A step of one of the :data:`METHODS`: L_inf 8/255, PGD, SGD with momentum.

    Args:
        method: one of the :data:`METHODS`.
        model: the network to train.
        attack_steps: PGD iterations.
        autocast: as for AdversarialStep; the reference trains in float32.
        cuda_graph: as for AdversarialStep; the reference is eager.
    """
    pgd: dict[str, Any] = {"eps": EPS, "step_size": STEP_SIZE, "steps": attack_steps}
    if method in (REFERENCE_AT, REFERENCE_AWP):
        gamma = GAMMA if method == REFERENCE_AWP else 0.0
        return ReferenceStep(model, SGD(model.parameters(), **SGD_SETTINGS), gamma=gamma, **pgd)
    optimizer: torch.optim.Optimizer = (
        SGD(model.parameters(), **SGD_SETTINGS)
        if method == AT
        else AWP(model.parameters(), SGD, gamma=GAMMA, **SGD_SETTINGS)
    )
    return AdversarialStep(
        model,
        optimizer,
        PGD(**pgd),
        ascent="attack" if method == ATTACK else "exact",
        autocast=autocast,
        cuda_graph=cuda_graph,
    )
