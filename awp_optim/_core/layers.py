"""The weight tensors that one ascent moves, grouped into lists for the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from awp_optim._core.dtensors import (
    RandomGenerators,
    Sharding,
    is_dtensor,
    local_like,
    local_part,
    sharding_of,
)
from awp_optim._core.perturbation import arithmetic_dtype
from awp_optim._core.settings import is_active

__all__ = ["Layers", "collect_layers", "perturbed_parameters"]

_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


@dataclass
class Layers:
    """Weight tensors of one parameter group with the same device, dtypes and sharding.

    Attributes:
        group: the parameter group, with AWP's settings.
        foreach: whether ``torch._foreach_*`` may be used on them.
        sharding: how they are distributed, if they are DTensors.
        params: the parameters.
        parts: the local parts of DTensors; otherwise the parameters themselves.
        directions: what to ascend along, shaped like ``parts``; empty for random directions.
    """

    group: dict[str, Any]
    foreach: bool
    sharding: Sharding | None
    params: list[Tensor] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)
    directions: list[Tensor] = field(default_factory=list)

    def reduce_norms(self, *norms: Tensor) -> Sequence[Tensor]:
        """The norms of full tensors from the norms of ``parts``, each of shape (L,)."""
        if self.sharding is None:
            return norms
        return self.sharding.reduce_norms(self.group["norm"], *norms)

    def with_directions(self, generators: RandomGenerators) -> Iterator[Layers]:
        """Yield these layers with their directions, or with random ones if they have none.

        Random directions are drawn for one tensor at a time, because each takes as much memory as
        its tensor.
        """
        if self.directions:
            yield self
            return
        for p, part in zip(self.params, self.parts, strict=True):
            draw = torch.empty_like(part, dtype=arithmetic_dtype(part.dtype))
            if self.sharding is None:
                draw.normal_()
            else:
                draw.normal_(generator=generators.get(self.sharding, part.device))
            yield Layers(self.group, self.foreach, self.sharding, [p], [part], [draw])


def collect_layers(
    groups: list[dict[str, Any]], along: Mapping[Tensor, Tensor] | None, *, foreach: bool | None
) -> list[Layers]:
    """The tensors to perturb, grouped by parameter group, device, dtypes and sharding.

    Tensors with fewer than ``min_ndim`` dimensions, without elements, or without a direction are
    left out.

    Args:
        groups: parameter groups with AWP's settings.
        along: directions by parameter; None for the gradients.
        foreach: as in :class:`~awp_optim.AWP`.
    """
    found: dict[Any, Layers] = {}
    for index, group in enumerate(groups):
        for p, g in _directions(group, along):
            part, sharding = p, None
            if is_dtensor(p):
                part, sharding = local_part(p), sharding_of(p)
                g = None if g is None else local_like(g, p)
            use_foreach = type(part) in _PLAIN_TENSORS if foreach is None else foreach
            g_dtype = None if g is None else g.dtype
            key = (index, part.device, part.dtype, g_dtype, use_foreach, sharding)
            layers = found.get(key)
            if layers is None:
                layers = found[key] = Layers(group, use_foreach, sharding)
            layers.params.append(p)
            layers.parts.append(part)
            if g is not None:
                layers.directions.append(g)
    return list(found.values())


def perturbed_parameters(group: dict[str, Any]) -> list[Tensor]:
    """The parameters of a group that an ascent moves if they have a direction."""
    if not is_active(group):
        return []
    unique = dict.fromkeys(group["params"])  # a parameter may be listed twice
    return [p for p in unique if p.ndim >= group["min_ndim"] and p.numel()]


def _directions(
    group: dict[str, Any], along: Mapping[Tensor, Tensor] | None
) -> list[tuple[Tensor, Tensor | None]]:
    """Each parameter to perturb, with its direction or None for a random one."""
    params = perturbed_parameters(group)
    if group["direction"] == "random":
        return [(p, None) for p in params if p.requires_grad]
    # If the optimizer maximizes, the perturbation minimizes.
    sign = -1 if along is None and group.get("maximize", False) else 1
    found = ((p, p.grad if along is None else along.get(p)) for p in params)
    return [(p, _dense(g) if sign == 1 else -_dense(g)) for p, g in found if g is not None]


def _dense(g: Tensor) -> Tensor:
    return g if g.layout is torch.strided else g.to_dense()
