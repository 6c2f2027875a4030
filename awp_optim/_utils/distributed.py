"""The processes of torch.distributed, such as those that torchrun starts."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

__all__ = ["Ranks"]


class Ranks:
    """The processes of torch.distributed's default group; one if it is not initialized.

    Attributes:
        rank: the rank of this process.
        world: the number of processes.
    """

    def __init__(self) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, ordered by rank, on every rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values
