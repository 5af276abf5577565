"""Explanations of latents, and everything that is said of how far they hold.

1. The judge explains each latent from the contexts shown to it, unless explanations are given.
2. Each explanation is scored on contexts of other documents, and so is another latent's on the same contexts.
3. Where a query is given, explanations are compared with it.
4. Beside them stand an input score (is what the latent fires on what it promotes?) and an output score (does raising it
   bring that about?), which tell latents of what the model reads from those of what it says.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.judge.base import Judge
from unweave.judge.check import Check, check, known_texts
from unweave.judge.form import Ratings, rate
from unweave.latents.records import Records
from unweave.lm.model import LM
from unweave.methods.explain.examples import Examples
from unweave.methods.explain.forms import DETECTION, EXPLAIN, RELEVANCE, Claim
from unweave.methods.explain.result import ScoreSummary
from unweave.methods.explain.rubric.result import Interval, Scores
from unweave.methods.explain.rubric.rubric import (
    CONTEXTS,
    FORM,
    difference,
    interval,
    item_of,
    shuffled_items,
    summarise,
)  # fmt: skip
from unweave.methods.explain.rubric.rubric import eligible as clear
from unweave.methods.explain.rubric.rubric import rate as rate_clearness
from unweave.methods.explain.scores import Labels, Scored, above, score, strangers
from unweave.sae.module import SAE
from unweave.sae.output_score import output_scores
from unweave.sae.steered import lens_tokens

Values = Mapping[int, float | None]
"""{latent: score}"""


def explain(judge: Judge, examples: Sequence[Examples]) -> Ratings[Examples]:
    """What the judge says of each latent, in ``words``; errors as in ``judge.ask``."""
    return rate(judge, EXPLAIN, examples)


def check_reading(judge: Judge) -> Check:
    """Whether the judge tells texts that mention a concept from near misses and others, as detection asks."""
    return check(judge, DETECTION, [(Claim(one.concept, one.text), one.right, one.kind) for one in known_texts()])


def relevances(judge: Judge | None, query: str, labels: Labels, embedder: str, device: str | None) -> dict[int, float]:
    """How much each explanation is about the query: cosines of embeddings, or a judge's ratings over 100 where one is
    given (NaN for failures)."""
    if not labels:
        return {}
    if judge is not None:
        ratings = rate(judge, RELEVANCE, [Claim(label, query) for label in labels.values()])
        return dict(zip(labels, (ratings.best / 100).tolist(), strict=True))
    from unweave.lm.embed import embed

    vectors = embed([query, *labels.values()], embedder, device)
    return dict(zip(labels, (vectors[1:] @ vectors[0]).tolist(), strict=True))


# -- scores and their controls ----------------------------------------------------------------------------------------


@dataclass
class Explained:
    """Explanations with their scores, by score and latent, and every answer as columns."""

    labels: Labels
    failures: dict[int, str]
    """of latents that were not explained"""
    own: dict[str, Values] = field(default_factory=dict)
    shuffled: dict[str, Values] = field(default_factory=dict)
    summaries: list[ScoreSummary] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    """a row each, with the form, the judge, the prompt, the reply and what was read in it"""

    def add(self, which: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Keeps answers; ``which``: explained, own or shuffled."""
        rows = zip(*columns.values(), strict=True)
        self.answers += [{"labels": which} | dict(zip(columns, row, strict=True)) for row in rows]


def explain_and_score(
    judge: Judge, records: Records, examples: Sequence[Examples], scores: Sequence[str], *,
    given: Labels | None = None, random: Collection[int] = (), seed: int = 0,
) -> Explained:  # fmt: skip
    """Explains latents, unless labels are ``given``, and scores what is said with its controls.

    ``random`` are the latents that were drawn as a control. Raises UnweaveError when there is no explanation at all,
    and errors as in ``judge.ask``.
    """
    if given is None:
        said = explain(judge, examples)
        labels = {row.case.latent: row.words for row in said.rows if row.answer}
        explained = Explained(labels, {row.case.latent: row.failure for row in said.rows if row.failure})
        explained.add("explained", {"latent": [row.case.latent for row in said.rows]} | said.columns())
    else:
        explained = Explained({one.latent: given[one.latent] for one in examples if one.latent in given}, {})
    if not explained.labels:
        why = next(iter(explained.failures.values()), "the file has none of them")
        what = f"none of {len(examples)} latents has an explanation: {why}"
        raise UnweaveError(what, where=judge.name, remedy="use another judge, or explanations of these latents")
    for name in scores:
        if name == "rubric":
            latents = [one.latent for one in examples]
            summary, explained.own[name] = _score_clearness(judge, records, latents, random, explained, seed)
        else:
            own = score(judge, name, examples, explained.labels, seed)
            other = score(judge, name, examples, strangers(explained.labels, seed), seed)
            explained.own[name], explained.shuffled[name] = own.values, other.values
            explained.add("own", own.columns)
            explained.add("shuffled", other.columns)
            summary = _summary(name, own, other, random, seed)
        explained.summaries.append(summary)
    return explained


