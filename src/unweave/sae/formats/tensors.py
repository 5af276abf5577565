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


class Tensors:
    """A file's tensors by name. Each is taken once; what nobody took is an error in the end (trap 19)."""

    def __init__(self, values: Mapping[str, Tensor], where: str) -> None:
        self.values, self.where = dict(values), where

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def error(self, what: str, remedy: str = "the file is damaged: restore it") -> UnweaveError:
        """The error for something wrong with this file."""
        return UnweaveError(what, where=self.where, remedy=remedy)

    def take(self, *names: str) -> Tensor:
        """The first of these names that is there, in floating point. UnweaveError when none is."""
        name = next((name for name in names if name in self.values), None)
        if name is None:
            raise self.error(f"missing {names[0]}", "the file is incomplete: restore it")
        tensor = self.values.pop(name)
        if tensor.dtype not in _FLOATS:
            raise self.error(
                f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, not floating point numbers",
                "quantised weights are not read: get the original ones",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise self.error(f"{name} holds NaN or infinity")
        return tensor

    def vector(self, *names: str, length: int | None = None) -> Tensor:
        """As ``take``: a bias or thresholds, checked to be a vector (of ``length``)."""
        tensor = self.take(*names)
        if tensor.ndim != 1 or (length is not None and len(tensor) != length):
            expected = "?" if length is None else length
            raise self.error(f"{names[0]} has shape {list(tensor.shape)}, not [{expected}]", "restore the file")
        return tensor

    def matrix(self, *names: str, rows: int | None, columns: int | None, stated: str) -> Tensor:
        """As ``take``: a matrix [rows, columns], turned when its shape says so.

        One of rows and columns may be None: unknown. ``stated`` ("as is" or "transposed") is how the format writes it;
        that decides for square matrices, and nothing else. Raises UnweaveError when neither way fits.
        """
        tensor = self.take(*names)
        if tensor.ndim == 2:
            sizes = (rows, columns)
            fits = [t for t in (tensor, tensor.T) if all(n in (None, m) for n, m in zip(sizes, t.shape, strict=True))]
            if len(fits) == 2:
                return tensor.T if stated == "transposed" else tensor
            if fits:
                return fits[0]
        expected = f"[{'?' if rows is None else rows}, {'?' if columns is None else columns}]"
        raise self.error(
            f"{names[0]} has shape {list(tensor.shape)}, which is neither {expected} nor its transpose",
            "the biases and this matrix do not belong together: restore the file",
        )

    def number(self, name: str) -> float | None:
        """A tensor that holds one finite number; None when it is not there."""
        tensor = self.values.pop(name, None)
        if tensor is None:
            return None
        if tensor.numel() != 1:
            raise self.error(f"{name} has shape {list(tensor.shape)}, not a single number")
        if tensor.dtype not in (*_FLOATS, *_WHOLE) or not abs(float(tensor)) <= LARGEST:
            value = tensor.flatten().tolist()[0]
            raise self.error(f"{name} holds {value}, not a number of at most {LARGEST:g} in size")
        return float(tensor)

    def integer(self, name: str) -> int | None:
        """A tensor that holds one whole number of at least 1; None when it is not there."""
        value = self.number(name)
        if value is not None and (value != int(value) or value < 1):
            raise self.error(f"{name} holds {value:g}, not a whole number of at least 1")
        return None if value is None else int(value)

    def integers(self, name: str) -> list[int] | None:
        """A vector of whole numbers of at least 1; None when it is not there."""
        tensor = self.values.pop(name, None)
        if tensor is None:
            return None
        if tensor.ndim != 1 or tensor.dtype not in _WHOLE or not bool((tensor > 0).all()):
            raise self.error(f"{name} is not a list of whole numbers of at least 1")
        return tensor.tolist()

    def drop(self, *names: str) -> None:
        """Tensors that are known and have no part in encoding or decoding."""
        for name in names:
            self.values.pop(name, None)

    def require(self, expected: Iterable[str], remedy: str) -> None:
        """UnweaveError unless exactly these are there, naming all that are missing and unused."""
        differing = {"missing": set(expected) - set(self.values), "unused": set(self.values) - set(expected)}
        problems = [f"{word} {', '.join(sorted(names))}" for word, names in differing.items() if names]
        if problems:
            raise self.error(f"the tensors do not fit the architecture: {'; '.join(problems)}", remedy)

    def finish(self) -> None:
        """UnweaveError when a tensor was not taken."""
        if self.values:
            raise self.error(
                f"unused {', '.join(sorted(self.values))}: this kind of SAE is not understood",
                "an SAE that is read in part gives wrong numbers; please report the file's origin",
            )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen digits over every name, type, shape and number."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:16]


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
