"""How much what is said of latents is about something: by the cosine of sentence embeddings, or a judge's rating."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from unweave.core.files import read_toml
from unweave.core.rules import only_for, only_where, rule
from unweave.core.spec import Spec
from unweave.judge.base import Judge
from unweave.judge.form import Form, Ratings, few_shot, rate, rating_form

K = TypeVar("K")
_WITH_TEXT = only_where("text is given", lambda spec: spec.text != "", "give the query's text")
_PROMPT = read_toml(Path(__file__).with_name("relevance.toml"))["relevance"]


@dataclass(frozen=True, kw_only=True)
class QuerySpec(Spec):
    """Selecting latents whose explanation is about something."""

    text: Annotated[str, rule("words", lambda text: text == "" or text.strip() != "")] = ""
    """What it should be about; without it nothing is selected."""
    by: Annotated[Literal["embedding", "judge"], _WITH_TEXT] = "embedding"
    """Cosine of sentence embeddings, or the judge's rating from 0 to 100, over 100."""
    at_least: Annotated[float, rule("from -1 to 1", lambda value: -1 <= value <= 1), _WITH_TEXT] = 0.5
    """The relevance from which a latent is selected."""
    embedder: Annotated[str, only_for("by", "embedding"), _WITH_TEXT] = "all-minilm-l6-v2"
    """A catalogue name, hub id or folder of an encoder; what sentence-transformers wrote can be read."""


class About(NamedTuple):
    """What a description is held against."""

    topic: str
    description: str


RELEVANCE: Form[About] = rating_form(
    "relevance", _PROMPT["version"],
    lambda case: few_shot(_PROMPT, f"Topic: {case.topic}\nDescription: {case.description}"), range(101),
)  # fmt: skip


def rate_relevance(judge: Judge, query: str, labels: Mapping[K, str]) -> tuple[dict[K, float], Ratings[About]]:
    """The judge's rating of every label, from 0 to 1, without those that it did not rate; and its answers."""
    ratings = rate(judge, RELEVANCE, [About(query, label) for label in labels.values()])
    return {key: row.best / 100 for key, row in zip(labels, ratings.rows, strict=True) if row.answer}, ratings


def cosines(query: str, labels: Mapping[K, str], embedder: str, device: str | None) -> dict[K, float]:
    """The cosine of each label's embedding and the query's."""
    from unweave.lm.embed import embed

    vectors = embed([query, *labels.values()], embedder, device)
    return dict(zip(labels, (vectors[1:] @ vectors[0]).tolist(), strict=True))
