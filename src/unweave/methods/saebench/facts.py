"""Entities and their attributes, in sentences that end where a value comes next, and pairs of them; for RAVEL.

Our own (``ravel.toml``: cities, Nobel laureates), or JSON lines of another's:

    {"entity_class": "city", "attribute": "Country", "entity": "Paris", "value": "France", "sentence": "{} is in"}

A value may be a list: the value and other names of it. A sentence has words before the entity, and nothing but the
value comes next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.files import read_toml
from unweave.data.rows import json_rows

TRAIN = 0.7
"""of the entities (compatible form: of the pairs) that masks are trained on"""
_LEAST, _VALUES = 8, 2
"""prompts, and values, of an attribute on a side"""
Array = np.ndarray[Any, Any]
_FIELDS = ("entity_class", "attribute", "entity", "sentence")


@dataclass(frozen=True)
class Fact:
    """One sentence about an entity, and what should come next."""

    kind: str
    attribute: str
    entity: str
    names: tuple[str, ...]
    """the value, and other names of it"""
    sentence: str

    @property
    def start(self) -> str:
        """The sentence up to the entity's end."""
        return self.sentence.partition("{}")[0] + self.entity

    @property
    def text(self) -> str:
        return self.start + self.sentence.partition("{}")[2]


def facts(path: Path | None) -> list[Fact]:
    """The facts of a file, or our own. UnweaveError for a row without the fields."""
    return list(_own() if path is None else (_read(row, where) for row, where in json_rows(path)))


def says(text: str, names: tuple[str, ...], form: str) -> bool:
    """Whether a completion begins with a value, as a word of its own. Compatible form: SAEBench's rule, in which an
    unfinished value counts and the text ends at a quotation mark (its special cases are other names here)."""
    said = text.partition('"')[0].strip(' "\n').lower() if form == "compatible" else text.strip().lower()
    for name in (name.lower() for name in names):
        if form == "compatible":
            if said and (said.startswith(name) or name.startswith(said)):
                return True
        elif re.match(rf"(the )?{re.escape(name)}(?!\w)", said):
            return True
    return False


def _read(row: Any, where: str) -> Fact:
    fields = row if isinstance(row, Mapping) else {}
    value = fields.get("value")
    texts = [*(fields.get(name) for name in _FIELDS), *(value if isinstance(value, list) else [value])]
    if len(texts) == len(_FIELDS) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UnweaveError("this row is no fact", where=where, remedy=f"give {', '.join((*_FIELDS, 'value'))} as text")
    kind, attribute, entity, sentence, *names = map(str, texts)
    before, slot, _ = sentence.partition("{}")
    if not slot or not before.strip():
        raise UnweaveError("a sentence needs words, and then {} for the entity", where=where, remedy="fix the sentence")
    return Fact(kind, attribute, entity, tuple(names), sentence)


def _own() -> Iterator[Fact]:
    data = read_toml(Path(__file__).with_name("ravel.toml"))
    city, laureate = data["city"], data["nobel_prize_winner"]
    names = {line.split("/")[0]: tuple(line.split("/")) for line in (
        line.partition(":")[0] for line in city["country"].strip().splitlines())}  # fmt: skip
    of: dict[str, dict[str, tuple[str, ...]]] = {"Country": names}
    for attribute, lines in city["of_country"].items():
        values = (line.split(": ") for line in lines.strip().splitlines())
        of[attribute] = {name: tuple(value.split("/")) for value, places in values for name in places.split(", ")}
    for line in city["country"].strip().splitlines():
        country, _, cities = line.partition(": ")
        for attribute, sentences in city["sentences"].items():
            if value := of[attribute].get(country.split("/")[0]):
                yield from (Fact("city", attribute, name, value, one) for name in cities.split(", ")
                            for one in sentences)  # fmt: skip
    for line in laureate["people"].strip().splitlines():
        name, *values = line.split("|")
        for attribute, value in zip(laureate["columns"], values, strict=True):
            known = names.get(value, (value,))
            yield from (Fact("nobel_prize_winner", attribute, name, known, one)
                        for one in laureate["sentences"][attribute])  # fmt: skip


