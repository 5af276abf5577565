"""PyTorch's saved dictionaries of tensors, read without running anything and without trusting what they say.

A ``.pt`` file is a pickle that names storages, beside their bytes. PyTorch's own reader runs no foreign code, but takes
a tensor's shape on trust: a file of 2 kB can claim 28 GB. Here the pickle, which has a dozen plain instructions, is
worked off into descriptions of tensors; each is compared with its storage's bytes, and only then made.
"""

from __future__ import annotations

import math
import pickletools
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.sae.formats.archives import carries_code, content, damaged, opened

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""how files before PyTorch 1.6 begin, which are not archives"""
_STEPS = 200_000
"""instructions of a pickle; a tensor takes about fifty"""
_PICKLE_BYTES = 4 << 20
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class _View:
    """A tensor as the pickle describes it: a part of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Foreign(Exception):
    """The pickle asks for something that is neither tensor nor plain value."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote. Raises UnweaveError for anything else, and for damage."""
    try:
        with open(path, "rb") as handle:
            start = handle.read(len(_LEGACY))
            if start.startswith(b"PK\x03\x04"):
                return _from_archive(path)
            if start != _LEGACY:
                raise _no_dictionary(path)
            return _from_legacy(handle, path)
    except _Foreign:
        raise carries_code(path) from None
    except (OSError, MemoryError) as error:
        raise damaged(path, error) from error


def _from_archive(path: Path) -> dict[str, Tensor]:
    with opened(path) as (archive, members):
        pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise damaged(path, "the archive holds no data.pkl, or several")
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in members:  # a compiled module
            raise carries_code(path)
        order = members.get(f"{prefix}byteorder")
        if order is not None and content(archive, order, path) != sys.byteorder.encode():
            raise damaged(path, "its numbers are in another byte order than this machine's")
        if members[pickles[0]].file_size > _PICKLE_BYTES:
            raise damaged(path, f"its table of tensors has more than {_PICKLE_BYTES:,} bytes")
        views = _views(_run(BytesIO(content(archive, members[pickles[0]], path)), path), path)

        def stored(storage: _Storage) -> bytes:
            return _member(archive, members, f"{prefix}data/{storage.key}", path)

        return _tensors(views, stored, path)


def _member(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str, path: Path) -> bytes:
    if name not in members:
        raise damaged(path, f"the archive lacks {name[:80]}")
    return content(archive, members[name], path)


def _from_legacy(handle: IO[bytes], path: Path) -> dict[str, Tensor]:
    """Before PyTorch 1.6: five pickles, then each storage's length and bytes."""
    head = BytesIO(handle.read(_PICKLE_BYTES))
    _version, system = _run(head, path), _run(head, path)
    if not isinstance(system, dict) or system.get("little_endian") != (sys.byteorder == "little"):
        raise damaged(path, "its numbers are in another byte order than this machine's")
    views, keys = _views(_run(head, path), path), _run(head, path)
    storages = {view.storage.key: view.storage for view in views.values()}
    if not isinstance(keys, list) or len(set(map(str, keys))) != len(keys):
        raise damaged(path, "its list of storages cannot be read")
    held: dict[str, bytes] = {}
    handle.seek(len(_LEGACY) + head.tell())
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        count = int.from_bytes(handle.read(8), "little", signed=True)
        if storage is None or count != storage.count or count > path.stat().st_size:
            raise damaged(path, "a storage's length is not what its tensors say")
        held[storage.key] = handle.read(count * storage.dtype.itemsize)
    if handle.read(1):
        raise damaged(path, "there is more in the file than its tensors")
    return _tensors(views, lambda storage: held.get(storage.key, b""), path)


def _views(entries: Any, path: Path) -> dict[str, _View]:
    if not isinstance(entries, dict) or not all(isinstance(value, _View) for value in entries.values()):
        raise _no_dictionary(path)
    named = {str(name): value for name, value in entries.items()}
    if len(named) < len(entries):
        raise damaged(path, "two tensors have one name")
    return named


def _tensors(views: Mapping[str, _View], stored: Callable[[_Storage], bytes], path: Path) -> dict[str, Tensor]:
    """Each view's numbers. What a tensor claims is compared with its storage before either is read."""
    size = path.stat().st_size
    claimed = sum(math.prod(view.size) * view.storage.dtype.itemsize for view in views.values())
    for name, view in views.items():
        last = sum((n - 1) * s for n, s in zip(view.size, view.stride, strict=True)) if math.prod(view.size) else -1
        if view.offset + last >= view.storage.count or math.prod(view.size) > view.storage.count:
            raise damaged(path, f"{name[:80]} claims more numbers than the {view.storage.count:,} that are stored")
    if claimed > 4 * size + (1 << 20):  # tied weights are stored once and used twice
        raise damaged(path, f"its tensors claim {claimed:,} bytes, and the file has {size:,}")
    flat: dict[_Storage, Tensor] = {}
    for storage in {view.storage for view in views.values()}:
        data = stored(storage)
        if len(data) != storage.count * storage.dtype.itemsize:
            raise damaged(path, f"a storage of {len(data):,} bytes should hold {storage.count:,} {storage.dtype}")
        flat[storage] = torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0)
    return {
        name: flat[view.storage].to(view.storage.dtype).as_strided(view.size, view.stride, view.offset).clone()
        for name, view in views.items()
    }


