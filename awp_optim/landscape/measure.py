"""Weight loss landscapes: the loss along directions in weight space, adversarial examples included.

    d = filter_normalized_direction(model, torch.Generator().manual_seed(0))
    c = loss_curve(model, (x, y), PGD(steps=10), np.linspace(-1, 1, 21), d)
    c.adv_loss, c.nat_loss, c.sharpness(0.5), c.flat_width()

Eq. (5) and Algorithm 1 of Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust
Generalization" (NeurIPS 2020): ``g(alpha) = rho(w + alpha d)``, where the adversarial loss ``rho``
is the mean cross-entropy on examples that are made anew for every perturbed model.

Directions: filter-normalised Gaussians (Li et al., "Visualizing the loss landscape of neural nets",
NeurIPS 2018), AWP's own (:func:`awp_direction`), that of the paper's random baseline
(:func:`rwp_direction`), or any dict from parameter names to tensors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import update_bn

from awp_optim._core.perturbation import arithmetic_dtype
from awp_optim._cuda_graphs.graphs import Graphs, module_key
from awp_optim._utils.batches import NO_DATA, Data, batches, device_of, seeded
from awp_optim._utils.checks import check_int, describe
from awp_optim._utils.distributed import Ranks
from awp_optim._utils.journal import Journal, checksum
from awp_optim._utils.progress import progress_bar
from awp_optim.attacks import Attack
from awp_optim.attacks.base import ModelOracle, in_mode
from awp_optim.attacks.captured import attack_id, unwrap
from awp_optim.attacks.losses import ce
from awp_optim.optimizer import AWP

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = [
    "LossCurve",
    "LossSurface",
    "Sharpness",
    "awp_direction",
    "filter_normalized_direction",
    "loss_curve",
    "loss_surface",
    "rwp_direction",
]

Direction = Mapping[str, Tensor] | Mapping[Tensor, Tensor]
"""Tensors by the names of the parameters that they move; or, as ``AWP.perturbation()`` gives them,
by the parameters themselves."""

_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Sharpness:
    """How much the adversarial loss rises at a distance, on both sides where the curve has both.

    Attributes:
        mean: g(alpha) - g(0), mean over directions and sides.
        worst: the highest of them.
        relative: |g(alpha) - g(0)|, the paper's relative landscape, mean over directions and sides.
        stderr: standard error of ``mean``, the examples being a sample; at most that, for each
            direction's error counts as if it were that of all.
    """

    mean: float
    worst: float
    relative: float
    stderr: float


class _Landscape:
    def to_dict(self) -> dict[str, Any]:
        """Everything, for ``json.dump``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in values.items()}


