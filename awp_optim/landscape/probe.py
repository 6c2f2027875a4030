"""Moving a model's weights to points of weight space, and measuring its losses there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from awp_optim._core.perturbation import arithmetic_dtype
from awp_optim._cuda_graphs.graphs import Graphs
from awp_optim._cuda_graphs.keys import module_key
from awp_optim._utils.attacking import perturb
from awp_optim._utils.batches import check_classes, generators_restored, seeded
from awp_optim._utils.checks import describe
from awp_optim._utils.model_state import changeable_buffers
from awp_optim.attacks import Attack
from awp_optim.attacks.captured import unwrap
from awp_optim.attacks.losses import ce
from awp_optim.attacks.oracle import ModelOracle

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "SEED_NAME",
    "UNPERTURBED",
    "LossProbe",
    "MovableWeights",
    "Options",
    "Point",
    "check_model",
    "count_classes",
]

Point = tuple[tuple[int, float], ...]
"""A point of weight space: pairs of a direction's number and the distance along it."""
UNPERTURBED: Point = ()
SEED_NAME = "landscape"


def check_model(model: object) -> None:
    """Raise TypeError or ValueError for a model whose weights cannot be moved."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a module, so that its weights can be moved, got {describe(model)}"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "pass the module itself, model.module: processes share the points, not the batches"
        )


def count_classes(model: nn.Module, x: Tensor) -> int:
    """The number of the model's classes, from its output for the first example."""
    with generators_restored(x.device):
        return ModelOracle(model, x[:1], None).logits(x[:1]).shape[1]


class MovableWeights:
    """The weights of a model, moved along directions and restored bit for bit.

    As a context manager, it restores the weights and all buffers on exit.

    Args:
        model: the model.
        directions: dicts from parameter names to tensors of the same shapes.
    """

    def __init__(self, model: nn.Module, directions: Sequence[Mapping[str, Tensor]]) -> None:
        self._directions = directions
        self._moving = {
            name: p for name, p in model.named_parameters() if any(name in d for d in directions)
        }
        self._tensors = [*self._moving.values(), *changeable_buffers(model)]
        self._copies = [t.detach().clone() for t in self._tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the weights w and all buffers."""
        for t, copy in zip(self._tensors, self._copies, strict=True):
            t.copy_(copy)
        torch.clear_autocast_cache()  # it may hold casts of the previous weights

    @torch.no_grad()
    def move_to(self, point: Point) -> None:
        """Set the weights to ``w + sum of alpha d``, computed at least in float32."""
        self.restore()
        for name, p in self._moving.items():
            moved = p.to(arithmetic_dtype(p.dtype))
            for number, alpha in point:
                if name in self._directions[number]:
                    moved = torch.add(moved, self._directions[number][name], alpha=alpha)
            if moved is not p:
                p.copy_(moved)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.restore()
        except BaseException:  # a second Ctrl-C
            self.restore()
            raise


@dataclass(frozen=True)
class Options:
    """The settings that curves and surfaces share; see :func:`loss_curve`."""

    batch_size: int | None
    device: torch.device | str | None
    pregenerated: bool
    recompute_bn: bool
    seed: int | None
    state: str | os.PathLike[str] | None
    key: str | None
    progress: bool


class LossProbe:
    """Measures the losses of all examples, adversarial and natural, at points of weight space.

    On devices with CUDA graphs, an attack of this package is captured once per batch size.

    Args:
        model: the model, in eval mode.
        weights: its weights.
        batches: the examples, on the model's device.
        attack: generates adversarial examples.
        options: the settings.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: MovableWeights,
        batches: Sequence[tuple[Tensor, Tensor]],
        attack: Callable[..., Tensor],
        options: Options,
    ) -> None:
        self._model, self._weights, self._batches = model, weights, batches
        self._attack: Any = unwrap(attack)
        self._recompute_bn, self._seed = options.recompute_bn, options.seed
        capturable = isinstance(self._attack, Attack) and not hasattr(self._attack, "parts")
        self._graphs = Graphs("auto" if capturable else False, "the landscape's step")
        check_classes(torch.cat([y for _, y in batches]), count_classes(model, batches[0][0]))
        self._examples: list[Tensor] | None = None
        if options.pregenerated:
            self._examples = [self._generate(i, x, y) for i, (x, y) in enumerate(batches)]

    def losses_at(self, point: Point) -> tuple[list[float], list[float]]:
        """Each example's adversarial and natural cross-entropy at a point.

        The host waits for the device only once, at the end.
        """
        self._weights.move_to(point)
        if self._recompute_bn:
            with seeded(self._batches[0][0].device, self._seed, -1, SEED_NAME):  # for dropout
                large = [batch for batch in self._batches if len(batch[1]) > 1]
                with _momenta_restored(self._model):
                    update_bn(large or self._batches, self._model)
        losses = [self._batch_losses(i, x, y) for i, (x, y) in enumerate(self._batches)]
        adv, nat = (torch.cat(part).tolist() for part in zip(*losses, strict=True))
        return adv, nat

    def _batch_losses(self, i: int, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        with seeded(x.device, self._seed, i, SEED_NAME):
            if self._examples is not None:
                return self._cross_entropies(self._examples[i], x, y)
            if self._graphs.applies_to(x.device):
                return self._graphs(self._attack_and_measure, (x, y), module_key(self._model))
            return self._attack_and_measure(x, y)

    def _attack_and_measure(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = perturb("the attack", self._attack, self._model, x, y)
        return self._cross_entropies(x_adv, x, y)

    def _cross_entropies(self, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        oracle = ModelOracle(self._model, x, y)
        adv, nat = (ce(oracle.logits(z), y).double() for z in (x_adv, x))
        return adv, nat

    def _generate(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        with seeded(x.device, self._seed, i, SEED_NAME):
            return perturb("the attack", self._attack, self._model, x, y)


@contextmanager
def _momenta_restored(model: nn.Module) -> Iterator[None]:
    """Restore the momenta of BatchNorm layers, which torch's ``update_bn`` only does at its end."""
    momenta = [(m, m.momentum) for m in model.modules() if hasattr(m, "momentum")]
    try:
        yield
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum
