"""The paper's figures of finished runs: what they show, measured, drawn, and in numbers.

Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust Generalization" (NeurIPS 2020),
Figures 1 to 11. :data:`FIGURES` names them. Each is a function of runs, grouped by
:func:`~awp_optim.lab.reports.runs.grouped`, and of the
:class:`~awp_optim.lab.reports.landscapes.Landscapes` to measure with; it returns drawings, or
raises :class:`~awp_optim.lab.reports.runs.NotEnough` if the runs do not allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy import stats
from torch import Tensor, nn

from awp_optim.lab.reports import plots
from awp_optim.lab.reports.landscapes import Landscapes, file_name
from awp_optim.lab.reports.runs import Groups, NotEnough, Run, by_gamma, comparable
from awp_optim.lab.reports.sharpness import correlations, rise_differences, sharpness_table
from awp_optim.lab.reports.summary import Cells, Runs, accuracies, spread
from awp_optim.lab.run_folder import best, reported
from awp_optim.landscape import LossCurve, LossSurface

__all__ = ["FIGURES", "Drawing"]

Array = np.ndarray[Any, Any]
Tables = list[tuple[str, Cells]]
T = TypeVar("T")

DIRECTIONS = 10
"""How many directions Figure 5 shows at least."""
COLUMNS = 3
"""How many surfaces Figure 6 shows side by side."""


@dataclass(frozen=True)
class Drawing:
    """A picture that can be drawn, and its content in numbers.

    Attributes:
        name: of its file, without a suffix.
        title: put above it.
        caption: what it shows, and how that was measured.
        draw: writes it to a file, with a title.
        tables: titles and cells.
        measured: what is drawn: curves, surfaces or rows, in lists and dicts.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Path, str], None]
    tables: Tables = field(default_factory=list)
    measured: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def data(self) -> dict[str, Any]:
        """What is drawn, for ``json.dump``."""
        return {str(label): _jsonable(value) for label, value in self.measured.items()}


# --- Figures ----------------------------------------------------------------------------------

Figure = Callable[[Groups, Landscapes], list[Drawing]]
FIGURES: dict[str, Figure] = {}
"""Every figure by name, in the order of a gallery; the docstrings say what they show."""


def _figure(draw: Callable[[Groups, Landscapes], Iterator[Drawing]]) -> Figure:
    """Adds a figure to :data:`FIGURES`, under the name of its function."""

    @wraps(draw)
    def figure(groups: Groups, landscapes: Landscapes) -> list[Drawing]:
        return list(draw(groups, landscapes))

    FIGURES[draw.__name__.replace("_", "-")] = figure
    return figure


@_figure
def learning(groups: Groups, landscapes: Landscapes) -> Iterator[Drawing]:
    """Learning curves and the generalization gap."""
    labels, size = list(groups), plots.MAX_PAIRS
    pages = [labels[i : i + size] for i in range(0, len(labels), size)]
    title = "Learning curves and the robust generalization gap"
    for name, heading, page in _numbered("learning", title, pages):
        runs = {label: comparable(groups[label]) for label in page}
        yield Drawing(
            name,
            heading,
            f"{_about({label: groups[label] for label in page})}; robust accuracy under PGD by"
            " epoch (Figures 1, 7 to 11).",
            partial(plots.learning_curves, runs),
            [("Accuracy in %", accuracies(runs))],
            runs,
        )


@_figure
def methods(groups: Groups, landscapes: Landscapes) -> Iterator[Drawing]:
    """Landscapes of the methods, beside their generalization gaps."""
    compared = {label: runs for label, runs in groups.items() if not runs[0].is_random}
    if len(compared) < 2:
        raise NotEnough("there is only one setting, and nothing to compare it with")
    yield _comparison("methods", "Landscapes of the methods", "1", compared, landscapes)


@_figure
def epochs(groups: Groups, landscapes: Landscapes) -> Iterator[Drawing]:
    """A run's landscapes, before and after its best epoch."""
    candidates = {label: _most_checkpoints(runs) for label, runs in groups.items()}
    subjects = {label: run for label, run in candidates.items() if len(run.checkpoints()) > 1}
    if not subjects:
        raise NotEnough("no run has two checkpoints: train with --save-every N")
    for label, run in subjects.items():
        curves = {n: landscapes.curve(run, file) for n, file in run.checkpoints().items()}
        named = {f"epoch {epoch}": [curve] for epoch, curve in curves.items()}
        rows = comparable([run])[0]
        yield Drawing(
            f"epochs-{file_name(label)}",
            f"Landscapes by epoch: {label}",
            f"{landscapes.describe(run)}; the run in {run.path.name}, whose best epoch is"
            f" {int(best(list(rows))['epoch']) + 1} (Figures 1, 7 to 10).",
            partial(plots.landscapes_by_epoch, rows, curves),
            [sharpness_table(named, landscapes.how.distance)],
            named,
        )


