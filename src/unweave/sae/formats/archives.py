"""Zip archives of numbers, looked over before a byte of them is expanded: NumPy's ``.npz``, and PyTorch's ``.pt``.

What an archive says of itself may be wrong by accident or on purpose: a member that appears twice, one that expands to
gigabytes, a shape that its bytes do not fill. All of it stands in the archive's directory and in the arrays' headers,
so it is compared there, and only then read.
"""

from __future__ import annotations

import ast
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.memory import refuse_if_memory

_MEMBERS = 4096
_EXPANDS = 64
"""weights hardly shrink at all, a vector of zeros shrinks a thousandfold: beyond this and ``_SPARE`` it is a trick"""
_SPARE = 16 << 20
_HEADER = 4096
_UNREADABLE = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, ValueError, OverflowError,
    MemoryError,
)  # fmt: skip
_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1")


def damaged(path: Path | str, reason: object) -> UnweaveError:
    """The error for a weights file that is not whole; another one where memory ran out."""
    if isinstance(reason, BaseException):
        refuse_if_memory(reason, path)
    lines = str(reason).splitlines()
    what = lines[0][:300] if lines else type(reason).__name__
    return UnweaveError(
        f"the weights are damaged: {what}", where=str(path), remedy="restore the file or train the SAE again"
    )


def carries_code(path: Path) -> UnweaveError:
    """The error for a file that asks for more than numbers."""
    return UnweaveError(
        "the file carries Python objects, which loading would have to run as code",
        where=str(path),
        remedy="it is not opened; ask for a file that holds tensors alone",
    )


@contextmanager
def opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """An archive and its members by name. Raises UnweaveError for what no tool that saves weights writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive, _members(archive, path)
    except UnweaveError:
        raise
    except _UNREADABLE as error:
        raise damaged(path, error) from error


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > _MEMBERS:
        raise damaged(path, f"the archive has {len(infos):,} members, more than {_MEMBERS:,}")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        if info.filename in members:
            raise damaged(path, f"the member {info.filename[:80]!r} appears twice in the archive")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise damaged(path, f"the member {info.filename[:80]!r} is encrypted, or compressed in an unknown way")
        members[info.filename] = info
    size = path.stat().st_size
    if sum(info.compress_size for info in infos) > size:
        raise damaged(path, "the archive's members are longer than the archive")
    expanded = sum(info.file_size for info in infos)
    if expanded > _EXPANDS * size + _SPARE:
        raise damaged(path, f"a file of {size:,} bytes would expand to {expanded:,}")
    return members


def content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> bytes:
    """A member's bytes, as many as the archive says; its checksum is compared on the way."""
    with archive.open(info) as member:
        data = member.read()
    if len(data) != info.file_size:
        raise damaged(path, f"{info.filename[:80]} has {len(data):,} bytes, not {info.file_size:,}")
    return data


def read_arrays(path: Path) -> dict[str, Tensor]:
    """All arrays of a NumPy archive. Raises UnweaveError for Python objects, and for whatever is damaged."""
    arrays: dict[str, Tensor] = {}
    with opened(path) as (archive, members):
        for filename, info in members.items():
            name = filename.removesuffix(".npy")
            if name in arrays:
                raise damaged(path, f"the array {name[:80]!r} appears twice in the archive")
            with archive.open(info) as member:
                arrays[name] = _array(member, info, name, path)
    return arrays


def _array(member: IO[bytes], info: zipfile.ZipInfo, name: str, path: Path) -> Tensor:
    """One array: its header against the member's size first."""
    start = member.read(8)
    wide = start[6:7] == b"\x02"
    if start[:6] != b"\x93NUMPY" or start[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise damaged(path, f"{name[:80]} is not a NumPy array")
    length = int.from_bytes(member.read(4 if wide else 2), "little")
    if length > _HEADER:
        raise damaged(path, f"{name[:80]} has a header of {length:,} bytes")
    shape, fortran, dtype = _header(member.read(length), name, path)
    size = info.file_size - len(start) - (4 if wide else 2) - length
    if math.prod(shape) * dtype.itemsize != size:
        raise damaged(path, f"{name[:80]} says its shape is {_shown(shape)} of {dtype}, and holds {size:,} bytes")
    data = member.read(size)
    if len(data) != size or member.read(1):
        raise damaged(path, f"{name[:80]} is cut short")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(np.array(array, dtype=dtype.newbyteorder("="), order="C"))


def _header(text: bytes, name: str, path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        header = ast.literal_eval(text.decode("latin1").strip(" \n"))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise damaged(path, f"{name[:80]} has a header that cannot be read") from None
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise damaged(path, f"{name[:80]} has a header that does not say type, order and shape")
    descr, shape, fortran = header["descr"], header["shape"], header["fortran_order"]
    if not isinstance(descr, str) or descr.endswith("O"):
        raise carries_code(path)
    if descr[1:] not in _DTYPES or descr[0] not in "<>|=":
        raise UnweaveError(
            f"{name[:80]} holds {descr[:20]}, not plain numbers", where=str(path), remedy="save it as float32"
        )
    sizes = [n for n in shape if type(n) is int and n >= 0] if isinstance(shape, tuple) else []
    if not isinstance(fortran, bool) or not isinstance(shape, tuple) or len(sizes) != len(shape):
        raise damaged(path, f"{name[:80]} has an invalid shape")
    return tuple(sizes), fortran, np.dtype(descr)


def _shown(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(f"{n:.3g}" if n < 1e300 else "a huge number" for n in shape[:6]) + "]"
