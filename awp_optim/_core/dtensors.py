"""Parameters sharded over processes: what an ascent needs to know of a DTensor.

FSDP2 (``fully_shard``) and tensor parallelism leave a part of each parameter with each process, in
a ``torch.distributed.tensor.DTensor``. An ascent works on these parts as on plain tensors; only the
norm of a whole tensor takes a word with the other processes, one all-reduce for a list of them.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awp_optim._core.perturbation import NORMS

__all__ = [
    "Sharding",
    "agreed_seed",
    "is_distributed",
    "local_like",
    "local_part",
    "processes",
    "sharding_of",
]

_SHARDS = {"Shard", "_StridedShard"}  # every element is in exactly one part


class Sharding(NamedTuple):
    """Over which processes a tensor is spread: a mesh, and those of its dimensions that split it.

    Along the other dimensions of the mesh there are copies, as between the groups of HSDP.
    """

    mesh: Any
    dims: tuple[int, ...]

    def whole_norms(self, norm: str, *parts: Tensor) -> list[Tensor]:
        """The norms of whole tensors from those of the parts here; a collective operation.

        Args:
            norm: "l1" or "l2".
            *parts: norms of the local parts, each of shape (L,); zero where a part is empty.

        Returns:
            The norms of the wholes, shaped like ``parts``; the same in all processes that share a
            tensor. The sums are taken in float64: squares do not overflow there.
        """
        if not self.dims:
            return list(parts)
        import torch.distributed as dist

        sums = torch.cat(parts).to(self.mesh.device_type, torch.float64)  # from a CPU, if offloaded
        if NORMS[norm] == 2:
            sums.square_()
        for dim in self.dims:
            dist.all_reduce(sums, group=self.mesh.get_group(dim))
        if NORMS[norm] == 2:
            sums.sqrt_()
        wholes = torch.split(sums, [len(part) for part in parts])
        return [whole.to(part) for whole, part in zip(wholes, parts, strict=True)]

    def generator(self, seed: int, device: torch.device) -> torch.Generator:
        """Draws alike where there are copies of a part, and otherwise where there are others."""
        place = self.mesh.get_coordinate()
        part = [(dim, place[dim]) for dim in self.dims]
        mixed = random.Random(f"{seed}/{part}").getrandbits(63)
        return torch.Generator(device).manual_seed(mixed)


def is_distributed(t: Tensor) -> bool:
    """Whether this is a DTensor, told without importing it."""
    return hasattr(t, "full_tensor")


def sharding_of(p: Tensor) -> Sharding:
    """How a DTensor is spread.

    Raises:
        TypeError: it is neither split nor copied along a dimension of its mesh.
    """
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    dims = []
    for dim, placement in enumerate(placements):
        if type(placement).__name__ in _SHARDS:
            dims.append(dim)
        elif not placement.is_replicate():
            raise TypeError(
                f"a parameter is placed as {placement} along dimension {dim} of {mesh}: AWP knows "
                "Shard and Replicate; redistribute() the parameter, or leave it out with min_ndim "
                "or gamma=0 in a group of its own"
            )
    return Sharding(mesh, tuple(dims))


def local_part(t: Tensor) -> Tensor:
    """The part of a DTensor that is here, in its own memory; for use without autograd."""
    local: Tensor = t.to_local()  # type: ignore[attr-defined]
    if hasattr(local, "wait"):  # for a communication that is under way
        local = local.wait()
    return local


def local_like(t: Tensor, p: Tensor) -> Tensor:
    """The part of ``t`` that belongs to the local part of ``p``; collective if ``t`` is elsewhere.

    Raises:
        TypeError: ``t`` is no DTensor, or is one on another mesh.
    """
    if not is_distributed(t) or t.device_mesh != p.device_mesh:  # type: ignore[attr-defined]
        raise TypeError(
            f"a parameter is a DTensor on {p.device_mesh}, its direction "  # type: ignore[attr-defined]
            f"{getattr(t, 'device_mesh', 'a plain tensor')}: distribute it as the parameter is"
        )
    if t.placements != p.placements:  # type: ignore[attr-defined]
        t = t.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return local_part(t)


def agreed_seed(mesh: Any) -> int:
    """A seed from torch's default generator in the mesh's first process, for all; collective."""
    import torch.distributed as dist

    seed = torch.randint(2**62, (1,)).to(mesh.device_type)
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        dist.broadcast(seed, dist.get_global_rank(group, 0), group)
    return int(seed.item())


def processes() -> int:
    """How many processes torch.distributed knows of; 1 where it is not in use."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
