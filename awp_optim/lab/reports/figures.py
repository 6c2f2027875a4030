"""The paper's figures of runs that are over: what they show, measured, drawn, and in numbers.

Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust Generalization" (NeurIPS 2020),
Figures 1 to 11. :data:`FIGURES` names them; each takes runs as
:func:`~awp_optim.lab.reports.runs.grouped` gives them and
:class:`~awp_optim.lab.reports.measuring.Landscapes` to
measure by, and gives :class:`Drawing` objects, or raises ``NotEnough`` where the runs do not allow
it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from awp_optim.lab.reports import plots
from awp_optim.lab.reports.measuring import Landscapes, NotEnough, last_checkpoint, slug, where
from awp_optim.lab.reports.runs import Run, by_size, evaluated
from awp_optim.lab.reports.summary import Cells, accuracies, spread
from awp_optim.lab.run_folder import best
from awp_optim.landscape import LossCurve

__all__ = ["FIGURES", "Drawing"]

Groups = Mapping[str, list[Run]]
Array = np.ndarray[Any, Any]

DIRECTIONS = 10
"""How many Figure 5 draws."""
COLUMNS = 3
"""How many surfaces Figure 6 draws beside one another."""


@dataclass(frozen=True)
class Drawing:
    """A picture that can be drawn, and what it says in numbers.

    Attributes:
        name: its file's, without the suffix.
        title: above it.
        caption: what is seen, and how it was measured.
        draw: writes it to a file, under a title.
        tables: their titles and cells.
        data: what is drawn, for ``json.dump``.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Path, str], None]
    tables: Sequence[tuple[str, Cells]] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


# --- Figures ----------------------------------------------------------------------------------


def learning(groups: Groups, landscapes: Landscapes) -> list[Drawing]:
    """Learning curves and the generalisation gap."""
    runs = {label: evaluated(of) for label, of in groups.items()}
    title = "Learning curves and the robust generalisation gap"
    drawings = []
    labels = list(runs)
    pages = [labels[i : i + 4] for i in range(0, len(labels), 4)]  # so many colours there are
    for i, page in enumerate(pages):
        part = {label: runs[label] for label in page}
        drawings.append(
            Drawing(
                "learning" if len(pages) == 1 else f"learning-{i + 1}",
                title + ("" if len(pages) == 1 else f", {i + 1} of {len(pages)}"),
                f"{_about(groups)}; robust accuracy under PGD by epoch (Figures 1, 7 to 11).",
                _drawer(plots.learning_curves, part),
                [("Accuracy in %", accuracies(part))],
                {label: list(rows) for label, rows in part.items()},
            )
        )
    return drawings


def epochs(groups: Groups, landscapes: Landscapes) -> list[Drawing]:
    """A run's landscapes, before and after its best epoch."""
    drawings = []
    for label, runs in groups.items():
        run = max(runs, key=lambda r: len(r.checkpoints()))
        checkpoints = run.checkpoints()
        if len(checkpoints) < 2:
            continue
        curves = {epoch: landscapes.curve(run, file) for epoch, file in checkpoints.items()}
        rows = evaluated([run])[0]
        drawings.append(
            Drawing(
                f"epochs-{slug(label)}",
                f"Landscapes by epoch: {label}",
                f"{landscapes.attack_id(run)}; the run in {run.path.name}, whose best epoch is "
                f"{int(best(list(rows))['epoch']) + 1} (Figures 1, 7 to 10).",
                _drawer(plots.landscapes_by_epoch, rows, curves),
                [_sharpness({f"epoch {e}": [c] for e, c in curves.items()}, landscapes.how.at)],
                {f"epoch {e}": [c.to_dict()] for e, c in curves.items()},
            )
        )
    if not drawings:
        raise NotEnough("no run has two checkpoints: train with --save-every N")
    return drawings


def methods(groups: Groups, landscapes: Landscapes) -> list[Drawing]:
    """Landscapes of the methods, beside their generalisation gaps."""
    of_methods = {label: runs for label, runs in groups.items() if not _is_random(runs)}
    if len(of_methods) < 2:
        raise NotEnough("there is one setting alone, and nothing to compare it with")
    return [_compared("methods", "Landscapes of the methods", "1", of_methods, landscapes)]


