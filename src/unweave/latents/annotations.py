"""What people say about latents: one JSON object per line, so that every answer is kept the moment it is given.

    {"name": "resid_post.24/3036", "annotation": "plural subjects", "notes": "", "interpretability": 80,
     "complexity": 35, "relevant": true, "sae": "0123456789ab"}

``interpretability`` and ``complexity`` are 0 to 100, as in the form of Marks et al. 2024, app. F; ``relevant`` says
whether the latent belongs to the task. ``labels`` are labels that texts have and the latent tells, with their scores
(``unweave labels``). What was not answered is null or left out. The last line for a name counts.
The files that were published with that paper are read too (``Component``, ``Layer``, ``Feature``, ``Name``,
``Annotation``, ``Notes`` or ``notes``); their names, such as ``resid_5/3036``, become those of the sites in use.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from unweave.core.errors import UnweaveError
from unweave.core.files import parse_json, read_text
from unweave.core.result import from_plain
from unweave.core.site import Site
from unweave.core.writing import friendly_io, write_file

SCALE = (0, 100)
"""The least and the greatest rating."""
ERROR = "error"
"""Stands for the latent's number in the name of a site's error node."""

_USUAL = {"embed": "embed", "attn": "attn_add", "mlp": "mlp_add", "resid": "resid_post"}
_PAPER_KEYS = ("component", "layer", "feature", "name", "annotation", "notes")


@dataclass(frozen=True, kw_only=True)
class ScoredLabel:
    """A label of texts that a latent tells, and how well: a text has it where the latent fires on more than
    ``threshold`` of its tokens."""

    label: str
    threshold: float
    score: float
    """calibrated F1 on the texts that it was chosen on"""
    support: int
    """how many of them have the label"""
    maximum: float
    """the latent's largest activation on them"""
    output_score: float | None = None
    """how well the latent brings out what its direction promotes, of 1"""
    auroc: float | None = None
    """of the latent's frequency on texts held out; None where these have the label not at all, or all of them"""
    auroc_low: float | None = None
    auroc_high: float | None = None
    """the 95 % bootstrap interval over texts; None where too few of these have the label, or lack it"""


class Pair(NamedTuple):
    """A latent and one of its labels."""

    site: Site
    latent: int
    label: ScoredLabel
    sae: str | None
    """the digest of the SAE that was looked at"""


@dataclass(frozen=True)
class Annotation:
    """What was said about one latent (or error node). ``name`` is ``resid_post.24/3036``; see the module.

    Raises UnweaveError for a name of another form and for ratings outside 0 to 100.
    """

    name: str
    annotation: str = ""
    notes: str = ""
    interpretability: float | None = None
    complexity: float | None = None
    relevant: bool | None = None
    sae: str | None = None
    """``SAE.digest()`` of the SAE that was looked at; None where nobody wrote it down."""
    labels: tuple[ScoredLabel, ...] = ()
    """the best first"""

    def __post_init__(self) -> None:
        parse_name(self.name)
        for name in ("annotation", "notes"):
            if not isinstance(getattr(self, name), str):
                raise UnweaveError(f"{name} is {getattr(self, name)!r}, not text", where=self.name)
        for name in ("interpretability", "complexity"):
            value = getattr(self, name)
            right = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
            if not right or (value is not None and not SCALE[0] <= value <= SCALE[1]):
                raise UnweaveError(
                    f"{name} is {value!r}", where=self.name, remedy=f"give a number from {SCALE[0]} to {SCALE[1]}"
                )
        if self.relevant not in (True, False, None) or not isinstance(self.relevant, bool | None):
            raise UnweaveError(f"relevant is {self.relevant!r}", where=self.name, remedy="give true, false or null")
        if not isinstance(self.sae, str | None):
            raise UnweaveError(f"sae is {self.sae!r}", where=self.name, remedy="give the SAE's digest or null")

    @property
    def site(self) -> Site:
        return parse_name(self.name)[0]

    @property
    def latent(self) -> int | None:
        """The latent's number; None for an error node."""
        return parse_name(self.name)[1]


def name_of(site: Site, latent: int | None) -> str:
    """``resid_post.24/3036``; with None, the name of the site's error node."""
    return f"{site}/{ERROR if latent is None else latent}"


def parse_name(name: str) -> tuple[Site, int | None]:
    """The site and latent (None: the error) of ``resid_post.24/3036``. UnweaveError for anything else."""
    site, slash, inner = str(name).rpartition("/")
    if not slash or not (inner == ERROR or re.fullmatch("[0-9]{1,18}", inner)):
        raise UnweaveError(f"{name!r} names no latent", remedy="write SITE/NUMBER, e.g. resid_post.24/3036")
    return Site.parse(site), None if inner == ERROR else int(inner)


def parse_latents(names: Sequence[str], sites: Collection[Site]) -> list[tuple[Site, int]]:
    """(site, latent) of each of ``names``; a number alone is a latent of the only site.

    UnweaveError for numbers where there are several sites, and for errors, which are no latents.
    """
    found: list[tuple[Site, int]] = []
    for word in names:
        only = next(iter(sites))
        if re.fullmatch("[0-9]{1,18}", word):
            if len(sites) != 1:
                remedy = f"write {name_of(only, int(word))}"
                raise UnweaveError(f"latent {word} of which of {len(sites)} SAEs?", where="--latents", remedy=remedy)
            found.append((only, int(word)))
            continue
        site, latent = parse_name(word)
        if latent is None:
            raise UnweaveError(f"{word} is an error, which has no contexts", where="--latents", remedy="name latents")
        found.append((site, latent))
    return found