@_figure
def flatness(groups: Groups, landscapes: Landscapes) -> Iterator[Drawing]:
    """The generalization gap by the sharpness of the landscape, over all checkpoints."""
    points = {
        label: [point for run in runs for point in _rises_and_gaps(run, landscapes)]
        for label, runs in groups.items()
    }
    everything = [point for of_label in points.values() for point in of_label]
    if len(everything) < 3:
        raise NotEnough(
            "fewer than three checkpoints belong to an evaluated epoch: train with --save-every N, "
            "a multiple of --eval-every"
        )
    at = landscapes.how.distance
    cells = [["", "checkpoints", "correlation", "rank correlation"]]
    for label, of_label in {"all": everything, **points}.items():
        if len(of_label) > 2:
            cells.append([label, str(len(of_label)), *correlations(of_label)])
    first = next(iter(groups.values()))[0]
    yield Drawing(
        "flatness",
        "Sharpness and the generalization gap",
        f"{landscapes.describe(first)}; a point for each checkpoint of {_about(groups)}."
        " Checkpoints of one run depend on each other.",
        partial(plots.gap_by_rise, points, at=at),
        [
            (
                f"Correlation of the gap with the rise of the adversarial loss at |alpha| = {at:g}",
                cells,
            )
        ],
        points,
    )


@_figure
def gamma(groups: Groups, landscapes: Landscapes) -> Iterator[Drawing]:
    """Landscapes by the size of AWP's perturbation in training."""
    families = [family["AWP"] for family in by_gamma(groups) if len(family["AWP"]) > 2]
    _need_three_gammas(families)
    for name, heading, family in _numbered("gamma", "Landscapes by gamma", families):
        curves = {g: [landscapes.curve(run) for run in family[g]] for g in sorted(family)}
        runs = {g: comparable(family[g]) for g in sorted(family)}
        named = {f"gamma {g:g}": of_gamma for g, of_gamma in curves.items()}
        first = next(iter(family.values()))[0]
        yield Drawing(
            name,
            heading,
            f"{first.config.method.upper()}; {landscapes.describe(first)}; gamma 0 is without AWP"
            " (Figure 2 (c), (d)).",
            partial(plots.landscapes_by_gamma, curves, runs),
            [sharpness_table(named, landscapes.how.distance)],
            named,
        )


@_figure
def sizes(groups: Groups, landscapes: Landscapes) -> Iterator[Drawing]:
    """Robust accuracy by the size of AWP and of random weight perturbation."""
    families = [f for f in by_gamma(groups) if any(len(runs) > 2 for runs in f.values())]
    _need_three_gammas(families)
    title = "Robust accuracy by the size of the perturbation"
    for name, heading, family in _numbered("sizes", title, families):
        runs = _rows_by_gamma(family)
        named = {f"{kind}, gamma {g:g}": runs[kind][g] for kind in runs for g in sorted(runs[kind])}
        drawn = [of_gamma for of_kind in family.values() for of_gamma in of_kind.values()]
        shown = {label: group for label, group in groups.items() if group in drawn}
        yield Drawing(
            name,
            heading,
            f"{_about(shown)} (Figures 2 (b), 3 (c)).",
            partial(plots.perturbation_sizes, runs),
            [("Accuracy in %", accuracies(named))],
            named,
        )


@_figure
def perturbed(groups: Groups, landscapes: Landscapes) -> Iterator[Drawing]:
    """One model's loss under AWP and under random weight perturbation, by gamma."""
    without = [label for label, runs in groups.items() if not runs[0].config.gamma]
    label = [*without, *groups][0]
    run = groups[label][0]
    curves = landscapes.perturbed(run)
    unperturbed = [f"{curve.adv_center:.3f}" for curve in curves.values()]
    losses = zip(*(curve.adv_loss for curve in curves.values()), strict=True)
    cells = [["gamma", *(f"loss, {kind}" for kind in curves)], ["0", *unperturbed]]
    for g, row in zip(landscapes.how.gammas, losses, strict=True):
        cells.append([f"{g:g}", *(f"{loss:.3f}" for loss in row)])
    yield Drawing(
        "perturbed",
        f"Adversarial and random perturbation of the weights: {label}",
        f"{landscapes.describe(run)}; the run in {run.path.name}. Its weights are perturbed by"
        " gamma in AWP's direction for these images, and in random directions of the same length"
        " (Figure 3 (a)).",
        partial(plots.perturbed_weights, curves),
        [("Adversarial loss, mean over directions", cells)],
        curves,
    )


