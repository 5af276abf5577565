"""The numbers in SAE files, read without running anything that a file carries, and accounted for to the last tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.fields import LARGEST
from unweave.sae.formats.archives import damaged, read_arrays
from unweave.sae.formats.headers import checked_header
from unweave.sae.formats.state_dict import read_state_dict

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_RESTORE = "the file is damaged: restore it"


class Tensors:
    """A file's tensors by name. Each is taken once; what nobody took is an error in the end (trap 19)."""

    def __init__(self, values: Mapping[str, Tensor], where: str) -> None:
        self.values, self.where = dict(values), where

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def take(self, *names: str) -> Tensor:
        """The first of these names that is there, in floating point. UnweaveError when none is."""
        for name in names:
            if name in self.values:
                tensor = self.values.pop(name)
                if tensor.dtype not in _FLOATS:
                    raise UnweaveError(
                        f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, not floating point numbers",
                        where=self.where, remedy="quantised weights are not read: get the original ones",
                    )  # fmt: skip
                if not bool(torch.isfinite(tensor).all()):
                    raise UnweaveError(f"{name} holds NaN or infinity", where=self.where, remedy=_RESTORE)
                return tensor
        raise UnweaveError(f"missing {names[0]}", where=self.where, remedy="the file is incomplete: restore it")

    def maybe(self, *names: str) -> Tensor | None:
        """As ``take``, but None when none is there."""
        return self.take(*names) if any(name in self.values for name in names) else None

    def number(self, name: str) -> float | None:
        """A tensor that holds one finite number; None when it is not there."""
        tensor = self.values.pop(name, None)
        if tensor is None:
            return None
        if tensor.numel() != 1:
            raise UnweaveError(
                f"{name} has shape {list(tensor.shape)}, not a single number", where=self.where, remedy=_RESTORE
            )
        if tensor.dtype not in (*_FLOATS, *_WHOLE) or not abs(float(tensor)) <= LARGEST:
            raise UnweaveError(
                f"{name} holds {tensor.flatten().tolist()[0]}, not a number of at most {LARGEST:g} in size",
                where=self.where,
                remedy=_RESTORE,
            )
        return float(tensor)

    def integer(self, name: str) -> int | None:
        """A tensor that holds one whole number of at least 1; None when it is not there."""
        value = self.number(name)
        if value is not None and (value != int(value) or value < 1):
            raise UnweaveError(
                f"{name} holds {value:g}, not a whole number of at least 1", where=self.where, remedy=_RESTORE
            )
        return None if value is None else int(value)

    def integers(self, name: str) -> list[int] | None:
        """A vector of whole numbers of at least 1; None when it is not there."""
        tensor = self.values.pop(name, None)
        if tensor is None:
            return None
        if tensor.ndim != 1 or tensor.dtype not in _WHOLE or not bool((tensor > 0).all()):
            raise UnweaveError(
                f"{name} is not a list of whole numbers of at least 1", where=self.where, remedy=_RESTORE
            )
        return tensor.tolist()

    def drop(self, *names: str) -> None:
        """Tensors that are known and have no part in encoding or decoding."""
        for name in names:
            self.values.pop(name, None)

    def require(self, expected: Iterable[str], remedy: str) -> None:
        """UnweaveError unless exactly these are there, naming all that are missing and unused."""
        missing, unused = set(expected) - set(self.values), set(self.values) - set(expected)
        if missing or unused:
            problem = "; ".join(
                f"{word} {', '.join(sorted(names))}"
                for word, names in (("missing", missing), ("unused", unused))
                if names
            )
            raise UnweaveError(f"the tensors do not fit the architecture: {problem}", where=self.where, remedy=remedy)

    def finish(self) -> None:
        """UnweaveError when a tensor was not taken."""
        if self.values:
            raise UnweaveError(
                f"unused {', '.join(sorted(self.values))}: this kind of SAE is not understood",
                where=self.where,
                remedy="an SAE that is read in part gives wrong numbers; please report the file's origin",
            )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen digits over every name, type, shape and number."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:16]


def oriented(tensor: Tensor, name: str, rows: int | None, columns: int | None, *, stated: str, where: str) -> Tensor:
    """``tensor`` as [rows, columns], turned when its shape says so.

    One of rows and columns may be None: unknown. ``stated`` ("as is" or "transposed") is how the format writes it; that
    decides for square matrices, and nothing else. Raises UnweaveError when neither way fits.
    """
    if tensor.ndim == 2:
        fits = [
            turned
            for turned in (tensor, tensor.T)
            if (rows is None or turned.shape[0] == rows) and (columns is None or turned.shape[1] == columns)
        ]
        if len(fits) == 2:
            return tensor.T if stated == "transposed" else tensor
        if fits:
            return fits[0]
    expected = f"[{'?' if rows is None else rows}, {'?' if columns is None else columns}]"
    raise UnweaveError(
        f"{name} has shape {list(tensor.shape)}, which is neither {expected} nor its transpose",
        where=where,
        remedy="the biases and this matrix do not belong together: restore the file",
    )


def read_safetensors(path: Path) -> Tensors:
    """All tensors of a safetensors file. Raises UnweaveError when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UnweaveError("the SAE's weights are missing", where=str(path), remedy="restore the file")
    checked_header(path)
    try:
        return Tensors(load_file(path), str(path))
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise damaged(path, error) from error


def read_npz(path: Path) -> Tensors:
    """All arrays of a NumPy archive. Raises UnweaveError when one carries Python objects, or the file is damaged."""
    return Tensors(read_arrays(path), str(path))


def read_torch(path: Path) -> Tensors:
    """A PyTorch state dictionary. Raises UnweaveError when it carries anything but tensors, or is damaged."""
    return Tensors(read_state_dict(path), str(path))