# -- the pickle ------------------------------------------------------------------------------------------------------


def _run(stream: IO[bytes], path: Path) -> Any:
    """The value of one pickle: plain values, and tensors as descriptions. ``_Foreign`` for anything else."""
    machine = _Machine()
    try:
        for step, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if step > _STEPS:
                raise ValueError(f"its table of tensors has more than {_STEPS:,} steps")
            machine.step(code.name, argument)
        return machine.result()
    except (ValueError, IndexError, KeyError, TypeError, UnicodeDecodeError, OverflowError) as error:
        raise damaged(path, error) from error


def _no_dictionary(path: Path) -> UnweaveError:
    return UnweaveError(
        "the file is not a dictionary of tensors, or it is damaged",
        where=str(path),
        remedy="restore it, or save the SAE's state_dict() alone; reading more could run code that it carries",
    )


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_REBUILDS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter")
_KNOWN = {"collections OrderedDict", "torch Size", *_REBUILDS, *(f"torch {name}" for name in _DTYPES)}


class _Machine:
    """The instructions that ``torch.save`` writes, on a stack of plain values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, code: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        if code in _LITERALS:
            push(argument)
        elif code in _CONSTANTS:
            push(_CONSTANTS[code])
        elif code in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            push(self.memo[argument])
        elif code in ("EMPTY_DICT", "EMPTY_LIST"):
            push({} if code == "EMPTY_DICT" else [])
        elif code == "MARK":
            push(_MARK)
        elif code in _TUPLES:
            self._tuple(len(self.stack) - _TUPLES[code])
        elif code == "TUPLE":
            values = self._marked()
            push(tuple(values))
        elif code in ("SETITEM", "SETITEMS"):
            pairs = [pop(), pop()][::-1] if code == "SETITEM" else self._marked()
            self._set(pairs)
        elif code in ("APPEND", "APPENDS"):
            values = [pop()] if code == "APPEND" else self._marked()
            self._list().extend(values)
        elif code == "GLOBAL":
            push(_named(argument))
        elif code == "BINPERSID":
            push(_storage(pop()))
        elif code == "REDUCE":
            arguments = pop()
            push(_called(pop(), arguments))
        elif code == "BUILD":  # a state dictionary's version numbers
            pop()
        elif code not in ("PROTO", "STOP"):
            raise ValueError(f"its table of tensors has an instruction {code}, which torch.save does not write")

    def result(self) -> Any:
        (value,) = self.stack
        return value

    def _tuple(self, start: int) -> None:
        if start < 0:
            raise IndexError("its table of tensors is cut short")
        self.stack[start:] = [tuple(self.stack[start:])]

    def _marked(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def _set(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("its table of tensors cannot be read")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise ValueError("its tensors have no names")
            if key in target:
                raise ValueError(f"the name {str(key)[:80]!r} appears twice")
            target[key] = value

    def _list(self) -> list[Any]:
        if not isinstance(self.stack[-1], list):
            raise ValueError("its table of tensors cannot be read")
        return self.stack[-1]


@dataclass(frozen=True)
class _Name:
    """Something that the pickle refers to by name."""

    name: str


def _named(name: str) -> _Name:
    if name not in _KNOWN:
        raise _Foreign
    return _Name(name)


def _storage(description: Any) -> _Storage:
    if (
        not isinstance(description, tuple)
        or not 5 <= len(description) <= 6
        or description[0] != "storage"
        or any(description[5:])
    ):
        raise ValueError("a storage's description is invalid")
    kind, key, count = description[1], description[2], description[4]
    dtype = _DTYPES.get(kind.name.removeprefix("torch ")) if isinstance(kind, _Name) else None
    if dtype is None or not isinstance(key, str) or type(count) is not int or count < 0:
        raise ValueError("a storage's description is invalid")
    return _Storage(dtype, key, count)


def _called(what: Any, arguments: Any) -> Any:
    if not isinstance(what, _Name) or not isinstance(arguments, tuple):
        raise ValueError("its table of tensors cannot be read")
    if what.name == "collections OrderedDict" and not arguments:
        return {}
    if what.name == "torch Size" and len(arguments) == 1:
        return _sizes(arguments[0])
    if what.name == _REBUILDS[0] and len(arguments) >= 4 and isinstance(arguments[0], _Storage):
        size, stride = _sizes(arguments[2]), _sizes(arguments[3])
        (offset,) = _sizes((arguments[1],))
        if len(size) == len(stride):
            return _View(arguments[0], offset, size, stride)
    if what.name == _REBUILDS[1] and arguments and isinstance(arguments[0], _View):
        return arguments[0]
    raise ValueError("a tensor's description is invalid")


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(type(n) is int and 0 <= n < 1 << 62 for n in values):
        raise ValueError("a tensor's shape is invalid")
    return tuple(values)
