"""Directions in weight space: dicts from parameter names to tensors.

Filter-normalized Gaussians (Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS
2018), AWP's own perturbation, and that of the paper's random baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from awp_optim._core.perturbation import arithmetic_dtype
from awp_optim._utils.attacking import check_attack, perturb
from awp_optim._utils.batches import (
    NO_DATA,
    Data,
    batches,
    check_classes,
    device_of,
    seeded,
    to_device,
)
from awp_optim._utils.checks import describe
from awp_optim._utils.model_state import in_mode
from awp_optim.attacks.losses import ce
from awp_optim.attacks.oracle import ModelOracle
from awp_optim.landscape.probe import (
    SEED_NAME,
    MovableWeights,
    check_model,
    count_classes,
)
from awp_optim.optimizer import AWP

__all__ = [
    "Direction",
    "awp_direction",
    "filter_normalized_direction",
    "named_direction",
    "rwp_direction",
]

Direction = Mapping[str, Tensor] | Mapping[Tensor, Tensor]
"""A tensor for each parameter that moves, by the parameter's name or, as in the result of
``AWP.perturbation()``, by the parameter itself."""

_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def filter_normalized_direction(
    model: nn.Module, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """A Gaussian direction, each filter scaled to its weights' norm (Algorithm 1, lines 2 to 7).

    ``d_lj <- d_lj / |d_lj|_F * |w_lj|_F`` for filter j of layer l: all weights of an output channel
    in a convolution, a row in other matrices. Networks that compute the same function with
    differently scaled filters have the same landscape along it. As in Li et al. (2018), it is zero
    for biases, norm layers, parameters with fewer than two dimensions, and zero filters.

    Args:
        model: any module; it is not changed.
        generator: source of the random numbers; None for torch's default generator on the CPU. A
            CPU generator gives the same direction for models on all devices.

    Returns:
        A tensor for each parameter, by name, with its shape and device, at least in float32.

    Raises:
        ValueError: the direction would be zero everywhere, or the model has lazy parameters.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> d = filter_normalized_direction(model, torch.Generator().manual_seed(0))
        >>> torch.allclose(d["weight"].norm(dim=1), model.weight.norm(dim=1)), d["bias"]
        (True, tensor([0., 0.]))
    """
    direction = {}
    for name, p in _parameters(model).items():
        owner, _, own_name = name.rpartition(".")
        module = model.get_submodule(owner)
        if p.ndim < 2 or isinstance(module, _NORMS) or own_name == "bias":
            direction[name] = torch.zeros_like(p, dtype=arithmetic_dtype(p.dtype))
        else:
            direction[name] = _filter_normalized(_gaussian(p, generator), p, module)
    if not any(bool(d.any()) for d in direction.values()):
        raise ValueError(
            "the direction is zero: apart from biases and norm layers, the model has no nonzero "
            "weights with two dimensions or more"
        )
    return direction


def _filter_normalized(d: Tensor, p: Tensor, module: nn.Module) -> Tensor:
    """``d`` with each filter scaled to the norm of the same filter of ``p``."""
    w = p.to(d.dtype)
    filter_dims = tuple(range(1, d.ndim))
    if isinstance(module, _TRANSPOSED):  # (in, out / groups, ...): one filter per output
        d, w = (t.reshape(module.groups, -1, *p.shape[1:]) for t in (d, w))
        filter_dims = (1, *range(3, d.ndim))
    of_d, of_w = (torch.linalg.vector_norm(t, dim=filter_dims, keepdim=True) for t in (d, w))
    return (d * torch.where(of_d > 0, of_w / of_d, 0)).reshape(p.shape)


@torch.no_grad()
def rwp_direction(model: nn.Module, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """The paper's random weight perturbation (RWP) for gamma = 1: Gaussian, with |d_l| = |w_l|.

    Along it, alpha is RWP's gamma, as in the blue lines of Figure 3 (a).

    Args:
        model: any module; it is restored.
        generator: see :func:`filter_normalized_direction`.

    Returns:
        A tensor for each parameter with two dimensions or more, by name.

    Raises:
        ValueError: the model has lazy parameters, or none with two dimensions.
    """
    weights = {p: _gaussian(p, generator) for p in _parameters(model).values() if p.ndim >= 2}
    return _layerwise(model, weights)


def awp_direction(
    model: nn.Module,
    data: Data,
    attack: Callable[..., Tensor],
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    seed: int | None = 0,
) -> dict[str, Tensor]:
    """AWP's v for gamma = 1, Eq. (10): the layer-wise normalized gradient of the loss on data.

    Along it, alpha is AWP's gamma, as in the red line of Figure 3 (a). Unlike in training, the
    gradient is taken over all data, in one ascent step, with the model in eval mode.

    Args:
        model: any module; it is restored.
        data: the examples; see :func:`loss_curve`.
        attack: generates the adversarial examples for the gradient.
        batch_size: see :func:`loss_curve`.
        device: see :func:`loss_curve`.
        seed: see :func:`loss_curve`.

    Returns:
        A tensor for each parameter with two dimensions or more that requires gradients, by name.

    Raises:
        TypeError, ValueError: see :func:`loss_curve`; or the gradient is zero or not finite.
    """
    check_model(model)
    check_attack("attack", attack)
    device = device_of(model, device)
    weights = [p for p in _parameters(model).values() if p.ndim >= 2 and p.requires_grad]
    if not weights:
        raise ValueError(
            "the model has no weights with two dimensions or more that require gradients"
        )
    with torch.inference_mode(mode=False), in_mode(model, "eval"), MovableWeights(model, []):
        total: dict[Tensor, Tensor] = {}
        number = -1
        for number, (x, y) in enumerate(batches(data, batch_size)):
            x, y = to_device(x, y, device)
            check_classes(y, count_classes(model, x))
            with seeded(x.device, seed, number, SEED_NAME):
                x_adv = perturb("the attack", attack, model, x, y)
                gradients = _gradients(model, weights, x_adv, y)
            for p, g in gradients:
                total[p] = g.to(arithmetic_dtype(g.dtype)) + total.get(p, 0)
    if number < 0:
        raise ValueError(NO_DATA)
    direction = _layerwise(model, total)
    if not any(bool(d.any()) for d in direction.values()):
        raise ValueError("the gradient is zero or not finite: there is no adversarial direction")
    return direction


def _gradients(
    model: nn.Module, weights: list[Tensor], x: Tensor, y: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The used weights, with the gradients of the cross-entropy summed over a batch."""
    with torch.enable_grad():
        loss = ce(ModelOracle(model, x, y).forward(x), y).sum()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return [(p, g) for p, g in zip(weights, gradients, strict=True) if g is not None]


