"""Questions of a Stack Exchange dump with their tags, from ``Posts.xml`` and ``Comments.xml`` or the ``.7z`` of both.

1. A first pass over Comments.xml notes where each comment's line begins: 24 bytes a comment, sorted by post.
2. Posts.xml is read line by line, one row a line as the dumps have it. Questions have tags; answers are passed over.
3. A text is the title, the post and its comments (read from their lines), cleaned of HTML.

Rows are parsed with defusedxml, each alone: entities, DTDs and outside references are refused, not expanded.
"""

from __future__ import annotations

import errno
import re
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from unweave.core.contents import content_of
from unweave.core.errors import UnweaveError
from unweave.core.files import printable
from unweave.core.memory import refuse_if_memory
from unweave.core.writing import disk_free
from unweave.lm.fetch import building, cache_dir
from unweave.tasks.tagged.texts import Tagged

_FILES = "Posts.xml", "Comments.xml"
_LONGEST = 1 << 24
"""bytes of one row"""
_QUESTION = "1"
_NUMBER = re.compile("[0-9]{1,18}")
_BLOCKS = ("p", "pre", "li", "br", "hr", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "tr", "div")
_EXTRA = "pip install 'unweave[label]'"


def read(path: Path, *, drop_code: bool, comments: bool) -> tuple[dict[str, Any], Iterator[Tagged]]:
    """The questions of a dump. UnweaveError for files that are missing, broken, cut short, or not a dump's."""
    for package in ("defusedxml", "lxml"):
        _require(package, path)
    folder = path if path.is_dir() else _unpacked(path)
    if comments and not (folder / _FILES[1]).is_file():
        raise UnweaveError(
            "Comments.xml is missing", where=str(folder), remedy="put it there, or set texts.comments: false"
        )
    notes = ["Askers tag their own questions: a tag that is absent may still be what the text touches."]
    about = {"source": f"Stack Exchange questions of {path.stem}", "notes": notes}
    return about, _texts(folder, drop_code, comments)


def _texts(folder: Path, drop_code: bool, comments: bool) -> Iterator[Tagged]:
    posts, at_comments = (folder / name for name in _FILES)
    index = _index(at_comments) if comments else (np.zeros(0, np.int64), np.zeros(0, np.int64))
    with open(at_comments if comments else posts, "rb") as handle:
        for _, row in _rows(posts, "posts"):
            if row.get("PostTypeId") != _QUESTION or not row.get("Tags"):
                continue
            parts = [row.get("Title", ""), plain(row.get("Body", ""), drop_code)]
            parts += _comments(handle, index, row.get("Id", ""), at_comments)
            tags = tuple(tag for tag in re.split(r"[<>|]+", row["Tags"]) if tag)
            yield Tagged("\n".join(part for part in parts if part.strip()), tags)


def plain(html: str, drop_code: bool = False) -> str:
    """HTML as text: blocks on lines of their own, code blocks kept or dropped, nothing loaded or run."""
    from lxml.html import HTMLParser, document_fromstring

    if not html.strip():
        return ""
    parser = HTMLParser(encoding="utf-8", no_network=True, remove_comments=True, remove_pis=True)
    tree = document_fromstring(f"<div>{html}</div>".encode("utf-8", "replace"), parser=parser)
    for element in list(tree.iter("script", "style", *(("pre",) if drop_code else ()))):
        element.clear(keep_tail=True)
    for element in list(tree.iter(*_BLOCKS)):
        end = element.makeelement("span")
        end.text = "\n"
        element.append(end)
    return re.sub(r"\n\s*\n+", "\n\n", "".join(tree.itertext())).strip()