def rwp(groups: Groups, landscapes: Landscapes) -> list[Drawing]:
    """Landscapes of AWP and of random weight perturbation."""
    if not any(_is_random(runs) for runs in groups.values()):
        raise NotEnough("no run is of random weight perturbation: train with --direction random")
    at = {label: runs for label, runs in groups.items() if runs[0].config.method == "at"}
    return [_compared("rwp", "Landscapes of AWP and RWP", "3 (b)", at, landscapes)]


def gamma(groups: Groups, landscapes: Landscapes) -> list[Drawing]:
    """Landscapes by the size of AWP's perturbation in training."""
    drawings = []
    families = [family["AWP"] for family in by_size(groups) if len(family["AWP"]) > 2]
    for i, family in enumerate(families):
        curves = {g: [landscapes.curve(run) for run in runs] for g, runs in family.items()}
        first = next(iter(family.values()))[0]
        named = {f"gamma {g:g}": curves[g] for g in sorted(curves)}
        drawings.append(
            Drawing(
                "gamma" if len(families) == 1 else f"gamma-{i + 1}",
                f"Landscapes by gamma: {first.config.method.upper()}",
                f"{landscapes.attack_id(first)}; gamma 0 is without AWP (Figure 2 (c), (d)).",
                _drawer(
                    plots.landscapes_by_gamma,
                    curves,
                    runs={g: evaluated(runs) for g, runs in family.items()},
                ),
                [_sharpness(named, landscapes.how.at)],
                {label: [c.to_dict() for c in of] for label, of in named.items()},
            )
        )
    if not drawings:
        raise NotEnough("it takes runs with three gammas or more, all else being equal")
    return drawings


def sizes(groups: Groups, landscapes: Landscapes) -> list[Drawing]:
    """Robust accuracy by the size of AWP and of random weight perturbation."""
    drawings = []
    families = [f for f in by_size(groups) if any(len(runs) > 2 for runs in f.values())]
    for i, family in enumerate(families):
        runs = {
            label: {g: evaluated(of) for g, of in by_gamma.items()}
            for label, by_gamma in family.items()
            if any(by_gamma)  # by more than gamma 0
        }
        table = {f"{k}, gamma {g:g}": runs[k][g] for k in runs for g in sorted(runs[k])}
        drawings.append(
            Drawing(
                "sizes" if len(families) == 1 else f"sizes-{i + 1}",
                "Robust accuracy by the size of the perturbation",
                f"{_about(groups)} (Figures 2 (b), 3 (c)).",
                _drawer(plots.perturbation_sizes, runs),
                [("Accuracy in %", accuracies(table))],
                {label: list(rows) for label, rows in table.items()},
            )
        )
    if not drawings:
        raise NotEnough("it takes runs with three gammas or more, all else being equal")
    return drawings


def perturbed(groups: Groups, landscapes: Landscapes) -> list[Drawing]:
    """One model's loss under AWP and under random weight perturbation, by gamma."""
    label = next((k for k, runs in groups.items() if not runs[0].config.gamma), next(iter(groups)))
    run = groups[label][0]
    curves = landscapes.perturbed(run)
    head = ["gamma", *(f"loss, {name}" for name in curves)]
    rows = [
        [f"{g:g}", *(f"{c.adv_loss[i]:.3f}" for c in curves.values())]
        for i, g in enumerate(landscapes.how.gammas)
    ]
    centre = curves["AWP"].adv_center
    rows.insert(0, ["0", *(f"{centre:.3f}" for _ in curves)])
    return [
        Drawing(
            "perturbed",
            f"Adversarial and random perturbation of the weights: {label}",
            f"{landscapes.attack_id(run)}; the run in {run.path.name}, its weights moved by gamma"
            " along AWP's direction (that of these images) and along random ones as long"
            " (Figure 3 (a)).",
            _drawer(plots.perturbed_weights, curves),
            [("Adversarial loss, mean over directions", [head, *rows])],
            {name: c.to_dict() for name, c in curves.items()},
        )
    ]


def histogram(groups: Groups, landscapes: Landscapes) -> list[Drawing]:
    """How the last convolution's weights are distributed."""
    weights: dict[str, list[Array]] = {}
    layer = ""
    for label, runs in groups.items():
        for run in runs:
            layer, w = _last_layer(landscapes.model(run, last_checkpoint(run)))
            weights.setdefault(label, []).append(w.detach().cpu().double().numpy())
    pooled = {label: np.concatenate([a.ravel() for a in of]) for label, of in weights.items()}
    rows = [
        [label, f"{a.std():.4g}", f"{np.abs(a).max():.4g}", f"{_skewness(a):+.2f}"]
        for label, a in pooled.items()
    ]
    return [
        Drawing(
            "histogram",
            f"Weights of {layer}",
            f"{_about(groups)}; the last convolution's weights at the last checkpoint (Figure 4).",
            _drawer(plots.weight_histograms, weights, layer=layer),
            [("Weights", [["", "standard deviation", "largest", "skewness"], *rows])],
        )
    ]


