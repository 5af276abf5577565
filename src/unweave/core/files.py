"""Reading small files that somebody else wrote: text, lines, JSON, YAML and TOML, with one rule for each oddity.

- A byte order mark is not part of the text. Invalid UTF-8 is an error that gives its position.
- Lines end at ``\\n`` (or ``\\r\\n``) and nowhere else: U+2028, U+2029 and U+0085 are ordinary characters of a string.
- A key that appears twice, a number that is not finite or too long, half a surrogate pair, nesting deeper than 100
  levels and aliases that expand without bound are errors, not surprises later on.
- A file is not read before its size is known to be reasonable.

Every failure is an UnweaveError that names the file, the rule and the remedy.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.core.memory import refuse_if_memory

_DEEPEST = 100
"""levels of nesting; conversations and configurations need about ten"""
_EXPANDED = 100_000
"""nodes of a YAML document once its aliases are written out"""
_YAML_BYTES = 1 << 19
"""PyYAML reads about 100 kB a second"""


def read_text(path: str | Path, *, at_most: int = 1 << 28) -> str:
    """The text of a UTF-8 file of at most ``at_most`` bytes, without a byte order mark."""
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            content = handle.read(at_most + 1)  # a pipe has no size to ask for first
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if len(content) > at_most:
        raise UnweaveError(f"the file has more than {at_most:,} bytes", where=str(path), remedy="give a smaller file")
    return _decoded(content, str(path)).removeprefix("\ufeff")


def lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers, from 1, without their ends; one line in memory at a time."""
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                text = _decoded(line, f"{path}, line {number}").removesuffix("\n").removesuffix("\r")
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def files_under(folder: Path) -> list[Path]:
    """Every file in a folder and in its subfolders, in order; links to folders are followed, each folder once.

    Raises UnweaveError for a link that leads back to a folder around it, and for a folder that cannot be read.
    """
    files: list[Path] = []
    seen: set[Path] = set()
    open_folders = [folder]
    while open_folders:
        inner = open_folders.pop()
        real = inner.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            children = sorted(inner.iterdir(), reverse=True)
        except OSError as error:
            raise _unreadable(inner, error) from None
        for child in children:
            if child.is_dir():
                open_folders.append(child)
                if child.is_symlink() and child.resolve() in (real, *real.parents):
                    what = f"a link leads back to a folder around it, {child.resolve()}"
                    raise UnweaveError(what, where=str(child), remedy="remove the link, or give the folders one by one")
            elif child.is_file():
                files.append(child)
            elif child.is_symlink() and _is_loop(child):
                raise UnweaveError("a link leads to itself", where=str(child), remedy="remove the link")
    return sorted(files)


def _is_loop(link: Path) -> bool:
    try:
        link.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def json_decoder(*, finite: bool = True) -> json.JSONDecoder:
    """Decodes JSON whose keys each stand once. Its errors are ValueError and RecursionError."""
    hooks: dict[str, Any] = {"parse_constant": _not_finite, "parse_float": _finite} if finite else {}
    return json.JSONDecoder(object_pairs_hook=_unique, **hooks)


def parse_json(text: str, where: str, *, finite: bool = True, halves: bool = False) -> Any:
    """The value of a JSON text. ``finite=False`` lets NaN and infinity pass, for fields that nobody reads;
    ``halves`` lets halves of surrogate pairs pass, for who replaces them."""
    try:
        value = json_decoder(finite=finite).decode(text)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise UnweaveError(f"not valid JSON: {_reason(error)}", where=where, remedy="fix the file") from None
    check_plain(value, where, halves=halves)
    return value


def read_json(path: str | Path, *, at_most: int = 1 << 28) -> Any:
    """The value of a JSON file."""
    return parse_json(read_text(path, at_most=at_most), str(path))


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file of at most half a megabyte. Dates stay text."""
    return parse_yaml(read_text(path, at_most=_YAML_BYTES), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text: plain values only, each key once, aliases expanded to at most 100,000 nodes."""
    import yaml

    try:
        loader = _loader()(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_node(node, where)
            value = loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise _too_deep(where) from None
    except (yaml.YAMLError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise UnweaveError(f"not valid YAML: {_reason(error)}", where=where, remedy="fix the file") from None
    check_plain(value, where)
    return value


def read_toml(path: str | Path) -> dict[str, Any]:
    """The value of a TOML file."""
    import tomllib

    text = read_text(path, at_most=1 << 24)
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise _too_deep(str(path)) from None
    except ValueError as error:
        raise UnweaveError(f"not valid TOML: {_reason(error)}", where=str(path), remedy="fix the file") from None
    check_plain(value, str(path))
    return value


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: half a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(path: str | Path) -> str:
    """A path as it can be shown whatever its bytes are, cut to a readable length."""
    return str(path).replace("\0", "\\x00").encode(errors="backslashreplace").decode()[:300]


def check_plain(value: Any, where: str, *, halves: bool = False) -> None:
    """Refuses what is nested too deeply, and strings that cannot be written; level by level, not by recursion."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.keys()
                inner += item.values()
            elif isinstance(item, (list, tuple)):
                inner += item
            elif not halves and isinstance(item, str) and not item.isascii() and not is_text(item):
                raise UnweaveError(
                    f"half a surrogate pair in {item[:40]!r}", where=where, remedy="write the whole character"
                )
        if not inner:
            return
        level = inner
    raise _too_deep(where)


def _too_deep(where: str) -> UnweaveError:
    return UnweaveError(f"nested deeper than {_DEEPEST} levels", where=where, remedy="fix the file")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return mapping


def _finite(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"{word[:40]} is too large a number")
    return number


def _not_finite(word: str) -> float:
    raise ValueError(f"{word} is not a number in JSON")


def _loader() -> Any:
    """PyYAML's safe loader without dates, which become objects that no field takes."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
            for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    return Loader


def _check_node(root: Any, where: str) -> None:
    """Refuses duplicate keys, and aliases that expand without end or beyond the bound, before anything is built."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: Any) -> int:
        if id(node) in open_nodes:
            raise ValueError("an alias that holds itself")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            children = node.value if isinstance(node.value, list) else []
            if children and isinstance(children[0], tuple):
                keys = [(key.tag, key.value) for key, _ in children if isinstance(key.value, str)]
                _unique([(f"{value}", None) for _, value in keys])
                children = [part for pair in children for part in pair]
            sizes[id(node)] = 1 + sum(map(size, children))
            open_nodes.discard(id(node))
        return sizes[id(node)]

    if size(root) > _EXPANDED:
        raise UnweaveError(
            f"aliases expand to more than {_EXPANDED:,} values", where=where, remedy="write them out or use fewer"
        )


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        marked = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        what = "not UTF-8 text but UTF-16, by its first bytes" if marked else "not UTF-8 text"
        raise UnweaveError(
            f"{what}: byte 0x{content[error.start]:02x} at {error.start:,}",
            where=where,
            remedy="save the file as UTF-8",
        ) from None


def _unreadable(path: Path, error: OSError | ValueError) -> UnweaveError:
    """ValueError: a null byte or half a surrogate pair in the name."""
    refuse_if_memory(error, path)
    if isinstance(error, FileNotFoundError):
        return UnweaveError("the file does not exist", where=str(path), remedy="check the path")
    return UnweaveError(f"cannot read the file: {_reason(error)}", where=printable(path), remedy="check the path")


def _reason(error: Exception) -> str:
    """An exception's first lines in one, cut to a readable length."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:300]
