"""Ranks that prune a decoder layer together: a rank sends its samples through the layer, and all ranks solve."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from os import environ

import torch
import torch.distributed as dist
from torch import Tensor

from convexprune.errors import PruningError, RecipeError
from convexprune.pruners import LayerEdit

PATIENCE = timedelta(hours=6)  # one rank may have to compute again what enters a layer; the others wait
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")


def require_rendezvous() -> None:
    """Refuse ranks without a meeting place."""
    if missing := [name for name in RENDEZVOUS if name not in environ]:
        raise RecipeError(
            f"executor='ranks' with prefix='pruned': the ranks prune each layer together, and {', '.join(missing)} "
            "must say where they meet. torchrun sets them; with srun, set them to the first node and a free port."
        )


@dataclass(frozen=True)
class ProcessGroup:
    """Rank `rank` of `size` ranks in lockstep: all have to call `all_reduce` equally often."""

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def connected(cls, rank: int, size: int) -> Iterator["ProcessGroup"]:
        """Inside, the ranks of a launcher can communicate; see `require_rendezvous`."""
        if size == 1 or dist.is_initialized():  # by the script that prunes
            yield cls(rank, size)
            return
        dist.init_process_group(rank=rank, world_size=size, timeout=PATIENCE)
        try:
            yield cls(rank, size)
        finally:
            dist.destroy_process_group()

    def local_slice(self, count: int) -> slice:
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place.

        Between GPUs (NCCL) a lost rank raises no error here; the process ends after `PATIENCE`. So all ranks meet on
        the CPU first (Gloo), where a lost rank is an error at once.
        """
        if self.size > 1:
            try:
                if tensor.device.type != "cpu" and "cpu" in dist.get_backend_config():
                    dist.all_reduce(torch.zeros(1))
                dist.all_reduce(tensor)
            except RuntimeError as error:
                raise PruningError(
                    "Another rank of this run was lost. What is finished is kept: start all of them again."
                ) from error
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor if self.size == 1 else self.all_reduce(torch.zeros_like(tensor) if self.rank else tensor.clone())


ALONE = ProcessGroup()


def of_first_rank(edit: LayerEdit, ranks: ProcessGroup) -> LayerEdit:
    """Return the first rank's edit: all ranks pose the same problem, but their processors may round differently."""
    if ranks.size == 1:
        return edit
    mask = ranks.broadcast(edit.mask.to(torch.uint8)).bool()
    return replace(edit, weight=ranks.broadcast(edit.weight), mask=mask)