def named_direction(model: nn.Module, direction: Direction) -> dict[str, Tensor]:
    """The direction by parameter names, checked against the model and moved to its device."""
    if not isinstance(direction, Mapping):
        raise TypeError(
            f"a direction must be a dict from parameter names to tensors, got {describe(direction)}"
        )
    parameters = _parameters(model)
    names = {p: name for name, p in parameters.items()}
    named: dict[str, Tensor] = {}
    for key, d in direction.items():
        name = names.get(key, "") if isinstance(key, Tensor) else key
        if name not in parameters:
            raise ValueError(
                f"the direction has a tensor for {describe(key)}, a parameter that the model does "
                f"not have; it has {', '.join(list(parameters)[:5])}, ..."
            )
        shape = tuple(parameters[name].shape)
        if not isinstance(d, Tensor) or d.shape != shape:
            raise ValueError(
                f"the direction of {name} must be a tensor of shape {shape}, got {describe(d)}"
            )
        if not bool(d.isfinite().all()):
            raise ValueError(f"the direction of {name} is not finite")
        named[name] = d.detach().to(parameters[name].device)
    if not named:
        raise ValueError("a direction is empty: it must move at least one parameter")
    return named


def _layerwise(model: nn.Module, along: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    """Eq. (10) with gamma = 1, computed by AWP: each tensor scaled to its weights' norm."""
    if not along:
        raise ValueError("the model has no weights with two dimensions or more")
    optimizer = AWP(list(along), torch.optim.SGD, gamma=1.0, lr=0.0)
    # Normalized first, because gradients may underflow or overflow in half precision.
    optimizer.first_step(along={p: (d / d.norm()).to(p.dtype) for p, d in along.items()})
    try:
        v = optimizer.perturbation()
    finally:
        optimizer.restore()
    return {name: v[p] for name, p in _parameters(model).items() if p in v}


def _gaussian(p: Tensor, generator: torch.Generator | None) -> Tensor:
    device = torch.device("cpu") if generator is None else generator.device
    dtype = arithmetic_dtype(p.dtype)
    return torch.randn(p.shape, generator=generator, device=device, dtype=dtype).to(p.device)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if any(is_lazy(p) for p in parameters.values()):
        raise ValueError("the model has lazy parameters: run it on a batch first")
    return parameters
