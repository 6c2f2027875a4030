"""DTensors: parameters that are distributed over processes.

FSDP2 (``fully_shard``) and tensor parallelism create them. An ascent treats the local parts as
plain tensors. Only the norms of full tensors need communication: one all-reduce per list of
tensors.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awp_optim._core.perturbation import NORMS

__all__ = [
    "RandomGenerators",
    "Sharding",
    "difference",
    "is_dtensor",
    "local_like",
    "local_part",
    "sharding_of",
]

_SHARDS = {"Shard", "_StridedShard"}  # placements in which every element is in exactly one part


class Sharding(NamedTuple):
    """How a tensor is distributed: a device mesh, and the mesh dimensions that shard it.

    Along the other mesh dimensions it is replicated, as between the groups of HSDP.
    """

    mesh: Any
    dims: tuple[int, ...]

    def reduce_norms(self, norm: str, *parts: Tensor) -> list[Tensor]:
        """Turn norms of local parts into norms of full tensors; a collective operation.

        Args:
            norm: "l1" or "l2".
            *parts: norms of local parts, each of shape (L,); zero for empty parts.

        Returns:
            The norms of the full tensors, shaped like ``parts``; equal in all processes that share
            a tensor. Sums are taken in float64, where squares do not overflow.
        """
        if not self.dims:
            return list(parts)
        import torch.distributed as dist

        sums = torch.cat(parts).to(self.mesh.device_type, torch.float64)  # parts may be on the CPU
        if NORMS[norm] == 2:
            sums.square_()
        for dim in self.dims:
            dist.all_reduce(sums, group=self.mesh.get_group(dim))
        if NORMS[norm] == 2:
            sums.sqrt_()
        full = torch.split(sums, [len(part) for part in parts])
        return [norms.to(part) for norms, part in zip(full, parts, strict=True)]


class RandomGenerators:
    """Generators for random directions of sharded tensors.

    Replicas of a part get the same numbers; different parts get different ones. The first use of a
    mesh broadcasts a seed to its processes.
    """

    def __init__(self) -> None:
        self._seeds: dict[Any, int] = {}
        self._generators: dict[tuple[Sharding, torch.device], torch.Generator] = {}

    def get(self, sharding: Sharding, device: torch.device) -> torch.Generator:
        """The generator for tensors of this sharding on this device."""
        key = sharding, device
        if key not in self._generators:
            if sharding.mesh not in self._seeds:
                self._seeds[sharding.mesh] = _shared_seed(sharding.mesh)
            coordinates = sharding.mesh.get_coordinate()
            part = [(dim, coordinates[dim]) for dim in sharding.dims]
            seed = random.Random(f"{self._seeds[sharding.mesh]}/{part}").getrandbits(63)
            self._generators[key] = torch.Generator(device).manual_seed(seed)
        return self._generators[key]


def _shared_seed(mesh: Any) -> int:
    """Broadcast a seed that the mesh's first process draws from torch's default generator."""
    import torch.distributed as dist

    seed = torch.randint(2**62, (1,)).to(mesh.device_type)
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        dist.broadcast(seed, dist.get_global_rank(group, 0), group)
    return int(seed.item())


def is_dtensor(t: object) -> bool:
    """Whether this is a DTensor, without importing the class."""
    return hasattr(t, "full_tensor")


def sharding_of(p: Tensor) -> Sharding:
    """How a DTensor is distributed.

    Raises:
        TypeError: it is neither sharded nor replicated along a dimension of its mesh.
    """
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    dims = []
    for dim, placement in enumerate(placements):
        if type(placement).__name__ in _SHARDS:
            dims.append(dim)
        elif not placement.is_replicate():
            raise TypeError(
                f"a parameter is placed as {placement} along dimension {dim} of {mesh}, but AWP "
                "supports only Shard and Replicate: redistribute() the parameter, or exclude it "
                "with min_ndim or gamma=0 in a group of its own"
            )
    return Sharding(mesh, tuple(dims))


def local_part(t: Tensor) -> Tensor:
    """The local part of a DTensor, in its own memory; not for use with autograd.

    A plain tensor is its own local part.
    """
    if not is_dtensor(t):
        return t
    local: Tensor = t.to_local()  # type: ignore[attr-defined]
    if hasattr(local, "wait"):  # its communication is still running
        local = local.wait()
    return local


def local_like(t: Tensor, p: Tensor) -> Tensor:
    """The part of ``t`` that corresponds to the local part of ``p``.

    A collective operation if their placements differ.

    Raises:
        TypeError: ``t`` is not a DTensor on the mesh of ``p``.
    """
    if not is_dtensor(t) or t.device_mesh != p.device_mesh:  # type: ignore[attr-defined]
        raise TypeError(
            f"a parameter is a DTensor on {p.device_mesh}, "  # type: ignore[attr-defined]
            f"but its direction is on {getattr(t, 'device_mesh', 'no mesh')}: distribute it like "
            "the parameter"
        )
    if t.placements != p.placements:  # type: ignore[attr-defined]
        t = t.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return local_part(t)


def difference(p: Tensor, w: Tensor) -> Tensor:
    """p - w as a tensor like ``p``; if ``p`` is a DTensor, ``w`` is a local part."""
    if not is_dtensor(p):
        return p - w
    out = torch.empty_like(p)
    torch.sub(local_part(p), w, out=local_part(out))
    return out
