"""When a fine-tuning writes a checkpoint, and where it goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unweave.core import checkpoint
from unweave.core.dist import SOLO, Group


@dataclass
class Checkpoints:
    """Checkpoints in ``folder``, ``seconds`` apart; none where there is no folder. All processes of a group hold the
    same state, so the first writes it."""

    folder: Path | None = None
    seconds: float = 120.0
    group: Group = SOLO
    last: float = field(default_factory=time.monotonic)

    def load(self) -> dict[str, Any] | None:
        """The last state; None where there is none."""
        return None if self.folder is None else next(checkpoint.states(self.folder), None)

    @property
    def due(self) -> bool:
        """Whether it is time, in the first process's view."""
        late = time.monotonic() - self.last > self.seconds
        return self.folder is not None and bool(self.group.broadcast(torch.tensor(int(late))))

    def save(self, state: dict[str, Any], step: int) -> None:
        if self.folder is not None:
            checkpoint.save(self.folder, state, step, self.group, self.group.rank == 0)
            self.last = time.monotonic()