@dataclass(frozen=True)
class LossCurve(_Landscape):
    """The loss along directions in weight space; float64 arrays, A alphas and D directions.

    Attributes:
        alphas: distances, shape (A,), in the order given.
        adv_loss: adversarial loss there, mean over the directions, shape (A,).
        nat_loss: the loss on the examples as they are, the same.
        adv_losses, nat_losses: the losses along each direction, shape (D, A).
        adv_stderr, nat_stderr: their standard errors, the examples being a sample of all there
            could be; shape (D, A). NaN for one example.
        rise_stderr: standard errors of ``adv_losses - adv_center``, example by example; (D, A).
        adv_center, nat_center: the losses of the unperturbed model, g(0).
        n: how many examples.
    """

    alphas: Array
    adv_loss: Array
    nat_loss: Array
    adv_losses: Array = field(repr=False)
    nat_losses: Array = field(repr=False)
    adv_stderr: Array = field(repr=False)
    nat_stderr: Array = field(repr=False)
    rise_stderr: Array = field(repr=False)
    adv_center: float
    nat_center: float
    n: int

    def sharpness(self, alpha: float) -> Sharpness:
        """How sharp the adversarial landscape is at distance ``alpha``; between points, linearly.

        Args:
            alpha: above 0. Where the curve goes to both sides, alpha and -alpha both count.

        Raises:
            ValueError: it is not above 0, or the curve does not reach it on any side.
        """
        at, errors = self.rises(alpha), self._at(alpha, self.rise_stderr)
        return Sharpness(
            float(at.mean()), float(at.max()), float(abs(at).mean()), float(errors.mean())
        )

    def rises(self, alpha: float) -> Array:
        """g(alpha) - g(0) of the adversarial loss, by direction and side; shape (D, 1 or 2).

        Args, raises: as of :meth:`sharpness`.
        """
        return self._at(alpha, self.adv_losses - self.adv_center)

    def _at(self, alpha: float, values: Array) -> Array:
        """Values of shape (D, A) at alpha and -alpha, as far as the curve reaches."""
        import numpy as np

        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be a distance above 0, got {alpha!r}")
        order = np.argsort(self.alphas, kind="stable")
        x = self.alphas[order]
        sides = [side for side in (alpha, -alpha) if x[0] <= side <= x[-1]]
        if not sides:
            raise ValueError(
                f"the curve spans {x[0]:g} to {x[-1]:g}: it reaches neither {alpha:g} nor "
                f"{-alpha:g}"
            )
        return np.array([[np.interp(side, x, line) for side in sides] for line in values[:, order]])

    def flat_width(self, rise: float = 0.1) -> float:
        """How far one can go until the adversarial loss has risen by a share of g(0).

        Along the mean over the directions, linearly between points, from the centre to the first
        place where it is above ``(1 + rise) * g(0)``.

        Args:
            rise: the share, above 0.

        Returns:
            The width, both sides together where the curve goes to both; infinite if on a side the
            curve ends before it has risen so far.

        Raises:
            ValueError: ``rise`` is not above 0, or the curve does not leave the centre.
        """
        import numpy as np

        if not 0 < rise < math.inf:
            raise ValueError(f"rise must be above 0, got {rise!r}")
        level = (1 + rise) * self.adv_center
        width, left = 0.0, False
        for sign in (1, -1):
            ahead = sign * self.alphas > 0
            if not ahead.any():
                continue
            left = True
            order = np.argsort(np.abs(self.alphas[ahead]), kind="stable")
            before, below = 0.0, self.adv_center
            for distance, loss in zip(
                np.abs(self.alphas[ahead])[order], self.adv_loss[ahead][order], strict=True
            ):
                if not loss <= level:  # a loss that is not a number counts as a rise
                    share = (level - below) / (loss - below) if math.isfinite(loss) else 0.0
                    width += before + share * (distance - before)
                    break
                before, below = distance, loss
            else:
                return math.inf
        if not left:
            raise ValueError("the curve does not leave the centre: give other alphas than 0")
        return float(width)


@dataclass(frozen=True)
class LossSurface(_Landscape):
    """The loss on a plane in weight space; float64 arrays of shape (A, B).

    Attributes:
        alphas, betas: distances along the two directions, shapes (A,) and (B,).
        adv_loss, nat_loss: the losses at ``w + alphas[i] d + betas[j] e``.
        adv_stderr, nat_stderr: their standard errors.
        rise_stderr: those of ``adv_loss - adv_center``, example by example.
        adv_center, nat_center: the losses of the unperturbed model, g(0, 0).
        n: how many examples.
    """

    alphas: Array
    betas: Array
    adv_loss: Array
    nat_loss: Array
    adv_stderr: Array = field(repr=False)
    nat_stderr: Array = field(repr=False)
    rise_stderr: Array = field(repr=False)
    adv_center: float
    nat_center: float
    n: int

    @property
    def relative(self) -> Array:
        """|g(alpha, beta) - g(0, 0)|, which the paper draws in Figure 6; shape (A, B)."""
        return abs(self.adv_loss - self.adv_center)


# --- Directions -------------------------------------------------------------------------------


