"""Which weights are perturbed, chosen by their names, as parameter groups."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["perturb_only"]


def perturb_only(
    model: nn.Module,
    names: str | Sequence[str],
    gamma: float | Tensor = 5e-3,
    *,
    min_ndim: int = 2,
    groups: Iterable[dict[str, Any]] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Parameter groups in which only the chosen weights are perturbed, by ``gamma``.

    The others get a gamma of 0: they are trained, at their centre.

    Args:
        model: gives the parameters their names; those that need no gradient are left out.
        names: a regular expression, or several. A parameter is chosen in whose name, such as
            "bert.embeddings.word_embeddings.weight", one of them is found (``re.search``).
        gamma: as for AWP.
        min_ndim: as for AWP; with 1 also biases and the scales of norm layers.
        groups: groups with settings of their own (weight decay, learning rates), each of which is
            split in two where it has both kinds; an optimizer's ``param_groups``, for example.
        **settings: more for the groups that are perturbed, such as ``norm="l1"``.

    Returns:
        Groups for AWP or for any torch optimizer, in the order of ``groups``, chosen first.

    Raises:
        ValueError: if nothing would be perturbed.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
        >>> for group in perturb_only(model, r"^0\\.", gamma=1e-2):
        ...     print(group["gamma"], [tuple(p.shape) for p in group["params"]])
        0.01 [(5, 4)]
        0.0 [(2, 4), (2,)]
    """
    patterns = [re.compile(name) for name in ([names] if isinstance(names, str) else names)]
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    chosen = [(n, p) for n, p in named if any(pattern.search(n) for pattern in patterns)]
    if not any(p.ndim >= min_ndim for _, p in chosen):
        found = ", ".join(n for n, _ in (chosen or named)[:4])
        raise ValueError(
            f"no weight would be perturbed: {names!r} "
            + (
                f"chooses tensors of fewer than min_ndim={min_ndim} dimensions alone ({found}, ...)"
                if chosen
                else f"is found in none of the names ({found}, ...)"
            )
        )
    ids = {id(p) for _, p in chosen}
    given: Iterable[dict[str, Any]] = [{"params": [p for _, p in named]}]
    split = []
    for group in given if groups is None else groups:
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for p in params:
            parts[id(p) not in ids].append(p)
        on, off = parts
        if on:
            split.append({**group, "params": on, "gamma": gamma, "min_ndim": min_ndim, **settings})
        if off:
            split.append({**group, "params": off, "gamma": 0.0})
    return split