def _index(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The post of each comment, ascending, and where its line begins, int64 [n] both."""
    posts, starts = array("q"), array("q")
    for start, row in _rows(path, "comments"):
        if _NUMBER.fullmatch(row.get("PostId", "")):
            posts.append(int(row["PostId"]))
            starts.append(start)
    order = np.argsort(np.frombuffer(posts, np.int64), kind="stable") if posts else np.zeros(0, np.int64)
    return np.array(posts, np.int64)[order], np.array(starts, np.int64)[order]


def _comments(handle: BinaryIO, index: tuple[Any, Any], post: str, path: Path) -> list[str]:
    """The texts of a post's comments, in their order."""
    if not _NUMBER.fullmatch(post) or not len(index[0]):
        return []
    first, last = np.searchsorted(index[0], [int(post), int(post) + 1])
    texts = []
    for start in index[1][first:last].tolist():
        handle.seek(start)
        texts.append(plain(_parsed(handle.readline(_LONGEST), f"{path}, byte {start}").get("Text", "")))
    return texts


def _rows(path: Path, root: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Where each row's line begins, and its fields. UnweaveError for anything that is no dump of ``root``."""
    remedy = "give the dump's files as published"
    start, state = 0, ""
    try:
        with open(path, "rb") as handle:
            while line := handle.readline(_LONGEST + 1):
                where, begin = f"{path}, byte {start:,}", start
                start += len(line)
                word = line.strip().removeprefix(b"\xef\xbb\xbf")
                if len(line) > _LONGEST:
                    raise UnweaveError(f"a line has more than {_LONGEST:,} bytes", where=where, remedy=remedy)
                if not word or (not state and re.fullmatch(rb"<\?xml[^<>]*>", word)):
                    continue
                if not state and word == f"<{root}>".encode():
                    state = "inside"
                elif state == "inside" and word == f"</{root}>".encode():
                    state = "after"
                elif state == "inside" and word.startswith(b"<row "):
                    yield begin, _parsed(word, where)
                else:
                    shown = printable(word[:60].decode("utf-8", "replace"))
                    raise UnweaveError(f"{shown!r} is not a row of <{root}>", where=where, remedy=remedy)
    except OSError as error:
        raise UnweaveError(f"cannot read it: {error.strerror}", where=str(path), remedy="check the path") from error
    if state != "after":
        raise UnweaveError(f"the file ends before </{root}>", where=str(path), remedy="the download was cut: repeat it")


def _parsed(line: bytes, where: str) -> Mapping[str, str]:
    from xml.etree.ElementTree import ParseError

    from defusedxml.common import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    try:
        return fromstring(line, forbid_dtd=True).attrib
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:
        reason = "it declares entities or a DTD" if isinstance(error, DefusedXmlException) else str(error)
        raise UnweaveError(f"not a row of XML: {reason}", where=where, remedy="restore the file") from None


def _require(package: str, where: Path) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise UnweaveError(f"Stack Exchange dumps need the package {package}", where=str(where), remedy=_EXTRA)


def _unpacked(path: Path) -> Path:
    """The two files of an archive, in the cache. UnweaveError for what is none, or too large for the disk."""
    _require("py7zr", path)
    import py7zr
    from py7zr.exceptions import PasswordRequired

    folder = cache_dir() / "stackexchange" / content_of(path)
    with building(folder) as work:
        if work is None:
            return folder
        try:
            with py7zr.SevenZipFile(path) as archive:
                members = {info.filename: info for info in archive.list() if info.filename in _FILES}
                if _FILES[0] not in members or any(not info.is_file for info in members.values()):
                    raise UnweaveError("the archive holds no Posts.xml", where=str(path), remedy="give a forum's .7z")
                if (size := sum(info.uncompressed for info in members.values())) > disk_free(work):
                    raise UnweaveError(f"its files take {size / 1e9:.1f} GB, more than is free", where=str(work),
                                       remedy="free some space, or set UNWEAVE_CACHE to another disk")  # fmt: skip
                archive.extract(work / "out", targets=list(members))
        except UnweaveError:
            raise
        except Exception as error:  # of the container, of each of its compressions, and of encryption
            refuse_if_memory(error, path)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # the cache's disk is full: not the archive's fault
            locked = isinstance(error, PasswordRequired)
            reason = "it has a password" if locked else (str(error) or type(error).__name__).splitlines()[0][:200]
            raise UnweaveError(f"not a 7z archive that can be read: {reason}", where=str(path),
                               remedy="get the archive again") from error  # fmt: skip
    return folder