@torch.no_grad()
def filter_normalized_direction(
    model: nn.Module, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """A Gaussian direction, each filter as long as the model's own (lines 2 to 7 of Algorithm 1).

    ``d_lj <- d_lj / |d_lj|_F * |w_lj|_F`` for filter j of layer l: of a convolution all weights of
    an output channel, of other matrices a row. Networks that are the same function but for the
    scale of their filters have the same landscape along it. It is zero for biases, for norm layers
    and for whatever has fewer than two dimensions, as in Li et al. (2018), and where a filter is
    zero.

    Args:
        model: any module; it is not changed.
        generator: of the random numbers; None for torch's own on the CPU. One on the CPU gives the
            same direction wherever the model is.

    Returns:
        A tensor for each parameter, by name; shaped as it and on its device, in float32 at least.

    Raises:
        ValueError: the model has no weight that it could be of, or lazy ones.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> d = filter_normalized_direction(model, torch.Generator().manual_seed(0))
        >>> torch.allclose(d["weight"].norm(dim=1), model.weight.norm(dim=1)), d["bias"]
        (True, tensor([0., 0.]))
    """
    direction = {}
    for name, p in _parameters(model).items():
        module = model.get_submodule(name.rpartition(".")[0])
        if p.ndim < 2 or isinstance(module, _NORMS) or name.rpartition(".")[2] == "bias":
            direction[name] = torch.zeros_like(p, dtype=arithmetic_dtype(p.dtype))
            continue
        d, w = _gaussian(p, generator), p.to(arithmetic_dtype(p.dtype))
        if isinstance(module, _TRANSPOSED):  # (in, out / groups, ...): a filter is of an output
            d, w = (t.reshape(module.groups, -1, *p.shape[1:]) for t in (d, w))
            within: tuple[int, ...] = (1, *range(3, d.ndim))
        else:
            within = tuple(range(1, d.ndim))
        ours, theirs = (torch.linalg.vector_norm(t, dim=within, keepdim=True) for t in (d, w))
        direction[name] = (d * torch.where(ours > 0, theirs / ours, 0)).reshape(p.shape)
    if not any(bool(d.any()) for d in direction.values()):
        raise ValueError(
            "the direction is zero: the model has no weights of two dimensions or more that are "
            "not zero themselves, biases and norm layers aside"
        )
    return direction


@torch.no_grad()
def rwp_direction(model: nn.Module, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """The paper's random weight perturbation of gamma = 1: Gaussian, |d_l| = |w_l| in each tensor.

    Along it alpha is RWP's gamma: the blue lines of Figure 3 (a).

    Args:
        model: any module; it is as before when this returns.
        generator: as of :func:`filter_normalized_direction`.

    Returns:
        A tensor for each parameter that is moved (those with two dimensions or more), by name.

    Raises:
        ValueError: the model has lazy parameters.
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
    """AWP's own v for gamma = 1, Eq. (10): the layer-wise normalised gradient of the loss on data.

    Along it alpha is AWP's gamma: the red line of Figure 3 (a). Unlike in training, v is that of
    all the data, and of one ascent; the model is in eval mode.

    Args:
        model: any module; it is as before when this returns.
        data, batch_size, device, seed: as of :func:`loss_curve`.
        attack: makes the examples on which the loss is climbed.

    Returns:
        A tensor for each parameter that is moved (two dimensions or more, ``requires_grad``), by
        name.

    Raises:
        TypeError, ValueError: as of :func:`loss_curve`; or the gradient is zero or not finite.
    """
    _check_model(model)
    device = device_of(model, device)
    weights = [p for p in _parameters(model).values() if p.ndim >= 2 and p.requires_grad]
    if not weights:
        raise ValueError(
            "the model has no weights of two dimensions or more that require gradients"
        )
    total: dict[int, Tensor] = {}
    empty = True
    with torch.inference_mode(False), in_mode(model, "eval"), _home(model, ()):
        for i, (x, y) in enumerate(batches(data, batch_size)):
            x, y = x.to(device or x.device), y.to(device or y.device, torch.int64)
            with seeded(x.device, seed, i, _SEED):
                x_adv = _attacked(attack, model, x, y)
            with torch.enable_grad():
                loss = ce(ModelOracle(model, x, y).forward(x_adv), y).sum()
                grads = torch.autograd.grad(loss, weights, allow_unused=True)
            for j, g in enumerate(grads):
                if g is not None:
                    total[j] = g.to(arithmetic_dtype(g.dtype)) + total.get(j, 0)
            empty = False
    if empty:
        raise ValueError(NO_DATA)
    direction = _layerwise(model, {weights[j]: g for j, g in total.items()})
    if not any(bool(d.any()) for d in direction.values()):
        raise ValueError("the gradient is zero or not finite: there is no adversarial direction")
    return direction


def _layerwise(model: nn.Module, along: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    """Eq. (10) with gamma = 1: each tensor scaled to its weights' norm, by the optimizer itself."""
    if not along:
        raise ValueError("the model has no weights of two dimensions or more")
    optimizer = AWP(list(along), torch.optim.SGD, gamma=1.0, lr=0.0)
    # Normalised before, for what half precision could not hold.
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
    found: dict[str, Tensor] = dict(model.named_parameters())
    if any(is_lazy(p) for p in found.values()):
        raise ValueError("the model has lazy parameters: show it a batch first")
    return found


# --- Landscapes -------------------------------------------------------------------------------


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
    progress: bool = True,
) -> LossCurve:
    """The loss at ``w + alpha d``, adversarial and natural, Eq. (5).

    The model is in eval mode, BatchNorm with the statistics it has. Afterwards, also after an
    exception or Ctrl-C, it is as before, bit for bit. The data stay on the device; every batch
    meets the same random numbers at every point, so that points differ by their weights alone.
    On a GPU an attack of this package and the two losses are one CUDA graph a batch size, replayed
    at every point. Where torch.distributed is initialised, as under torchrun, the points are shared
    out over the processes, which all must call this with the same arguments and get the same curve.

    Args:
        model: maps inputs to logits (N, C); the module itself, not its DistributedDataParallel.
        data: batches (x, y), as a DataLoader gives them; or one pair of tensors. x: floating
            point, shape (N, ...), in the range that the attack's ``clip`` names; y: class indices,
            shape (N,). The paper's are the training images.
        attack: makes the adversarial examples: an attack of this package, or any function
            ``(model, x, y) -> x_adv``. The paper's is PGD-10.
        alphas: distances, any number in any order; 0 is always looked at.
        direction: one, or several; see the module's text.
        batch_size: cut the data to batches of this size; None takes batches as they come, and a
            pair of tensors 128 at a time.
        device: where the model is, and data are moved to; None: where its first parameter is.
        pregenerated: attack the unperturbed model alone, and show these examples to all. That is
            how landscapes were drawn before the paper, and understates the loss.
        recompute_bn: at every point, BatchNorm's statistics anew from the data as they are, by the
            mean over the batches. The paper does not.
        seed: of the attacks; None leaves torch's generators alone, and results to chance.
        state: a file that holds every point as soon as it is done. Called again, also with more
            alphas or directions, only the points that it lacks are computed.
        progress: show a bar on a terminal, if rich is installed.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is no data; a direction does not fit the model or is not finite; alphas
            are not; ``state`` is of another model, data or attack. Nothing has been changed.
        OSError: ``state`` cannot be read or written.

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
    axis = _axis("alphas", alphas)
    directions = [direction] if isinstance(direction, Mapping) else list(direction)
    if not directions:
        raise ValueError("direction must be one or more, got none")
    points = [_point((i, a)) for i in range(len(directions)) for a in axis.tolist()]
    how = _How(batch_size, device, pregenerated, recompute_bn, seed, state, progress)
    found = _measure(model, data, attack, directions, points, how)
    adv, nat, adv_se, nat_se, rise_se = _arrays(found, points, (len(directions), len(axis)))
    return LossCurve(
        axis, adv.mean(0), nat.mean(0), adv, nat, adv_se, nat_se, rise_se, *_centre(found)
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
    progress: bool = True,
) -> LossSurface:
    """The loss at ``w + alpha d + beta e``, as in Figure 6 of the paper.

    Args:
        alphas, betas: distances along the first and the second direction.
        directions: two of them, d and e.
        model, data, attack, batch_size, device, pregenerated, recompute_bn, seed, state, progress:
            as of :func:`loss_curve`.

    Raises:
        TypeError, ValueError, OSError: as of :func:`loss_curve`; or there are not two directions.
    """
    rows, columns = _axis("alphas", alphas), _axis("betas", betas)
    if isinstance(directions, Mapping) or len(directions) != 2:
        raise ValueError("directions must be two, (d, e)")
    points = [_point((0, a), (1, b)) for a in rows.tolist() for b in columns.tolist()]
    how = _How(batch_size, device, pregenerated, recompute_bn, seed, state, progress)
    found = _measure(model, data, attack, list(directions), points, how)
    adv, nat, adv_se, nat_se, rise_se = _arrays(found, points, (len(rows), len(columns)))
    return LossSurface(rows, columns, adv, nat, adv_se, nat_se, rise_se, *_centre(found))


Point = tuple[tuple[int, float], ...]
"""Where to look: directions by number and how far along each; () is the centre."""
Found = dict[Point, dict[str, Any]]


@dataclass(frozen=True)
class _How:
    """The settings of :func:`loss_curve`, described there."""

    batch_size: int | None
    device: torch.device | str | None
    pregenerated: bool
    recompute_bn: bool
    seed: int | None
    state: str | os.PathLike[str] | None
    progress: bool


_FIGURES = ("adv", "nat", "adv_se", "nat_se", "rise_se")
_SEED = "landscape"


def _point(*terms: tuple[int, float]) -> Point:
    return tuple((i, a) for i, a in terms if a != 0)


def _arrays(found: Found, points: list[Point], shape: tuple[int, int]) -> list[Array]:
    import numpy as np

    rows = [[found[point][name] for point in points] for name in _FIGURES]
    return [np.array(row, dtype=np.float64).reshape(shape) for row in rows]


def _centre(found: Found) -> tuple[float, float, int]:
    centre = found[()]
    return centre["adv"], centre["nat"], centre["n"]


def _axis(name: str, values: Sequence[float] | Array) -> Array:
    import numpy as np

    try:
        axis = np.array(values, dtype=np.float64)  # a copy: the caller may change his
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers, got {describe(values)}") from error
    if axis.ndim != 1 or not len(axis):
        raise ValueError(f"{name} must be a list of numbers, got shape {axis.shape}")
    if not np.isfinite(axis).all():
        raise ValueError(f"{name} must be finite, got {axis[~np.isfinite(axis)].tolist()}")
    return axis


def _measure(
    model: nn.Module,
    data: Data,
    attack: Callable[..., Tensor],
    directions: list[Direction],
    points: list[Point],
    how: _How,
) -> Found:
    """The figures of each point, and of the centre."""
    _check_model(model)
    if not callable(attack):
        raise TypeError(f"attack must be callable, got {describe(attack)}")
    if how.batch_size is not None:
        check_int("batch_size", how.batch_size, least=1)
    device = device_of(model, how.device)
    moves = [_by_name(model, d) for d in directions]
    arrived, crc = [], 0
    for x, y in batches(data, how.batch_size):
        if how.state is not None:
            crc = checksum([torch.tensor(crc), x, y.to(torch.int64)])
        here = device or x.device
        arrived.append((x.to(here), y.to(here, torch.int64)))
    if not arrived:
        raise ValueError(NO_DATA)
    settings = {
        "model": checksum(model.state_dict().values()) if how.state is not None else 0,
        "data": crc,
        "attack": attack_id(attack),
        "pregenerated": how.pregenerated,
        "recompute_bn": how.recompute_bn,
        "seed": how.seed,
    }
    names = [checksum([d[k] for k in sorted(d)]) for d in moves] if how.state is not None else []
    ranks = _Sharers()
    journal, known = ranks.read(how.state, settings)

    def label(point: Point) -> list[list[float]]:
        """A point as the file knows it: what is there may be of other directions, too."""
        return [[names[i], a] for i, a in point] if names else []

    found: Found = {}
    todo: list[Point] = []
    for point in dict.fromkeys([(), *points]):
        entry = known.get(_key(label(point)))
        if entry is None:
            todo.append(point)
        else:
            found[point] = entry
    weights = [p for name, p in _parameters(model).items() if any(name in d for d in moves)]
    with (
        torch.inference_mode(False),
        in_mode(model, "eval"),
        journal,
        progress_bar(how.progress and ranks.rank == 0, "landscape", len(todo)) as advance,
        _home(model, weights) as home,
    ):
        prober = _Prober(model, arrived, attack, how.pregenerated, how.seed)

        def look(point: Point) -> dict[str, Any]:
            home()
            _move(model, [(moves[i], a) for i, a in point])
            if how.recompute_bn:
                with seeded(arrived[0][0].device, how.seed, -1, _SEED):  # dropout's
                    update_bn([b for b in arrived if len(b[1]) > 1] or arrived, model)
            adv, nat = prober.losses()
            base = adv if point == () else found[()]["losses"]
            entry: dict[str, Any] = {"point": label(point), "n": len(adv)}
            entry |= {"adv": _mean(adv), "nat": _mean(nat)}
            entry |= {"adv_se": _stderr(adv), "nat_se": _stderr(nat)}
            entry["rise_se"] = _stderr([a - b for a, b in zip(adv, base, strict=True)])
            if point == ():
                entry["losses"] = adv
            return entry

        if todo and todo[0] == ():  # each needs it, to tell by how much the loss rises
            todo.pop(0)
            found[()] = ranks.broadcast(look(()))
            journal.add(found[()])
            advance("landscape")
        for start in range(0, len(todo), ranks.world):
            at_once = todo[start : start + ranks.world]
            mine = look(at_once[ranks.rank]) if ranks.rank < len(at_once) else None
            for point, entry in zip(at_once, ranks.gather(mine), strict=False):
                assert entry is not None
                found[point] = entry
                journal.add(entry)
                advance("landscape")
    return found


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a module, whose weights can be moved, got {describe(model)}"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "give the module itself, model.module: points, not batches, are shared out"
        )


def _by_name(model: nn.Module, direction: Direction) -> dict[str, Tensor]:
    """A direction by names, checked against the model."""
    if not isinstance(direction, Mapping):
        raise TypeError(
            f"a direction must be a dict from parameter names to tensors, got {describe(direction)}"
        )
    parameters = _parameters(model)
    of_tensor = {p: name for name, p in parameters.items()}
    named: dict[str, Tensor] = {}
    for key, d in direction.items():
        name = of_tensor.get(key, "") if isinstance(key, Tensor) else key
        if name not in parameters:
            raise ValueError(
                f"the direction is of a parameter that the model does not have, {describe(key)}; "
                f"it has {', '.join(list(parameters)[:5])}, ..."
            )
        p = parameters[name]
        if not isinstance(d, Tensor) or d.shape != p.shape:
            raise ValueError(
                f"the direction of {name} must be a tensor of shape {tuple(p.shape)}, got "
                f"{describe(d)}"
            )
        if not bool(d.isfinite().all()):
            raise ValueError(f"the direction of {name} is not finite")
        named[name] = d.detach().to(p.device)
    if not named:
        raise ValueError("a direction is empty: it moves no parameter")
    return named


@contextmanager
def _home(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[Callable[[], None]]:
    """Bring these weights and all buffers home, bit for bit, on the way out and when called."""
    tensors = [*weights, *model.buffers()]
    copies = [t.detach().clone() for t in tensors]

    @torch.no_grad()
    def home() -> None:
        for t, copy in zip(tensors, copies, strict=True):
            t.copy_(copy)
        torch.clear_autocast_cache()  # else it goes on with copies of the weights before

    try:
        yield home
    finally:
        try:
            home()
        except BaseException:  # a Ctrl-C more
            home()
            raise


@torch.no_grad()
def _move(model: nn.Module, terms: list[tuple[Mapping[str, Tensor], float]]) -> None:
    """The weights from w, home, to ``w + sum of a d``, computed in float32 at least."""
    for name, p in model.named_parameters():
        moved = p.to(arithmetic_dtype(p.dtype))
        for d, a in terms:
            if name in d:
                moved = torch.add(moved, d[name], alpha=a)
        if moved is not p:
            p.copy_(moved)


class _Prober:
    """What is asked at every point: the losses of all examples, attacked and as they are."""

    def __init__(
        self,
        model: nn.Module,
        data: list[tuple[Tensor, Tensor]],
        attack: Callable[..., Tensor],
        pregenerated: bool,
        seed: int | None,
    ) -> None:
        self._model, self._data, self._attack, self._seed = model, data, unwrap(attack), seed
        of_ours = isinstance(self._attack, Attack) and not hasattr(self._attack, "parts")
        self._graphs = Graphs("auto" if of_ours else False, "the landscape's step")
        self._made: list[Tensor] | None = None
        if pregenerated:
            self._made = [self._make(i, x, y) for i, (x, y) in enumerate(data)]

    def losses(self) -> tuple[list[float], list[float]]:
        """Cross-entropies, adversarial and natural. The device is waited for once, at the end."""
        found: list[tuple[Tensor, ...]] = []
        for i, (x, y) in enumerate(self._data):
            with seeded(x.device, self._seed, i, _SEED):
                if self._made is not None:
                    found.append(self._both(self._made[i], x, y))
                elif self._graphs.applies_to(x.device):
                    found.append(self._graphs(self._step, (x, y), module_key(self._model)))
                else:
                    found.append(self._step(x, y))
        adv, nat = (torch.cat(part).tolist() for part in zip(*found, strict=True))
        return adv, nat

    def _make(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        with seeded(x.device, self._seed, i, _SEED):
            return _attacked(self._attack, self._model, x, y)

    def _step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._both(_attacked(self._attack, self._model, x, y), x, y)

    def _both(self, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        oracle = ModelOracle(self._model, x, y)
        adv, nat = (ce(oracle.logits(z), y).double() for z in (x_adv, x))
        return adv, nat


def _attacked(attack: Any, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What the attack returns; BatchNorm's statistics, which a train-mode attack moves, stay."""
    in_eval = getattr(unwrap(attack), "model_mode", None) == "eval"
    kept = [] if in_eval else [(b, b.clone()) for b in model.buffers()]
    x_adv = attack(model, x, y)
    with torch.no_grad():
        for b, before in kept:
            b.copy_(before)
    if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
        raise TypeError(
            f"the attack must return a tensor of shape {tuple(x.shape)}, got {describe(x_adv)}"
        )
    return x_adv.detach()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _stderr(values: Sequence[float]) -> float:
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return math.nan
    mean = _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


class _Sharers(Ranks):
    """The processes that share the points."""

    def read(
        self, state: str | os.PathLike[str] | None, settings: dict[str, Any]
    ) -> tuple[Journal, dict[str, dict[str, Any]]]:
        """The first's file, and what is in it, known to all; its error is all's."""
        journal = Journal(None, _KIND, settings)
        answer: Any = None
        if self.rank == 0:
            try:
                journal = Journal(state, _KIND, settings)
                answer = _known(journal)
            except (OSError, ValueError) as error:
                answer = error
        answer = self.broadcast(answer)
        if isinstance(answer, Exception):
            raise answer
        return journal, answer


_KIND = "a landscape"


def _known(journal: Journal) -> dict[str, dict[str, Any]]:
    """The points in a file, by what it calls them."""
    try:
        for entry in journal.entries:
            needed = {*_FIGURES, "n", *(() if entry["point"] else ("losses",))}
            if not needed <= entry.keys():
                raise ValueError("an entry lacks its figures")
        return {_key(entry["point"]): entry for entry in journal.entries}
    except (KeyError, TypeError, ValueError) as error:
        raise journal.damaged(error) from error


def _key(label: list[list[float]]) -> str:
    return repr([[int(name), float(a)] for name, a in label])