@_figure
def rwp(groups: Groups, landscapes: Landscapes) -> Iterator[Drawing]:
    """Landscapes of AWP and of random weight perturbation."""
    if not any(runs[0].is_random for runs in groups.values()):
        raise NotEnough("no run has random weight perturbation: train with --direction random")
    compared = {label: runs for label, runs in groups.items() if runs[0].config.method == "at"}
    yield _comparison("rwp", "Landscapes of AWP and RWP", "3 (b)", compared, landscapes)


@_figure
def histogram(groups: Groups, landscapes: Landscapes) -> Iterator[Drawing]:
    """The distribution of the last convolution's weights."""
    weights: dict[str, list[Array]] = {label: [] for label in groups}
    layer = ""
    for label, runs in groups.items():
        for run in runs:
            layer, w = _last_layer(landscapes.model(run, run.last_checkpoint()))
            weights[label].append(w.detach().cpu().double().numpy().ravel())
    cells = [["", "standard deviation", "largest", "skewness"]]
    for label, arrays in weights.items():
        pooled = np.concatenate(arrays)
        values = pooled.std(), np.abs(pooled).max()
        cells.append([label, *(f"{v:.4g}" for v in values), f"{_skewness(pooled):+.2f}"])
    yield Drawing(
        "histogram",
        f"Weights of {layer}",
        f"{_about(groups)}; the last convolution's weights at the last checkpoint (Figure 4).",
        partial(plots.weight_histograms, weights, layer=layer),
        [("Weights", cells)],
    )


@_figure
def directions(groups: Groups, landscapes: Landscapes) -> Iterator[Drawing]:
    """How much a landscape depends on the direction."""
    subjects = _side_by_side(groups, plots.MAX_PAIRS)
    count, at = max(DIRECTIONS, landscapes.how.directions), landscapes.how.distance
    curves = {
        label: landscapes.curve(run, file, directions=count)
        for label, (run, file) in subjects.items()
    }
    cells = [["", "rise", "lowest", "highest"]]
    for label, curve in curves.items():
        rises = curve.rises(at).mean(1).tolist()
        cells.append([label, spread(rises, 3), f"{min(rises):.3f}", f"{max(rises):.3f}"])
    title = f"Rise of the adversarial loss at |alpha| = {at:g}; mean ± deviation over directions"
    yield Drawing(
        "directions",
        f"{count} random directions",
        f"{_describe_first(subjects, landscapes)}; one run of each, along {count}"
        " filter-normalized directions (Figure 5).",
        partial(plots.directions, curves),
        [(title, cells)],
        curves,
    )


@_figure
def surface(groups: Groups, landscapes: Landscapes) -> Iterator[Drawing]:
    """The landscape on a plane."""
    subjects = _side_by_side(groups, COLUMNS)
    surfaces = {label: landscapes.surface(run, file) for label, (run, file) in subjects.items()}
    cells = [["", "g(0, 0)", "mean", "highest"]]
    for label, s in surfaces.items():
        values = s.adv_center, s.relative.mean(), s.relative.max()
        cells.append([label, *(f"{value:.3f}" for value in values)])
    yield Drawing(
        "surface",
        "Landscapes on a plane",
        f"{_describe_first(subjects, landscapes)}; one run of each (Figure 6). The color scale ends"
        " at the 95th percentile of the heights.",
        partial(plots.surfaces, surfaces),
        [("|g(a, b) - g(0, 0)| over the plane", cells)],
        surfaces,
    )


@_figure
def on_the_fly(groups: Groups, landscapes: Landscapes) -> Iterator[Drawing]:
    """What adversarial examples generated only once would hide."""
    label, (run, *_) = next(iter(groups.items()))
    curves = {
        "for each perturbed model": landscapes.curve(run),
        "pre-generated": landscapes.curve(run, pregenerated=True),
    }
    yield Drawing(
        "on-the-fly",
        f"Adversarial examples for each perturbed model, and pre-generated: {label}",
        f"{landscapes.describe(run)}; pre-generated: once, for the unperturbed model; the run in"
        f" {run.path.name} (Section 3).",
        partial(plots.on_the_fly, curves),
        [sharpness_table({how: [curve] for how, curve in curves.items()}, landscapes.how.distance)],
        curves,
    )


# --- Which runs -------------------------------------------------------------------------------


