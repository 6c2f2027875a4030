"""The network and the optimizer of a run, from its settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from awp_optim import AWP
from awp_optim.lab.config import Config
from awp_optim.lab.data import ImageData
from awp_optim.lab.models import build_model
from awp_optim.lab.weights import initialize

__all__ = ["build_network", "build_optimizer", "check_arch", "compile_network"]


def build_network(config: Config, data: ImageData, init: Mapping[str, Tensor] | None) -> nn.Module:
    """The network of a run, with the weights to start from if there are some."""
    model = build_model(
        config.arch,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        mean=data.mean,
        std=data.std,
        activation=config.activation,
    )
    if init is not None:
        initialize(model, init)
    if config.bn_momentum is not None:
        for layer in _batch_norms(model):
            layer.momentum = config.bn_momentum
    return model


def check_arch(config: Config) -> None:
    """Raise ValueError if there is no such network, before the images are loaded."""
    with torch.device("meta"):  # without memory
        build_model(config.arch, num_classes=10, in_channels=3, activation=config.activation)


def compile_network(model: nn.Module) -> None:
    """Compile a network in place, which keeps the names of its parameters.

    Steps and evaluations need five or six versions of it: BatchNorm in train mode, in eval mode and
    with frozen statistics; gradients of inputs, of weights, of neither. With dynamic shapes, no
    other size of a batch needs more, except for those below 16 on a CPU and of 1. Beyond a limit,
    8 by default, torch would run the network eagerly.
    """
    options = inspect.signature(torch.compile).parameters
    limit = {"recompile_limit": 32} if "recompile_limit" in options else {}  # not in torch 2.6
    model.compile(dynamic=True, **limit)


def build_optimizer(model: nn.Module, config: Config) -> AWP:
    """AWP over SGD, with the regularization of Section 5.3 on weights alone."""
    optimizer = AWP(
        _param_groups(model, config),
        torch.optim.SGD,
        gamma=config.gamma,
        norm=config.awp_norm,
        direction=config.direction,
        ascent_steps=config.ascent_steps * config.alternations,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    if config.l1:
        weights = [p for p in model.parameters() if p.ndim > 1]

        @torch.no_grad()
        def add_l1_gradient(*_: Any) -> None:
            for p in weights:
                if p.grad is not None:
                    p.grad.add_(p.sign(), alpha=config.l1)

        # Before the base optimizer's step, at the unperturbed weights: the ascent leaves it out.
        optimizer.base_optimizer.register_step_pre_hook(add_l1_gradient)
    return optimizer


def _param_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """The parameters that decay and, if there are some, those that do not."""
    parameters = list(model.parameters())
    if config.l2:
        decay, free = config.l2, {p for p in parameters if p.ndim <= 1}
    else:
        layers = [] if config.bn_decay else _batch_norms(model)
        decay, free = config.weight_decay, {p for layer in layers for p in layer.parameters()}
    groups = [
        {"params": [p for p in parameters if p not in free], "weight_decay": decay},
        {"params": [p for p in parameters if p in free], "weight_decay": 0.0},
    ]
    return groups if free else groups[:1]


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]
