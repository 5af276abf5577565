"""Several processes as one: the few collective operations that training needs. For a process alone they do nothing.

``torchrun`` starts the processes and says through the environment which of them this is. Everything that is decided
once (norms, initial weights, winners of a batch) is decided from the same numbers in every process, so that all of
them take the same steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

from unweave.core.errors import UnweaveError

if TYPE_CHECKING:
    from torch import Tensor

_PATIENCE = timedelta(days=1)
"""how long a process waits for the others: the first may tokenise for hours before they meet"""


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

    Tensors on CPUs travel through gloo, those on GPUs through nccl. Each process works on the GPU of its own number
    where there are as many. Raises UnweaveError when the environment is only half set.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in names if os.environ.get(name)]
    if "WORLD_SIZE" not in present or os.environ["WORLD_SIZE"] == "1":
        return SOLO
    if len(present) < len(names):
        missing = ", ".join(name for name in names if name not in present)
        raise UnweaveError(f"{missing} not set", where="environment", remedy="start the processes with torchrun")
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        on_gpus = torch.cuda.is_available()
        number = int(os.environ.get("LOCAL_RANK") or 0)
        if on_gpus and number < torch.cuda.device_count():  # fewer GPUs than processes may all the same work on CPUs
            torch.cuda.set_device(number)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=_PATIENCE)
    return Group(dist.get_rank(), dist.get_world_size())


def refuse_shared_device(device: str | None, group: Group) -> None:
    """Raises UnweaveError where all processes of a group would work on one GPU: it was named by its number, or there
    are fewer GPUs than processes. ``device`` as a user gives it; None: a GPU where there is one.
    """
    if group.size == 1 or (device is not None and not device.startswith("cuda")):
        return
    if device is not None and device != "cuda":
        remedy = "use device cuda, so that each takes a GPU of its own, cpu, or a single process"
        raise UnweaveError(f"{group.size} processes would all work on {device}", where="device", remedy=remedy)
    import torch

    here, number = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK") or 0)
    if torch.cuda.is_available() and number >= here:
        remedy = f"start at most {here} processes here, or use device cpu"
        raise UnweaveError(f"process {number} of this machine finds only {here} GPUs", where="device", remedy=remedy)
