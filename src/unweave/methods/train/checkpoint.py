"""Checkpoints of training: a file per process that trains SAEs of its own, and one that says which belong together.

The last is written when all others are there, so a kill at any moment leaves either the old checkpoint or the new.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from unweave.core.dist import Group
from unweave.core.errors import UnweaveError
from unweave.core.files import read_json
from unweave.core.memory import refuse_if_memory
from unweave.core.run import Run
from unweave.core.writing import atomic_write, write_json

_INDEX = "checkpoint.json"


def save(run: Run, state: dict[str, Any], step: int, group: Group, writes: bool) -> None:
    """Writes this process's state (if it ``writes``); all processes of ``group`` must call it at the same step."""
    if writes:
        with atomic_write(run.path / _name(step, group.rank)) as temporary:
            torch.save(state, temporary)
    written = torch.cat(group.gather(torch.tensor([int(writes)])))  # and all files are there
    if group.rank == 0:
        files = [_name(step, rank) for rank in written.nonzero().flatten().tolist()]
        write_json(run.path / _INDEX, {"step": step, "files": files})
        for path in run.path.glob("checkpoint-*.pt"):
            if path.name not in files:
                path.unlink(missing_ok=True)
    group.barrier()


def load(run: Run, names: Collection[str]) -> dict[str, Any] | None:
    """The last whole checkpoint with the trainers of these names, whichever process had them; None where there is none.

    Tensors are on CPUs, wherever they were; one file is held at a time.
    """
    if not (run.path / _INDEX).exists():
        return None
    whole: dict[str, Any] = {"trainers": {}}
    for file in _files(run.path / _INDEX):
        state = _read(run.path / file)
        trainers = {name: trainer for name, trainer in state["trainers"].items() if name in names}
        whole = state | whole | {"trainers": whole["trainers"] | trainers}
    return whole


def _files(index: Path) -> list[str]:
    about = read_json(index)
    files = about.get("files") if isinstance(about, dict) else None
    if not isinstance(files, list) or not all(isinstance(file, str) and "/" not in file for file in files):
        remedy = "delete it: training begins again, from the activations that are kept"
        raise UnweaveError("the checkpoint is damaged: it names no files", where=str(index), remedy=remedy)
    return files


def _name(step: int, rank: int) -> str:
    return f"checkpoint-{step}-{rank}.pt"


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        refuse_if_memory(error, path)
        raise UnweaveError(
            f"the checkpoint is damaged: {str(error).splitlines()[0]}",
            where=str(path),
            remedy=f"delete {_INDEX} beside it: training begins again, from the activations that are kept",
        ) from error