def _summary(name: str, own: Scored, other: Scored, random: Collection[int], seed: int) -> ScoreSummary:
    """Means with intervals; latents that were drawn as a control stand apart from the others."""
    chosen, others = ({j: v for j, v in one.values.items() if j not in random} for one in (own, other))
    drawn = [value for j, value in own.values.items() if j in random]
    failures = dict((Counter(own.failures) + Counter(other.failures)).most_common())
    return ScoreSummary(
        name, _mean(chosen.values(), seed), _mean(others.values(), seed), above(chosen, others, seed),
        _mean(drawn, seed), len(own.columns["latent"]) + len(other.columns["latent"]), sum(failures.values()), failures,
    )  # fmt: skip


def _score_clearness(
    judge: Judge, records: Records, latents: Sequence[int], random: Collection[int], explained: Explained, seed: int
) -> tuple[ScoreSummary, Values]:
    """The rubric of each latent, beside contexts of five different ones of them (as many, where there are five)."""
    enough = set(clear(records).tolist())
    rated = [j for j in latents if j in enough]
    items = [item_of(records, "real", [j] * CONTEXTS) for j in rated]
    controls = shuffled_items(records, len(items), seed) if len(rated) >= CONTEXTS else []
    ratings = rate_clearness(judge, items + controls)
    real, shuffled = ratings[: len(items)], ratings[len(items) :]
    chosen = [one for one in real if one.item.latent not in random]
    parts: list[Scores] = [summarise(some, seed) for some in (chosen, shuffled, [r for r in real if r not in chosen])]
    failures = dict(sum((Counter(part.failures) for part in parts), Counter()).most_common())
    values = {one.item.latents[0]: None if one.score is None else float(one.score) for one in real}
    explained.add(
        "own",
        {
            "latent": [one.item.latent for one in ratings],
            "form": [FORM.id] * len(ratings),
            "judge": [judge.name] * len(ratings),
            "prompt": [json.dumps(one.prompt, ensure_ascii=False) for one in ratings],
            "reply": [one.reply.text for one in ratings],
            "values": [[] if one.score is None else [one.score] for one in ratings],
            "words": [one.name for one in ratings],
            "failure": [one.failure for one in ratings],
            "prompt_tokens": [one.reply.prompt_tokens for one in ratings],
            "new_tokens": [one.reply.new_tokens for one in ratings],
        },
    )
    return ScoreSummary(
        "rubric", parts[0].mean, parts[1].mean, difference(chosen, shuffled, seed), parts[2].mean,
        len(ratings), sum(failures.values()), failures,
    ), values  # fmt: skip


def _mean(values: Iterable[float | None], seed: int) -> Interval | None:
    return interval(np.array([value for value in values if value is not None], dtype=np.float64), seed)


# -- what latents read and say ----------------------------------------------------------------------------------------


def input_scores(lm: LM, sae: SAE, examples: Sequence[Examples]) -> list[float]:
    """The share of each latent's firing contexts whose strongest token is among the 20 that its direction promotes most
    (Arad et al. 2025, on our contexts)."""
    lens = lens_tokens(lm, sae, [one.latent for one in examples]).tolist()
    shares = []
    for one, promoted in zip(examples, lens, strict=True):
        contexts = (*one.shown, *one.active)
        strongest = [context.ids[int(np.argmax(context.values))] for context in contexts]
        shares.append(sum(token in promoted for token in strongest) / len(contexts))
    return shares


def outputs(lm: LM, sae: SAE, examples: Sequence[Examples]) -> list[float]:
    """The output score of each latent; see ``sae/output_score.py``."""
    return [one.score for one in output_scores(lm, sae, [one.latent for one in examples])]
