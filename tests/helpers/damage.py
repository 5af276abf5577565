"""Damaged files, made by the thousand from whole ones, and what may come of reading one.

    for what, text in damage.texts(config, rng): ...         JSON with hostile values at every place
    for what, data in damage.contents(whole, rng, 300): ...  bytes flipped, cut, added, zeroed, moved
    found = damage.attempt(lambda: SAE.load(path))           an UnweaveError, or what was read; nothing else, and soon

Everything is drawn from the ``random.Random`` that is given, so that a failure can be made again.
"""

from __future__ import annotations

import io
import json
import math
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from random import Random
from typing import Any, TypeVar

from unweave.core.errors import UnweaveError

Read = TypeVar("Read")
NUMBER_OF_5000_DIGITS = "9" * 5000


class Raw(str):
    """JSON text that stands in a document as it is: what no Python value is written as."""


def nested(levels: int) -> Raw:
    return Raw("[" * levels + "]" * levels)


HOSTILE: list[Any] = [
    None, True, False, "false", "true", "", "text", "5", "\u0000", "x" * 3000, "../../etc/passwd", [], [1], ["a"], {},
    {"a": 1}, 0, -1, 1, 2, 5.0, 5.9, 1e-30, 1e300, -1e300, 2**31, 2**63, 10**30, -(10**30), 0.0, -0.0,
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw(NUMBER_OF_5000_DIGITS), Raw('"\\ud800"'),
    nested(90), nested(3000),
]  # fmt: skip
"""Values of every type and size, for a place where one of a certain type belongs."""


def attempt(read: Callable[[], Read], seconds: float = 10.0) -> Read | UnweaveError:
    """What was read, or the UnweaveError. Another exception, or more than ``seconds`` of CPU, fails the test."""
    start = time.process_time()
    found: Read | UnweaveError
    try:
        found = read()
    except UnweaveError as error:
        assert error.what and len(str(error)) < 5000
        found = error
    assert time.process_time() - start < seconds
    return found


# -- text ------------------------------------------------------------------------------------------------------------


def dumps(value: Any) -> str:
    """JSON with ``Raw`` values as they are, and pairs of a ``Twice`` under one key."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Twice):
        return "{" + ", ".join(f"{json.dumps(key)}: {dumps(inner)}" for key, inner in value.pairs) + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {dumps(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


class Twice:
    """A mapping in which a key appears twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside ``value``; of long lists only the first two."""
    if at:
        yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*at, key))


def changed(value: Any, at: tuple[Any, ...], change: Callable[[Any, Any], Any]) -> Any:
    """A copy of ``value`` in which ``change(container, key)`` stands in place of the container at ``at[:-1]``."""
    made = deepcopy(value)
    holder, last = {"": made}, ""
    for key in at[:-1]:
        holder, last = holder[last], key
    holder[last] = change(holder[last], at[-1])
    return made if len(at) > 1 else holder[""]


def values(document: Any, rng: Random, per_place: int | None = None) -> Iterator[tuple[str, Any]]:
    """A document with a hostile value at each place in turn, or the key gone, renamed, or there twice."""

    def put(container: Any, key: Any, new: Any) -> Any:
        container[key] = new
        return container

    def gone(container: Any, key: Any) -> Any:
        del container[key]
        return container

    def renamed(container: Any, key: Any) -> Any:
        if not isinstance(container, dict):
            return container[::-1]
        return {(f"{name}_" if name == key else name): inner for name, inner in container.items()}

    def twice(container: Any, key: Any) -> Any:
        if not isinstance(container, dict):
            return [*container, container[key]]
        return Twice([*container.items(), (key, 1)])

    for at in places(document):
        chosen = HOSTILE if per_place is None else rng.sample(HOSTILE, per_place)
        for new in chosen:
            yield f"{at} = {dumps(new)[:40]}", changed(document, at, lambda c, k, new=new: put(c, k, new))
        for how in (gone, renamed, twice):
            yield f"{at} {how.__name__}", changed(document, at, how)
    for new in HOSTILE:
        yield f"the whole = {dumps(new)[:40]}", new


def texts(document: Any, rng: Random, per_place: int | None = None) -> Iterator[tuple[str, bytes]]:
    """``values`` as JSON, and the plain text's own damage."""
    for what, value in values(document, rng, per_place):
        yield what, dumps(value).encode()
    whole = json.dumps(document).encode()
    yield "a byte order mark", b"\xef\xbb\xbf" + whole
    yield "two documents", whole + whole
    yield "UTF-16", whole.decode().encode("utf-16")
    yield from contents(whole, rng, 60)


