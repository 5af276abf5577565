"""Finished parts of long work: kept in memory, or as files in a folder, so that interrupted work goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.run import atomic_write
from unweave.core.site import Site

Held = dict[str, Tensor]


class Parts:
    """Tensors by the part's name; on the CPU, or as ``<folder>/<name>.safetensors``."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: dict[str, Held] = {}

    def get(self, name: str) -> Held | None:
        """A part that is finished, or None."""
        if self.folder is None:
            return self._held.get(name)
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UnweaveError(f"cannot read a finished part: {error}", where=str(path), remedy="delete it") from error

    def made(self, name: str, work: Callable[[], Mapping[str, Tensor]]) -> Held:
        """A part as it was kept, else as ``work`` makes it now."""
        found = self.get(name)
        if found is None:
            found = {key: tensor.detach().cpu().contiguous() for key, tensor in work().items()}
            if self.folder is None:
                self._held[name] = found
            else:
                from safetensors.torch import save_file

                with atomic_write(self.folder / f"{name}.safetensors") as temporary:
                    save_file(found, temporary)
        return found


def by_site(held: Mapping[str, Tensor], kind: str) -> dict[Site, Tensor]:
    """The tensors named ``kind/site``."""
    return {Site.parse(name[len(kind) + 1 :]): value for name, value in held.items() if name.startswith(f"{kind}/")}