def load(path: str | Path, sites: Iterable[Site] = ()) -> dict[str, Annotation]:
    """Annotations by name, in the order in which names first occur; the last line for a name counts.

    ``sites`` are those in use: the paper's ``attn_3`` becomes whichever attention site of layer 3 is among them
    (``attn_add.3`` where none is). UnweaveError names the line that cannot be read.
    """
    used = list(sites)
    found: dict[str, Annotation] = {}
    try:
        text = read_text(path)
    except UnweaveError as error:
        raise UnweaveError(
            f"cannot read annotations: {error.what}", where=error.where, remedy="give a file of JSON lines"
        ) from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            annotation = _from_value(parse_json(line, where, finite=False), used)
        except UnweaveError as error:
            what = error.what.replace("not valid JSON", "not JSON")
            remedy = "mend or delete that line" if error.remedy == "fix the file" else error.remedy
            raise UnweaveError(what, where=where, remedy=remedy) from error
        if annotation is not None:
            found[annotation.name] = annotation
    return found


def pairs(annotations: Mapping[str, Annotation]) -> list[Pair]:
    """Every latent with each of its scored labels, the best score first."""
    listed = [
        Pair(one.site, one.latent, label, one.sae)
        for one in annotations.values()
        for label in one.labels
        if one.latent is not None
    ]
    return sorted(listed, key=lambda pair: (-pair.label.score, str(pair.site), pair.latent, pair.label.label))


def write(path: str | Path, annotations: Iterable[Annotation]) -> None:
    """Writes a file of annotations, in place of one that is there."""
    write_file(Path(path), "".join(map(_line, annotations)))


def append(path: str | Path, annotation: Annotation) -> None:
    """Adds one line and has it written to the disk before returning; the file and its folder are made where missing."""
    path = Path(path)
    line = _line(annotation)
    with friendly_io(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as handle:
            if handle.seek(0, os.SEEK_END):
                handle.seek(-1, os.SEEK_END)
                if handle.read(1) != b"\n":  # written by hand, or cut short: never continue somebody's line
                    line = "\n" + line
            handle.write(line.encode("utf-8", "replace"))
            handle.flush()
            os.fsync(handle.fileno())


def _line(annotation: Annotation) -> str:
    held = {name: value for name, value in asdict(annotation).items() if name != "labels" or value}
    return json.dumps(held, ensure_ascii=False, allow_nan=False) + "\n"


def refuse_strangers(annotations: Mapping[str, Annotation], digests: Mapping[Site, str], where: str = "") -> None:
    """Raises UnweaveError where an annotation was given about another SAE than the one that is used.

    Latents of two trainings share numbers and nothing else (trap 41). Annotations without a digest are taken.
    """
    for annotation in annotations.values():
        used = digests.get(annotation.site)
        if annotation.sae is not None and used is not None and annotation.sae != used:
            what = f"{annotation.name} was annotated in SAE {annotation.sae}, this one is {used}"
            remedy = "give the annotations that belong to these SAEs, or annotate anew into another file"
            raise UnweaveError(what, where=where, remedy=remedy)


def _from_value(content: Any, used: list[Site]) -> Annotation | None:
    if not isinstance(content, dict):
        raise UnweaveError("not a JSON object", remedy="mend or delete that line")
    if "Name" in content or "Component" in content:
        return _from_paper(content, used)
    known = [f.name for f in fields(Annotation)]
    for key in content:
        if key not in known:  # a mistyped "relevant" would lose a judgement
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UnweaveError(f"there is no field {key!r}", remedy=f"{hint}fields: {', '.join(known)}")
    if not isinstance(content.get("name"), str):
        raise UnweaveError("there is no name", remedy='write "name": "resid_post.24/3036"')
    text = {key: "" if content.get(key) is None else content[key] for key in ("annotation", "notes")}
    labels = from_plain(tuple[ScoredLabel, ...], content.get("labels") or [], "labels")
    for label in labels:
        for name, value in vars(label).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UnweaveError(f"{name} of label {label.label!r} is {value}", remedy="give a number, or null")
    given: dict[str, Any] = content | text | {"name": _our_name(content["name"], used), "labels": labels}
    return Annotation(**given)


def _from_paper(content: Mapping[str, Any], used: list[Site]) -> Annotation | None:
    """One line of the paper's files; None for the table's heading, which stands among them, and where nothing is said
    (some latents are listed again without words, which must not take back what was said of them)."""
    lower = {str(key).lower(): value for key, value in content.items()}
    values = {key: str(lower.get(key) if lower.get(key) is not None else "") for key in _PAPER_KEYS}
    if values["name"] == "Name" or not (values["annotation"] or values["notes"]):
        return None
    name = values["name"]
    if not name:
        layer = f"_{values['layer']}" if values["layer"] else ""
        name = f"{values['component']}{layer}/{values['feature']}"
    return Annotation(_our_name(name, used), values["annotation"], values["notes"])


def _our_name(name: str, used: list[Site]) -> str:
    """A name of ours as it is, one of the paper's by the sites in use."""
    match = re.fullmatch(r"(embed|(?:attn|mlp|resid)_(\d+))/([0-9]{1,18})", name.strip())
    if match is None:
        return name_of(*parse_name(name.strip()))
    kind, layer = match[1].partition("_")[0], None if match[2] is None else int(match[2])
    usual = Site(_USUAL[kind], layer)
    there = sorted(site for site in used if site.layer == layer and site.point.split("_")[0] == kind)
    there = [site for site in there if kind != "resid" or site.point == "resid_post"]
    if usual in there or not there:
        return name_of(usual, int(match[3]))
    if len(there) > 1:
        raise UnweaveError(
            f"{name} could be at {' or '.join(map(str, there))}", remedy="write the site's own name, e.g. attn_add.3/7"
        )
    return name_of(there[0], int(match[3]))