def directions(groups: Groups, landscapes: Landscapes) -> list[Drawing]:
    """Whether a landscape depends on the direction."""
    how = landscapes.how
    subjects = _subjects(groups, 4)
    count = max(DIRECTIONS, how.directions)
    curves = {label: landscapes.curve(run, file, directions=count) for label, run, file in subjects}
    rows = []
    for label, c in curves.items():
        values = c.rises(how.at).mean(1).tolist()
        rows.append([label, spread(values, 3), f"{min(values):.3f}", f"{max(values):.3f}"])
    return [
        Drawing(
            "directions",
            f"{count} random directions",
            f"{landscapes.attack_id(subjects[0][1])}; one run of each, along {count} filter-"
            "normalised directions (Figure 5).",
            _drawer(plots.directions, curves),
            [
                (
                    f"Rise of the adversarial loss at a distance of {how.at:g}, mean and standard"
                    " deviation over directions",
                    [["", "rise", "lowest", "highest"], *rows],
                )
            ],
            {label: c.to_dict() for label, c in curves.items()},
        )
    ]


def surface(groups: Groups, landscapes: Landscapes) -> list[Drawing]:
    """The landscape on a plane."""
    subjects = _subjects(groups, COLUMNS)
    surfaces = {label: landscapes.surface(run, file) for label, run, file in subjects}
    rows = [
        [label, f"{s.adv_center:.3f}", f"{s.relative.mean():.3f}", f"{s.relative.max():.3f}"]
        for label, s in surfaces.items()
    ]
    return [
        Drawing(
            "surface",
            "Landscapes on a plane",
            f"{landscapes.attack_id(subjects[0][1])}; one run of each (Figure 6). The colours end at"
            " the 95th percentile of the heights.",
            _drawer(plots.surfaces, surfaces),
            [("|g(a, b) - g(0, 0)| over the plane", [["", "g(0, 0)", "mean", "highest"], *rows])],
            {label: s.to_dict() for label, s in surfaces.items()},
        )
    ]


def on_the_fly(groups: Groups, landscapes: Landscapes) -> list[Drawing]:
    """What adversarial examples made once for all would hide."""
    label, runs = next(iter(groups.items()))
    curves = {
        "made anew for each model": landscapes.curve(runs[0]),
        "pre-generated": landscapes.curve(runs[0], pregenerated=True),
    }
    return [
        Drawing(
            "on-the-fly",
            f"Adversarial examples made anew, and pre-generated: {label}",
            f"{landscapes.attack_id(runs[0])}, and made once for the unperturbed one; the run in"
            f" {runs[0].path.name} (Section 3).",
            _drawer(plots.on_the_fly, curves),
            [_sharpness({name: [c] for name, c in curves.items()}, landscapes.how.at)],
            {name: c.to_dict() for name, c in curves.items()},
        )
    ]


FIGURES: dict[str, Callable[[Groups, Landscapes], list[Drawing]]] = {
    "learning": learning,
    "methods": methods,
    "epochs": epochs,
    "gamma": gamma,
    "sizes": sizes,
    "perturbed": perturbed,
    "rwp": rwp,
    "histogram": histogram,
    "directions": directions,
    "surface": surface,
    "on-the-fly": on_the_fly,
}
"""Every figure by its name, in the order of a gallery."""


# --- Parts ------------------------------------------------------------------------------------


def _compared(
    name: str, title: str, figure: str, groups: Groups, landscapes: Landscapes
) -> Drawing:
    if len(groups) > len(plots.COLOURS):
        raise NotEnough(
            f"{len(groups)} settings cannot be told apart in one picture: choose at most"
            f" {len(plots.COLOURS)} with --select, of {'; '.join(groups)}"
        )
    curves = {label: [landscapes.curve(run) for run in runs] for label, runs in groups.items()}
    count = len(next(iter(curves.values()))[0].adv_losses)
    along = "1 direction" if count == 1 else f"{count} directions"
    tables = [_sharpness(curves, landscapes.how.at)]
    tables += _differences(groups, curves, landscapes.how.at)
    first = next(iter(groups.values()))[0]
    return Drawing(
        name,
        title,
        f"{landscapes.attack_id(first)}; the last checkpoints, {along}; bands from the lowest to"
        f" the highest run and direction (Figure {figure}).",
        _drawer(
            plots.landscapes,
            curves,
            runs={label: evaluated(runs) for label, runs in groups.items()},
        ),
        tables,
        {label: [c.to_dict() for c in of] for label, of in curves.items()},
    )


