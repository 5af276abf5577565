"""Several processes as one: the few collective operations that training needs. For a process alone they do nothing.

``torchrun`` starts the processes and says through the environment which of them this is. Everything that is decided
once (norms, initial weights, winners of a batch) is decided from the same numbers in every process, so that all of
them take the same steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from unweave.core.errors import UnweaveError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Group:
    """``size`` processes, of which this is number ``rank``. With one, every method hands its argument back."""

    rank: int = 0
    size: int = 1

    def sum(self, t: Tensor) -> Tensor:
        """The sum over processes, in place and returned."""
        return self._reduce(t, "SUM")

    def max(self, t: Tensor) -> Tensor:
        """The largest over processes, entry by entry, in place and returned."""
        return self._reduce(t, "MAX")

    def _reduce(self, t: Tensor, how: str) -> Tensor:
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(t, getattr(dist.ReduceOp, how))
        return t

    def gather(self, t: Tensor) -> list[Tensor]:
        """Every process's tensor in the order of ranks; first dimensions may differ."""
        if self.size == 1:
            return [t]
        import torch
        import torch.distributed as dist

        lengths = [torch.zeros(1, dtype=torch.int64, device=t.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(t)], device=t.device))
        sizes = [int(length) for length in lengths]
        padded = t.new_zeros(max(sizes), *t.shape[1:])
        padded[: len(t)] = t
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def broadcast(self, t: Tensor, source: int = 0) -> Tensor:
        """What process ``source`` has, in place and returned; shapes must agree."""
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast(t, source)
        return t

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def in_turn(self) -> Iterator[None]:
        """``for _ in group.in_turn(): ...`` runs its body in every process, one after the other."""
        for rank in range(self.size):
            if rank == self.rank:
                yield
            self.barrier()

    def share(self, n: int) -> slice:
        """Which of n items are this process's own: a contiguous part, sizes as equal as they can be."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


SOLO = Group()
"""One process on its own."""


@lru_cache(maxsize=1)
def world() -> Group:
    """The processes that torchrun started (joined on the first call); ``SOLO`` where it did not.

    Tensors on CPUs travel through gloo, those on GPUs through nccl. Raises UnweaveError when the environment is only
    half set.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if os.environ.get(name)]
    if "WORLD_SIZE" not in given or os.environ["WORLD_SIZE"] == "1":
        return SOLO
    if len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise UnweaveError(f"{missing} not set", where="environment", remedy="start the processes with torchrun")
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Group(dist.get_rank(), dist.get_world_size())
