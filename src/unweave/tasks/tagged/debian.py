"""Debian's package descriptions with their debtags, by apt or from files of an archive.

``Packages`` has each package's tags and the MD5 of its description, ``Translation-en`` the descriptions by MD5.
``apt-get update`` brings both into folders of the cache, signed and without touching the machine's own lists.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.core.files import lines
from unweave.core.progress import task
from unweave.lm.fetch import building, cache_dir
from unweave.tasks.tagged.texts import Tagged

_NAMED = "*Packages", "*Translation-en"


def fetched() -> Path:
    """The lists in the cache, fetched the first time. UnweaveError without apt-get, and where it fails."""
    folder = cache_dir() / "debian"
    with building(folder) as work:
        if work is None:
            return folder
        if shutil.which("apt-get") is None:
            remedy = "name a folder with Debian's Packages and Translation-en files, or another source"
            raise UnweaveError("debtags come by apt-get, which is not here", remedy=remedy)
        lists, cache = work / "lists", work / "cache"
        for place in (lists, cache):
            (place / "partial").mkdir(parents=True, exist_ok=True)
        options = {"Acquire::Languages": "en", "Acquire::GzipIndexes": "false", "APT::Sandbox::User": "root"}
        options |= {"Dir::State::Lists": str(lists), "Dir::Cache": str(cache), "APT::Update::Post-Invoke-Success": ""}
        command = ["apt-get", "update", "-q", *(f"-o{name}={value}" for name, value in options.items())]
        with task("fetch Debian's descriptions", total=1, unit="lists"):
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        wanted = [path for pattern in _NAMED for path in sorted(lists.glob(pattern))]
        if done.returncode or {path.suffix for path in wanted} == set() or len(wanted) < 2:
            reason = (done.stderr.strip() or done.stdout.strip() or "it brought no lists").splitlines()[-1][:300]
            remedy = "check apt's sources and the network, or name a folder with Packages and Translation-en files"
            raise UnweaveError(f"apt-get could not bring the package lists: {reason}", remedy=remedy)
        for path in wanted:
            shutil.move(path, work / "out" / path.name)
    return folder


def read(folder: Path) -> tuple[dict[str, Any], Iterator[Tagged]]:
    """The tagged packages of a folder of lists. UnweaveError where there are no Translation files or no tags."""
    packages, translations = (sorted(folder.glob(pattern)) for pattern in _NAMED)
    if not packages or not translations:
        what = "Packages need a Translation-en file beside them, which has the descriptions"
        raise UnweaveError(what, where=str(folder), remedy="put both files of one archive there, not compressed")
    notes = ["Descriptions are of software, in one style; tags are by volunteers and incomplete."]
    return {"source": "Debian package descriptions with debtags", "notes": notes}, _texts(packages, translations)


def _texts(packages: list[Path], translations: list[Path]) -> Iterator[Tagged]:
    tags: dict[str, set[str]] = {}
    for path in packages:
        for fields in _paragraphs(path):
            if "Tag" in fields and "Description-md5" in fields:
                tags.setdefault(fields["Description-md5"], set()).update(_tags(fields["Tag"]))
    if not tags:
        raise UnweaveError("no package has tags", where=str(packages[0]), remedy="give Packages files with Tag fields")
    for path in translations:
        for fields in _paragraphs(path):
            own = tags.pop(fields.get("Description-md5", ""), None)
            if own is not None and "Description-en" in fields:
                yield Tagged(_plain(fields["Description-en"]), tuple(sorted(own)))


def _tags(written: str) -> Iterator[str]:
    """ "a::{b,c}, d::e" as a::b, a::c, d::e."""
    for facet, several, one in re.findall(r"(\S+?::)(?:\{([^}]*)\}|([^\s,{]+))", written):
        yield from (facet + name.strip() for name in (several or one).split(",") if name.strip())


def _plain(description: str) -> str:
    """A description without its indentation; " ." is an empty line."""
    first, _, rest = description.partition("\n")
    body = "\n".join("" if line.strip() == "." else line.strip() for line in rest.splitlines())
    return f"{first}\n{body}".strip()


def _paragraphs(path: Path) -> Iterator[dict[str, str]]:
    """The paragraphs of a control file as fields; lines that begin with a blank go on with the field before."""
    fields: dict[str, str] = {}
    name = ""
    for number, line in lines(path):
        if not line.strip():
            if fields:
                yield fields
            fields, name = {}, ""
        elif line[0] in " \t" and name:
            fields[name] += "\n" + line
        else:
            name, colon, value = line.partition(":")
            if not colon:
                raise UnweaveError("a line has no field", where=f"{path}, line {number}", remedy="restore the file")
            fields[name] = value.strip()
    if fields:
        yield fields
