"""The header of a safetensors file: every tensor's name, type, shape and place, compared with the file's length."""

from __future__ import annotations

import math
from pathlib import Path

from unweave.core.errors import UnweaveError
from unweave.core.fields import Fields
from unweave.core.files import parse_json
from unweave.sae.formats.archives import damaged

_HEADER_BYTES = 16 << 20
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SIZES |= {"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


def tensor_names(path: Path) -> frozenset[str]:
    """The names of a safetensors file's tensors, from its header alone; none for other or damaged files."""
    if path.suffix != ".safetensors" or not path.is_file():
        return frozenset()
    try:
        return frozenset(checked_header(path))
    except UnweaveError:
        return frozenset()


def checked_header(path: Path) -> list[str]:
    """The tensors' names. UnweaveError for a repeated name, or where shapes, places and the file's length differ."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(_HEADER_BYTES, size - 8):
                raise damaged(path, f"it says its header has {length:,} bytes, and the file has {size:,}")
            text = handle.read(length)
        header = Fields(parse_json(text.decode(), str(path)), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, error) from error
    except UnweaveError as error:
        raise error if error.what.startswith("the weights") else damaged(path, error.what) from None
    about = header.mapping("__metadata__")
    for name in about:
        about.text(name)
    names = [name for name in header if name != "__metadata__"]
    places = sorted(_place(header.mapping(name), name) for name in names)
    end = 0
    for start, stop in places:
        if start != end:
            raise damaged(path, "its tensors overlap, or leave bytes between them")
        end = stop
    if end != size - 8 - length:
        raise damaged(path, f"its tensors take {end:,} bytes, and {size - 8 - length:,} are there")
    return names


def _place(entry: Fields, name: str) -> tuple[int, int]:
    """Where a tensor's bytes are; as many as its type and shape need."""
    kind = entry.text("dtype") or ""
    shape, place = entry.integers("shape"), entry.integers("data_offsets")
    if kind not in _SIZES or len(place) != 2 or place[1] - place[0] != math.prod(shape) * _SIZES[kind]:
        raise damaged(entry.where, f"{name[:80]} says {kind[:20]} of shape {list(shape)[:6]}, which its bytes are not")
    return place[0], place[1]