def _drawer(function: Callable[..., None], *args: Any, **kwargs: Any) -> Callable[..., None]:
    """A plot of these arguments that awaits its file and its title."""
    return lambda path, title: function(*args, path, title, **kwargs)


def _sharpness(curves: Mapping[str, Sequence[LossCurve]], at: float) -> tuple[str, Cells]:
    """A row for each label, over its runs mean ± standard deviation."""
    rows = []
    for label, seeds in curves.items():
        sharp = [c.sharpness(at) for c in seeds]
        widths = [c.flat_width() for c in seeds]
        rows.append(
            [
                label,
                spread([c.adv_center for c in seeds], 3),
                spread([s.mean for s in sharp], 3),
                f"{statistics.mean(s.stderr for s in sharp):.3f}",
                f"{max(s.worst for s in sharp):.3f}",
                spread([s.relative for s in sharp], 3),
                spread(widths, 3) if all(map(math.isfinite, widths)) else "beyond the curve",
            ]
        )
    head = ["", "g(0)", "rise", "± images", "worst rise", "relative", "flat width"]
    title = (
        f"Adversarial loss at the centre; its rise at a distance of {at:g}, mean over directions"
        " and sides, standard error of that from the images, the highest, and the mean of |rise|;"
        " the width in which the loss rises by less than 10%"
    )
    return title, [head, *rows]


def _differences(
    groups: Groups, curves: Mapping[str, Sequence[LossCurve]], at: float
) -> list[tuple[str, Cells]]:
    """Each label's rise less the first label's, by seed; where there are seeds in common."""
    by_seed = {
        label: {
            run.config.seed: c.sharpness(at).mean
            for run, c in zip(groups[label], curves[label], strict=True)
        }
        for label in curves
    }
    (first, base), *others = by_seed.items()
    rows = []
    for label, rises in others:
        common = sorted(base.keys() & rises.keys())
        if len(common) > 1:
            less = [rises[s] - base[s] for s in common]
            ratio = sum(rises[s] for s in common) / sum(base[s] for s in common)
            each = ", ".join(f"{d:+.3f}" for d in less)
            rows.append(
                [f"{label} less {first}", spread(less, 3, signed=True), each, f"{ratio:.2f}"]
            )
    if not rows:
        return []
    head = ["", "rise", "by seed", "as a ratio"]
    return [("The rise compared seed by seed, mean ± standard deviation", [head, *rows])]


def _subjects(groups: Groups, most: int) -> list[tuple[str, Run, Path]]:
    """What is shown one beside the other: settings; or, of a single one, a run's checkpoints."""
    if len(groups) > 1:
        firsts = [(label, runs[0]) for label, runs in groups.items()]
        return [(label, run, last_checkpoint(run)) for label, run in firsts[:most]]
    (label, runs), *_ = groups.items()
    run = max(runs, key=lambda r: len(r.checkpoints()))
    last_checkpoint(run)  # there must be one
    found = list(run.checkpoints().items())
    places = np.linspace(len(found) - 1, 0, min(most, len(found))).round().astype(int)
    return [(f"{label}, epoch {found[i][0]}", run, found[i][1]) for i in sorted(set(places))]


def _last_layer(model: nn.Module) -> tuple[str, Tensor]:
    """The last convolution, 1x1 shortcuts aside; without any, the last linear layer."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    convolutions = {
        k: m for k, m in layers.items() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1
    }
    found = convolutions or layers
    if not found:
        raise NotEnough("the network has neither convolutions nor linear layers")
    name = list(found)[-1]
    return name, found[name].weight


def _skewness(a: Array) -> float:
    deviation = a.std()
    return float((((a - a.mean()) / deviation) ** 3).mean()) if deviation else 0.0


def _is_random(runs: Sequence[Run]) -> bool:
    return runs[0].config.direction == "random" and runs[0].config.gamma > 0


def _about(groups: Groups) -> str:
    runs = [run for of in groups.values() for run in of]
    return f"{', '.join(dict.fromkeys(map(where, runs)))}; {len(runs)} runs"
