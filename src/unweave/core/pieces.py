"""Finished pieces of long work: files in a folder, so that interrupted work goes on; or in memory where there is none.

A piece is named tensors, or plain values and dataclasses of them (what ``core.result`` can hold). A run's pieces are
gone once the run is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.files import read_json
from unweave.core.memory import refuse_if_memory
from unweave.core.result import from_plain, to_plain
from unweave.core.writing import atomic_write, write_json

Held = dict[str, Tensor]
T = TypeVar("T")


class Pieces:
    """Pieces by name: ``<folder>/<name>.safetensors`` or ``.json``, or in memory where ``folder`` is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._tensors: dict[str, Held] = {}
        self._values: dict[str, Any] = {}

    def get(self, name: str, kind: str = "") -> Held | None:
        """The tensors of a finished piece, or None; of tensors named ``kind/...`` those of one kind, where given."""
        if self.folder is None:
            return self._tensors.get(name)
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

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]], later: str | None = None) -> Held:
        """A piece's tensors, from its file where it is finished, else as ``make`` makes them now.

        Tensors of the kind ``later`` can be had again with ``get``; without a folder, the others are not held.
        """
        there = self.get(name)
        if there is not None:
            return there
        new = {key: tensor.detach().cpu().contiguous() for key, tensor in make().items()}
        if self.folder is None:
            if later is not None:
                self._tensors[name] = {key: value for key, value in new.items() if key.startswith(later)}
        else:
            from safetensors.torch import save_file

            with atomic_write(self.folder / f"{name}.safetensors") as temporary:
                save_file(new, temporary)
        return new

    def has(self, name: str) -> bool:
        """Whether a piece of values is finished."""
        return name in self._values if self.folder is None else (self.folder / f"{name}.json").exists()

    def value(self, name: str, kind: Any, make: Callable[[], T]) -> T:
        """A piece of type ``kind``, from its file where it is finished, else as ``make`` makes it now."""
        if self.folder is None:
            if not self.has(name):
                self._values[name] = make()
            return self._values[name]
        path = self.folder / f"{name}.json"
        if self.has(name):
            return from_plain(kind, read_json(path), str(path))
        new = make()
        write_json(path, to_plain(new))
        return new
