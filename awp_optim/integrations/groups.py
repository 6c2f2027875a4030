"""Parameter groups in which only the weights with chosen names are perturbed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

from torch import Tensor, nn

__all__ = ["compile_names", "perturb_only"]


def perturb_only(
    model: nn.Module,
    names: str | Sequence[str],
    gamma: float | Tensor = 5e-3,
    *,
    min_ndim: int = 2,
    groups: Iterable[dict[str, Any]] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Parameter groups in which only the chosen weights are perturbed; the others have gamma 0.

    Args:
        model: has the named parameters; those that require no gradient are left out.
        names: one regular expression or several. A parameter is chosen if one of them matches a
            part of its name (``re.search``), such as "bert.embeddings.word_embeddings.weight".
        gamma: as for AWP.
        min_ndim: as for AWP; 1 includes biases and the scales of norm layers.
        groups: existing groups with their own settings (weight decay, learning rates), for example
            an optimizer's ``param_groups``. A group with both kinds of weights is split in two.
        **settings: other settings of the perturbed groups, such as ``norm="l1"``.

    Returns:
        Groups for AWP or any torch optimizer, in the order of ``groups``, perturbed ones first.

    Raises:
        ValueError: a name is not a regular expression, or no weight would be perturbed.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
        >>> for group in perturb_only(model, r"^0\\.", gamma=1e-2):
        ...     print(group["gamma"], [tuple(p.shape) for p in group["params"]])
        0.01 [(5, 4)]
        0.0 [(2, 4), (2,)]
    """
    every_name = model.named_parameters(remove_duplicate=False)  # tied weights have two
    named = {name: p for name, p in every_name if p.requires_grad}
    chosen = _choose(named, names, min_ndim)
    perturbed = {"gamma": gamma, "min_ndim": min_ndim, **settings}
    split = []
    for group in [{"params": list(dict.fromkeys(named.values()))}] if groups is None else groups:
        params = group["params"]
        lists: dict[str, list[Any]] = {
            "params": [params] if isinstance(params, Tensor) else list(params)
        }
        if "param_names" in group:  # of an optimizer that was built with names
            lists["param_names"] = group["param_names"]
        is_on = [id(p[1] if isinstance(p, tuple) else p) in chosen for p in lists["params"]]
        for kind, values in ((True, perturbed), (False, {"gamma": 0.0})):
            part = {k: list(compress(v, [on is kind for on in is_on])) for k, v in lists.items()}
            if part["params"]:
                split.append({**group, **part, **values})
    if all(group["gamma"] is not gamma for group in split):
        raise ValueError(f"no weight would be perturbed: the groups hold none that match {names!r}")
    return split


def compile_names(names: str | Sequence[str]) -> list[re.Pattern[str]]:
    """Compile the names as regular expressions.

    Raises:
        ValueError: a name is not a regular expression.
    """
    patterns = []
    for name in [names] if isinstance(names, str) else names:
        try:
            patterns.append(re.compile(name))
        except re.error as error:
            raise ValueError(f"{name!r} is not a regular expression: {error}") from None
    return patterns


def _choose(named: Mapping[str, Tensor], names: str | Sequence[str], min_ndim: int) -> set[int]:
    """The ids of the chosen parameters, at least one of which will be perturbed."""
    patterns = compile_names(names)
    chosen = {n: p for n, p in named.items() if any(pattern.search(n) for pattern in patterns)}
    if any(p.ndim >= min_ndim for p in chosen.values()):
        return {id(p) for p in chosen.values()}
    reason = f"only matches tensors with fewer than min_ndim={min_ndim} dimensions"
    reason = reason if chosen else "matches none of the names"
    examples = ", ".join(list(chosen or named)[:4])
    raise ValueError(f"no weight would be perturbed: {names!r} {reason} ({examples}, ...)")