def _numbered(name: str, title: str, items: Sequence[T]) -> Iterator[tuple[str, str, T]]:
    """Name and title for each item, with a number if there are several."""
    if len(items) == 1:
        yield name, title, items[0]
        return
    for i, item in enumerate(items, 1):
        yield f"{name}-{i}", f"{title}, {i} of {len(items)}", item


def _need_three_gammas(families: Sequence[Any]) -> None:
    if not families:
        raise NotEnough("there must be runs with at least three gammas, all else being equal")


def _most_checkpoints(runs: Sequence[Run]) -> Run:
    return max(runs, key=lambda run: len(run.checkpoints()))


def _side_by_side(groups: Groups, most: int) -> dict[str, tuple[Run, Path]]:
    """At most so many checkpoints: the last of each setting, or several of a single setting."""
    if len(groups) > 1:
        firsts = {label: runs[0] for label, runs in list(groups.items())[:most]}
        return {label: (run, run.last_checkpoint()) for label, run in firsts.items()}
    (label, runs), *_ = groups.items()
    run = _most_checkpoints(runs)
    run.last_checkpoint()  # raises if there is none
    checkpoints = list(run.checkpoints().items())
    chosen = np.linspace(len(checkpoints) - 1, 0, min(most, len(checkpoints))).round().astype(int)
    shown = [checkpoints[i] for i in sorted(set(chosen))]
    return {f"{label}, epoch {epoch}": (run, file) for epoch, file in shown}


def _rows_by_gamma(
    family: Mapping[str, Mapping[float, Sequence[Run]]],
) -> dict[str, dict[float, Runs]]:
    """The rows of AWP's and RWP's runs, leaving out a kind that has no gamma above 0."""
    return {
        kind: {g: comparable(runs) for g, runs in by_size.items()}
        for kind, by_size in family.items()
        if any(by_size)
    }


def _about(groups: Groups) -> str:
    runs = [run for of_group in groups.values() for run in of_group]
    tasks = dict.fromkeys(run.task for run in runs)
    return f"{', '.join(tasks)}; {len(runs)} run{'s'[: len(runs) > 1]}"


def _describe_first(subjects: Mapping[str, tuple[Run, Path]], landscapes: Landscapes) -> str:
    run, _ = next(iter(subjects.values()))
    return landscapes.describe(run)


# --- What is measured -------------------------------------------------------------------------


def _rises_and_gaps(run: Run, landscapes: Landscapes) -> Iterator[tuple[float, float]]:
    """The rise of the loss and the gap, in points, of each checkpoint of an evaluated epoch."""
    gaps = {
        int(row["epoch"]) + 1: 100 * (row["train_robust_acc"] - row["test_robust_acc"])
        for row in map(reported, run.rows)
        if "train_robust_acc" in row
    }
    for epoch, file in run.checkpoints().items():
        if epoch in gaps:
            curve = landscapes.curve(run, file)
            yield curve.sharpness(landscapes.how.distance).mean, gaps[epoch]


def _comparison(
    name: str, title: str, figure: str, groups: Groups, landscapes: Landscapes
) -> Drawing:
    """Landscapes and robust accuracy of several settings."""
    if len(groups) > plots.MAX_LABELS:
        raise NotEnough(
            f"{len(groups)} settings are too many for one picture: choose at most"
            f" {plots.MAX_LABELS} with --select, of {'; '.join(groups)}"
        )
    curves = {label: [landscapes.curve(run) for run in runs] for label, runs in groups.items()}
    runs = {label: comparable(of_label) for label, of_label in groups.items()}
    count, at = landscapes.how.directions, landscapes.how.distance
    along = "1 direction" if count == 1 else f"{count} directions"
    first = next(iter(groups.values()))[0]
    return Drawing(
        name,
        title,
        f"{landscapes.describe(first)}; the last checkpoints, {along}; bands from the lowest to"
        f" the highest run and direction (Figure {figure}).",
        partial(plots.landscapes, curves, runs),
        [sharpness_table(curves, at), *rise_differences(groups, curves, at)],
        curves,
    )


def _last_layer(model: nn.Module) -> tuple[str, Tensor]:
    """The last convolution, 1x1 shortcuts aside; if there is none, the last linear layer."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    convolutions = {
        name: m for name, m in layers.items() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1
    }
    found = convolutions or layers
    if not found:
        raise NotEnough("the network has neither convolutions nor linear layers")
    name = list(found)[-1]
    return name, found[name].weight


def _skewness(a: Array) -> float:
    return float(stats.skew(a, axis=None)) if a.std() else 0.0


def _jsonable(value: Any) -> Any:
    if isinstance(value, (LossCurve, LossSurface)):
        return value.to_dict()
    if isinstance(value, Sequence):
        return [_jsonable(item) for item in value]
    return value
