"""Checkpoints of training: a file per process that trains weights of its own, and one that says which belong together.

The last is written when all others are there, so a kill at any moment leaves either the old checkpoint or the new.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unweave.core.dist import Group
from unweave.core.errors import UnweaveError
from unweave.core.files import read_json
from unweave.core.memory import refuse_if_memory
from unweave.core.writing import atomic_write, write_json

_INDEX = "checkpoint.json"


def save(folder: Path, state: dict[str, Any], step: int, group: Group, writes: bool) -> None:
    """Writes this process's state (if it ``writes``); all processes of ``group`` must call it at the same step."""
    import torch

    if writes:
        with atomic_write(folder / _name(step, group.rank)) as temporary:
            torch.save(state, temporary)
    written = torch.cat(group.gather(torch.tensor([int(writes)])))  # and all files are there
    if group.rank == 0:
        files = [_name(step, rank) for rank in written.nonzero().flatten().tolist()]
        write_json(folder / _INDEX, {"step": step, "files": files})
        for path in folder.glob("checkpoint-*.pt"):
            if path.name not in files:
                path.unlink(missing_ok=True)
    group.barrier()


def states(folder: Path) -> Iterator[dict[str, Any]]:
    """The states of the last whole checkpoint, one for each process that wrote; none where there is none.

    Tensors are on CPUs, wherever they were; one file is held at a time. Raises UnweaveError for damaged files.
    """
    if (folder / _INDEX).exists():
        for file in _files(folder / _INDEX):
            yield _read(folder / file)


def _files(index: Path) -> list[str]:
    about = read_json(index)
    files = about.get("files") if isinstance(about, dict) else None
    if not isinstance(files, list) or not all(isinstance(file, str) and "/" not in file for file in files):
        remedy = "delete it: training begins again"
        raise UnweaveError("the checkpoint is damaged: it names no files", where=str(index), remedy=remedy)
    return files


def _name(step: int, rank: int) -> str:
    return f"checkpoint-{step}-{rank}.pt"


def _read(path: Path) -> dict[str, Any]:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        refuse_if_memory(error, path)
        what = f"the checkpoint is damaged: {str(error).splitlines()[0]}"
        raise UnweaveError(what, where=str(path), remedy=f"delete {_INDEX} beside it: training begins again") from error
