"""Finished parts of long work: what is still needed of them in memory, or all of it as files in a folder, so that
interrupted work goes on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.attribute.runner import Batch
from unweave.core.errors import UnweaveError
from unweave.core.memory import refuse_if_memory
from unweave.core.run import atomic_write
from unweave.core.site import Site
from unweave.core.spec import digest

Held = dict[str, Tensor]


class Parts:
    """Tensors named ``kind/...`` by the part's name; on the CPU, or as ``<folder>/<name>.safetensors``."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: dict[str, Held] = {}

    def get(self, name: str, kind: str = "") -> Held | None:
        """A part that is finished, or None: of all its tensors those of one kind, where that is given."""
        if self.folder is None:
            return self._held.get(name)
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as handle:
                keys = [key for key in handle.keys() if key.startswith(kind)]  # noqa: SIM118 (not a mapping)
                return {key: handle.get_tensor(key) for key in keys}
        except (SafetensorError, OSError) as error:
            refuse_if_memory(error, path)
            raise UnweaveError(f"cannot read a finished part: {error}", where=str(path), remedy="delete it") from error

    def made(self, name: str, work: Callable[[], Mapping[str, Tensor]], later: str | None = None) -> Held:
        """A part as it was kept, else as ``work`` makes it now.

        Tensors of the kind ``later`` can be had again with ``get``; without a folder, the others are not kept.
        """
        found = self.get(name)
        if found is None:
            found = {key: tensor.detach().cpu().contiguous() for key, tensor in work().items()}
            if self.folder is None:
                if later is not None:
                    self._held[name] = {key: value for key, value in found.items() if key.startswith(later)}
            else:
                from safetensors.torch import save_file

                with atomic_write(self.folder / f"{name}.safetensors") as temporary:
                    save_file(found, temporary)
        return found


def by_site(held: Mapping[str, Tensor], kind: str) -> dict[Site, Tensor]:
    """The tensors named ``kind/site``."""
    return {Site.parse(name[len(kind) + 1 :]): value for name, value in held.items() if name.startswith(f"{kind}/")}


def content_of(question: Any, tensors: Mapping[Any, Tensor]) -> str:
    """Twelve digits over a question in plain values and tensors by name."""
    hashed = hashlib.sha256(digest(question).encode())
    for name, tensor in tensors.items():
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:12]


def question_of(batch: Batch, asked: Any) -> str:
    """Twelve digits over what a piece's part depends on: its inputs, its metric, and what is ``asked`` of all pieces.

    A metric that is a dataclass is known by its fields, any other by its name alone.
    """
    clean, patch, metric = batch
    sides = {"clean": clean} | ({} if patch is None else {"patch": patch})
    tensors = {f"{side}/{kind}": getattr(tokens, kind) for side, tokens in sides.items() for kind in ("ids", "mask")}
    return content_of([asked, _plain(metric)], tensors)


def _plain(value: Any) -> Any:
    """Plain values that tell one metric from another."""
    if isinstance(value, Tensor):
        return value.tolist()
    if value is None or isinstance(value, (str, int, float, bool)):
        return repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [type(value).__qualname__, fields]
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