# -- bytes -----------------------------------------------------------------------------------------------------------


def contents(whole: bytes, rng: Random, n: int, within: tuple[int, int] | None = None) -> Iterator[tuple[str, bytes]]:
    """``n`` files whose bytes were flipped, cut, added, zeroed, moved or set to extreme numbers."""
    low, high = within or (0, len(whole))
    for _ in range(n):
        at = rng.randrange(low, high)
        much = min(rng.choice([1, 2, 4, 8, 16, 64, 300]), high - at)
        kind = rng.randrange(8)
        if kind <= 2:
            made = whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :]
        elif kind == 3:
            made = whole[:at]
        elif kind == 4:
            made = whole[:at] + rng.randbytes(much) + (whole[at:] if rng.random() < 0.5 else whole[at + much :])
        elif kind == 5:
            made = whole[:at] + bytes(much) + whole[at + much :]
        elif kind == 6:
            number = rng.choice([0, 1, -1, 2**31 - 1, -(2**31), 2**30, 1000])
            made = whole[:at] + struct.pack("<i", number) + whole[at + 4 :]
        else:
            other = rng.randrange(low, high)
            made = whole[:at] + whole[other : other + much] + whole[at + much :]
        yield f"bytes at {at:,}, kind {kind}, {much}", made
    yield "nothing", b""
    yield "a newline more", whole + b"\n"
    yield "twice", whole + whole


# -- containers ------------------------------------------------------------------------------------------------------


def safetensors(whole: bytes, rng: Random, n: int = 200) -> Iterator[tuple[str, bytes]]:
    """Headers with hostile values, and the bytes' own damage."""
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    for what, value in values(header, rng, per_place=6):
        text = dumps(value).encode()
        yield f"header {what}", struct.pack("<Q", len(text)) + text + data
    for number in (0, 1, 7, length - 1, length + 1, len(whole), 2**31, 2**63, 2**64 - 1):
        yield f"a header of {number}", struct.pack("<Q", number) + whole[8:]
    yield from contents(whole, rng, n, (0, 8 + length))
    yield from contents(whole, rng, n)


def archives(whole: bytes, rng: Random, n: int = 200) -> Iterator[tuple[str, bytes]]:
    """A zip archive whose members are changed (with right checksums), gone, renamed, packed, or there twice."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    small = [i for i, (_, data) in enumerate(members) if data]
    for i, (name, data) in enumerate(members):
        rest = members[:i] + members[i + 1 :]
        yield f"{name} gone", packed(rest)
        yield f"{name} renamed", packed([*rest, (f"{name}_", data)])
        yield f"{name} twice", packed([*members, (name, data)])
        yield f"{name} twice and different", packed([*members, (name, data[:-1] + b"\x01")])
        yield f"{name} expands", packed([*rest, (name, data + bytes(100_000_000))] if i == 0 else rest)
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield f"packed as {kind}", packed(members, kind)
        yield from contents(packed(members, kind), rng, n // 4)
    for _ in range(n):
        i = rng.choice(small)
        name, data = members[i]
        for what, made in contents(data, rng, 1, (0, min(len(data), 400))):
            yield f"{name}: {what}", packed([*members[:i], (name, made), *members[i + 1 :]])
    yield from contents(whole, rng, n)


def packed(members: list[tuple[str, bytes]], kind: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of these members."""
    import warnings

    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that stand twice
        with zipfile.ZipFile(
            out, "w", kind if sum(len(d) for _, d in members) < 1 << 24 else zipfile.ZIP_DEFLATED
        ) as z:
            for name, data in members:
                z.writestr(name, data)
    return out.getvalue()


def is_number(value: Any) -> bool:
    """Whether a damaged document's value is a finite number, and no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
