"""Checkpoints of training: a file per process that trains SAEs of its own, and one that says which belong together.

The last is written when all others are there, so a kill at any moment leaves either the old checkpoint or the new.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from unweave.core.dist import Group
from unweave.core.errors import UnweaveError
from unweave.core.run import Run, atomic_write, read_json, write_json

_INDEX = "checkpoint.json"


def save(run: Run, state: dict[str, Any], tokens: int, group: Group, writes: bool) -> None:
    """Writes this process's state (if it ``writes``); all processes of ``group`` must call it at the same step."""
    if writes:
        with atomic_write(run.path / f"checkpoint-{tokens}-{group.rank}.pt") as temporary:
            torch.save(state, temporary)
    group.barrier()
    if group.rank == 0:
        files = sorted(path.name for path in run.path.glob(f"checkpoint-{tokens}-*.pt"))
        write_json(run.path / _INDEX, {"tokens": tokens, "files": files})
        for path in run.path.glob("checkpoint-*.pt"):
            if path.name not in files:
                path.unlink(missing_ok=True)
    group.barrier()


def load(run: Run) -> dict[str, Any] | None:
    """The last whole checkpoint: every trainer's state, whichever process had it; None where there is none."""
    if not (run.path / _INDEX).exists():
        return None
    parts = [_read(run.path / name) for name in read_json(run.path / _INDEX)["files"]]
    return parts[0] | {"trainers": {name: state for part in parts for name, state in part["trainers"].items()}}


def remove(run: Run) -> None:
    """Deletes the checkpoint of a finished run."""
    for path in (run.path / _INDEX, *run.path.glob("checkpoint-*.pt")):
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise UnweaveError(
            f"the checkpoint is damaged: {str(error).splitlines()[0]}",
            where=str(path),
            remedy=f"delete {_INDEX} beside it: training begins again, from the activations that are kept",
        ) from error