# -- what a model knows, and pairs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Pairs of prompts of one problem, [n] each: numbers of base and source, and whether the source's value should
    come."""

    base: Tensor
    source: Tensor
    cause: Tensor

    def __len__(self) -> int:
        return len(self.base)

    def take(self, rows: Tensor) -> Pairs:
        return Pairs(self.base[rows], self.source[rows], self.cause[rows])

    @classmethod
    def cat(cls, some: Sequence[Pairs]) -> Pairs:
        return cls(*(torch.cat([getattr(one, name) for one in some]) for name in ("base", "source", "cause")))

    @property
    def wanted(self) -> Tensor:
        """The prompt whose completion is wanted."""
        return torch.where(self.cause, self.source, self.base)


@dataclass(frozen=True)
class Known:
    """Facts that the model knows, by number, and the attributes of each class that enough of them are about."""

    facts: tuple[Fact, ...]
    attributes: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, facts: Sequence[Fact]) -> Known:
        by: dict[str, dict[str, list[Fact]]] = {}
        for one in facts:
            by.setdefault(one.kind, {}).setdefault(one.attribute, []).append(one)
        attributes = {}
        for kind, of in by.items():
            enough = tuple(name for name, some in of.items() if len(some) >= 4 * _LEAST
                           and len({one.names for one in some}) > _VALUES)  # fmt: skip
            if len(enough) > 1:
                attributes[kind] = enough
        return cls(tuple(facts), attributes)

    def problems(self, n: int, seed: int, form: str, first: Tensor) -> dict[tuple[str, str], tuple[Pairs, Pairs]]:
        """Training and test pairs of each attribute: n of cause and n of isolation in both together."""
        rng, problems = np.random.default_rng([seed, 61]), {}
        for kind, attributes in self.attributes.items():
            sides = self._sides(kind, rng, form)
            for attribute in attributes:
                parts = []
                for side, share in zip(sides, (TRAIN, 1 - TRAIN) if len(sides) > 1 else (1.0,), strict=True):
                    others = [name for name in attributes if name != attribute]
                    cause = self._pairs(side, kind, [attribute], round(n * share), rng)
                    isolation = self._pairs(side, kind, others, round(n * share), rng)
                    both = np.concatenate([cause, isolation])
                    order = rng.permutation(len(both))
                    flag = order < len(cause)
                    base, source = torch.from_numpy(both[order].T.copy())
                    parts.append(Pairs(base, source, torch.from_numpy(flag)))
                problems[kind, attribute] = _as_saebench(parts[0], first) if len(parts) == 1 else (parts[0], parts[1])
        return problems

    def _sides(self, kind: str, rng: np.random.Generator, form: str) -> list[Array]:
        """Prompts of a class: those of entities to train with and of others to test with, or all of them."""
        numbers = np.array([i for i, one in enumerate(self.facts) if one.kind == kind])
        if form == "compatible":
            return [numbers]
        names = sorted({self.facts[i].entity for i in numbers})
        train = {names[i] for i in rng.permutation(len(names))[: round(TRAIN * len(names))]}
        here = np.array([self.facts[i].entity in train for i in numbers])
        return [numbers[here], numbers[~here]]

    def _pairs(self, side: Array, kind: str, attributes: Sequence[str], n: int, rng: np.random.Generator) -> Array:
        """(base, source) int64 [n, 2] on attributes in turn; each prompt is a base before one is again."""
        each = []
        for place, attribute in enumerate(attributes):
            here = [int(i) for i in side if self.facts[i].attribute == attribute]
            if len(here) < _LEAST or len({self.facts[i].names for i in here}) < _VALUES:
                raise UnweaveError(f"the model knows {attribute} of too few entities ({kind}) on a side",
                                   where="ravel", remedy="give more facts: ravel.facts")  # fmt: skip
            size = n * (place + 1) // len(attributes) - n * place // len(attributes)
            order = np.concatenate([rng.permutation(here) for _ in range(-(-size // len(here)))])[:size]
            other = {
                names: [i for i in here if self.facts[i].names != names]
                for names in {self.facts[i].names for i in here}
            }
            each += [(base, rng.choice(other[self.facts[base].names])) for base in order.tolist()]
        return np.array(each, dtype=np.int64)


def _as_saebench(pairs: Pairs, first: Tensor) -> tuple[Pairs, Pairs]:
    """Divided, with pairs whose completions begin alike counted as isolation."""
    cause = pairs.cause & (first[pairs.base] != first[pairs.source])
    whole, cut = Pairs(pairs.base, pairs.source, cause), round(TRAIN * len(pairs))
    every = torch.arange(len(pairs))
    return whole.take(every[:cut]), whole.take(every[cut:])
