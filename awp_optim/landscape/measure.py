"""Loss curves and surfaces: losses at many points of weight space, resumable, on all ranks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from awp_optim._utils.attacking import check_attack
from awp_optim._utils.batches import NO_DATA, Data, batches, device_of, to_device
from awp_optim._utils.checks import describe
from awp_optim._utils.distributed import Ranks
from awp_optim._utils.identity import identify
from awp_optim._utils.journal import checksum
from awp_optim._utils.model_state import in_mode
from awp_optim._utils.optional import require_numpy
from awp_optim._utils.progress import progress_bar
from awp_optim.attacks.captured import unwrap
from awp_optim.landscape.directions import Direction, named_direction
from awp_optim.landscape.journal import LandscapeJournal, PointLosses
from awp_optim.landscape.probe import (
    UNPERTURBED,
    LossProbe,
    MovableWeights,
    Options,
    Point,
    check_model,
)
from awp_optim.landscape.results import LossCurve, LossSurface

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["loss_curve", "loss_surface"]


def loss_curve(
    model: nn.Module,
    data: Data,
    attack: Callable[..., Tensor],
    alphas: Sequence[float] | Array,
    direction: Direction | Sequence[Direction],
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    pregenerated: bool = False,
    recompute_bn: bool = False,
    seed: int | None = 0,
    state: str | os.PathLike[str] | None = None,
    key: str | None = None,
    progress: bool = True,
) -> LossCurve:
    """The loss at ``w + alpha d``, adversarial and natural, Eq. (5).

    The model is in eval mode, and BatchNorm uses its running statistics. Afterwards, also after an
    exception or Ctrl-C, the model is restored bit for bit. All data are kept on the device. Each
    batch gets the same random numbers at every point, so points differ only in their weights.

    On a GPU, an attack of this package and the two losses are captured as one CUDA graph per batch
    size, which is replayed at every point. If torch.distributed is initialized, as under torchrun,
    the processes share the points: all must call this with the same arguments, and all get the same
    curve.

    Args:
        model: maps inputs to logits (N, C); not wrapped in DistributedDataParallel.
        data: batches (x, y), as from a DataLoader; one pair (x, y); or a torch Dataset of examples.
            x: floating point, shape (N, ...), in the range of the attack's ``clip``; y: class
            indices from 0, shape (N,). The paper uses the training images.
        attack: generates the adversarial examples: an attack of this package, or any function
            ``(model, x, y) -> x_adv``. The paper uses PGD-10.
        alphas: distances, any numbers in any order; 0 is always measured.
        direction: one, or several: a dict from parameter names to tensors, or what
            ``AWP.perturbation()`` returns.
        batch_size: cut the data into batches of this size; None keeps given batches, and cuts a
            pair or a Dataset into batches of 128.
        device: the device to compute on, which must hold the model; None uses the device of its
            first parameter.
        pregenerated: attack only the unperturbed model, and use these examples at every point, as
            was usual before the paper. This underestimates the loss.
        recompute_bn: recompute BatchNorm's statistics at every point from the natural examples, as
            the mean over the batches. The paper does not.
        seed: the seed of the attacks; None uses torch's generators without seeding them.
        state: a file that saves each point once it is measured. Later calls, also with more alphas
            or directions, measure only the missing points.
        key: a name for an attack that ``state`` cannot identify by itself: a function, or a custom
            attack that is not a dataclass of plain settings. Choose another key whenever its code
            changes.
        progress: show a progress bar on a terminal, if rich is installed.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: there is no data; a label is not among the model's classes; a direction does not
            fit the model or is not finite; alphas are not finite; ``state`` belongs to another
            model, data or attack, or needs a ``key``.
        OSError: ``state`` cannot be read or written.
        ImportError: numpy is not installed.

    Example:
        >>> from awp_optim.attacks import FGSM
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> x, y = torch.tensor([[0.5]]), torch.tensor([0])
        >>> d = {"weight": torch.tensor([[1.0], [-1.0]])}
        >>> c = loss_curve(model, (x, y), FGSM(eps=0.25), [0.0, 1.0], d)
        >>> c.nat_loss.round(4).tolist(), c.adv_loss.round(4).tolist()  # log(1 + exp(-2 x (1 + a)))
        ([0.3133, 0.1269], [0.4741, 0.3133])
    """
    require_numpy("loss_curve")
    axis = _axis("alphas", alphas)
    directions = [direction] if isinstance(direction, Mapping) else list(direction)
    if not directions:
        raise ValueError("direction must be one direction or several, got none")
    points = [_point((i, a)) for i in range(len(directions)) for a in axis.tolist()]
    options = Options(batch_size, device, pregenerated, recompute_bn, seed, state, key, progress)
    measured = _measure(model, data, attack, directions, points, options)
    shape = len(directions), len(axis)
    adv, nat = (_grid(measured, points, shape, of) for of in ("adv", "nat"))
    return LossCurve(
        alphas=axis,
        adv_loss=adv.mean(0),
        nat_loss=nat.mean(0),
        adv_losses=adv,
        nat_losses=nat,
        **_errors_and_center(measured, points, shape),
    )


def loss_surface(
    model: nn.Module,
    data: Data,
    attack: Callable[..., Tensor],
    alphas: Sequence[float] | Array,
    betas: Sequence[float] | Array,
    directions: Sequence[Direction],
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    pregenerated: bool = False,
    recompute_bn: bool = False,
    seed: int | None = 0,
    state: str | os.PathLike[str] | None = None,
    key: str | None = None,
    progress: bool = True,
) -> LossSurface:
    """The loss at ``w + alpha d + beta e``, as in Figure 6 of the paper.

    ``alphas`` and ``betas`` are the distances along the first and the second of the two
    ``directions``, d and e. All other arguments and the errors are those of :func:`loss_curve`.
    """
    require_numpy("loss_surface")
    rows, columns = _axis("alphas", alphas), _axis("betas", betas)
    if isinstance(directions, Mapping) or len(directions) != 2:
        raise ValueError("directions must be a pair of two directions, (d, e)")
    points = [_point((0, a), (1, b)) for a in rows.tolist() for b in columns.tolist()]
    options = Options(batch_size, device, pregenerated, recompute_bn, seed, state, key, progress)
    measured = _measure(model, data, attack, list(directions), points, options)
    shape = len(rows), len(columns)
    return LossSurface(
        alphas=rows,
        betas=columns,
        adv_loss=_grid(measured, points, shape, "adv"),
        nat_loss=_grid(measured, points, shape, "nat"),
        **_errors_and_center(measured, points, shape),
    )


def _axis(name: str, values: Sequence[float] | Array) -> Array:
    import numpy as np

    try:
        axis = np.array(values, dtype=np.float64)  # a copy, because the caller may change the array
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers, got {describe(values)}") from error
    if axis.ndim != 1 or not len(axis):
        raise ValueError(f"{name} must be a list of numbers, got shape {axis.shape}")
    if not np.isfinite(axis).all():
        raise ValueError(f"{name} must be finite, got {axis[~np.isfinite(axis)].tolist()}")
    return axis


def _point(*terms: tuple[int, float]) -> Point:
    return tuple((number, alpha) for number, alpha in terms if alpha != 0)


def _grid(
    measured: Mapping[Point, PointLosses], points: list[Point], shape: tuple[int, int], name: str
) -> Array:
    """One of the values measured at the points."""
    import numpy as np

    values = [getattr(measured[point], name) for point in points]
    return np.array(values, dtype=np.float64).reshape(shape)


def _errors_and_center(
    measured: Mapping[Point, PointLosses], points: list[Point], shape: tuple[int, int]
) -> dict[str, Any]:
    """The fields that curves and surfaces share."""
    center = measured[UNPERTURBED]
    errors = ("adv_stderr", "nat_stderr", "rise_stderr")
    grids = {name: _grid(measured, points, shape, name) for name in errors}
    return {**grids, "adv_center": center.adv, "nat_center": center.nat, "n": center.n}


def _measure(
    model: nn.Module,
    data: Data,
    attack: Callable[..., Tensor],
    directions: list[Direction],
    points: list[Point],
    options: Options,
) -> dict[Point, PointLosses]:
    """The losses at each point, and at the unperturbed weights, relative to which losses rise."""
    check_model(model)
    check_attack("attack", attack)
    named = [named_direction(model, direction) for direction in directions]
    device = device_of(model, options.device)
    loaded = [to_device(x, y, device) for x, y in batches(data, options.batch_size)]
    if not loaded:
        raise ValueError(NO_DATA)
    settings = _settings(model, attack, loaded, options)
    ranks = Ranks()
    journal = LandscapeJournal(options.state, settings, named, ranks)
    recorded = {point: journal.recorded(point) for point in [UNPERTURBED, *points]}
    measured = {point: losses for point, losses in recorded.items() if losses is not None}
    todo = [point for point in recorded if point not in measured]
    bar = progress_bar("landscape", len(todo), show=options.progress and ranks.rank == 0)
    weights = MovableWeights(model, named)
    with torch.inference_mode(mode=False), in_mode(model, "eval"), bar as advance, journal, weights:
        probe = LossProbe(model, weights, loaded, attack, options)
        for point, losses in _share(todo, measured, probe, ranks):
            measured[point] = losses
            journal.note(point, losses)
            advance("landscape")
    return measured


def _share(
    points: list[Point], measured: Mapping[Point, PointLosses], probe: LossProbe, ranks: Ranks
) -> Iterator[tuple[Point, PointLosses]]:
    """Measure points on all ranks at once, and yield all of them on each rank."""
    for turn in _turns(points, ranks.world):
        own: PointLosses | None = None
        if ranks.rank < len(turn):
            adv, nat = probe.losses_at(turn[ranks.rank])
            own = PointLosses.of(adv, nat, measured.get(UNPERTURBED))
        yield from zip(turn, ranks.gather(own), strict=False)


def _turns(points: list[Point], world: int) -> Iterator[list[Point]]:
    """Groups of points that are measured at once, one point per rank.

    The unperturbed weights are measured first, alone, because all rises are relative to them.
    """
    if UNPERTURBED in points:
        yield [UNPERTURBED]
    others = [point for point in points if point != UNPERTURBED]
    for start in range(0, len(others), world):
        yield others[start : start + world]


def _settings(
    model: nn.Module,
    attack: Callable[..., Tensor],
    batches: list[tuple[Tensor, Tensor]],
    options: Options,
) -> dict[str, Any]:
    """Everything that determines the losses, for the state file; empty if there is no file."""
    if options.state is None:
        return {}
    return {
        "model": identify("the model", model, options.key),
        "data": checksum(itertools.chain.from_iterable(batches)),
        "attack": identify("the attack", unwrap(attack), options.key),
        "pregenerated": options.pregenerated,
        "recompute_bn": options.recompute_bn,
        "seed": options.seed,
        "key": options.key,
    }
