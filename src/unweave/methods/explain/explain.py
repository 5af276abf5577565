"""Explanations of latents, and everything that is said of how far they hold.

1. The judge explains each latent from the contexts shown to it, unless explanations are given.
2. Each explanation is scored on contexts of other documents, and so is another latent's on the same contexts.
3. Where a query is given, explanations are compared with it.
4. Beside them stand an input score (is what the latent fires on what it promotes?) and an output score (does raising it
   bring that about?), which tell latents of what the model reads from those of what it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.core.intervals import interval
from unweave.judge.base import Judge
from unweave.judge.check import Check, check, known_texts
from unweave.judge.form import Ratings, rate
from unweave.latents import relevance
from unweave.latents.explaining import EXPLAIN, strangers
from unweave.latents.records import Records
from unweave.lm.model import LM
from unweave.methods.explain.examples import Examples
from unweave.methods.explain.forms import DETECTION, Claim
from unweave.methods.explain.result import ScoreSummary
from unweave.methods.explain.rubric import rubric
from unweave.methods.explain.scores import Labels, Scored, above, score
from unweave.sae.module import SAE
from unweave.sae.steered import lens_tokens

Values = Mapping[int, float | None]
"""{latent: score}"""


def explain(judge: Judge, examples: Sequence[Examples]) -> Ratings[Examples]:
    """What the judge says of each latent, in ``words``; errors as in ``judge.ask``."""
    return rate(judge, EXPLAIN, examples)


def known_cases() -> list[tuple[Claim, bool, str]]:
    """Texts that mention a concept, near misses and others, as ``judge.check`` takes them."""
    return [(Claim(one.concept, one.text), one.right, one.kind) for one in known_texts()]


def check_reading(judge: Judge) -> Check:
    """Whether the judge tells texts that mention a concept from near misses and others, as detection asks."""
    return check(judge, DETECTION, known_cases())


# -- scores and their controls ----------------------------------------------------------------------------------------


@dataclass
class Explained:
    """Explanations with their scores, by score and latent, and every answer."""

    labels: Labels
    failures: dict[int, str]
    """of latents that were not explained"""
    own: dict[str, Values] = field(default_factory=dict)
    shuffled: dict[str, Values] = field(default_factory=dict)
    summaries: list[ScoreSummary] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    """a row each, with the form, the judge, the prompt, the reply and what was read in it"""

    def add(
        self,
        which: str,
        latents: Sequence[int | None],
        ratings: Ratings[Any],
        more: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Keeps answers about ``latents`` with ``more`` columns; ``which``: explained, own, shuffled or query."""
        all_columns = {"latent": latents, **(more or {}), **ratings.columns()}
        rows = (dict(zip(all_columns, row, strict=True)) for row in zip(*all_columns.values(), strict=True))
        self.answers += [{"labels": which, "truth": None, "correlation": None} | row for row in rows]


def explain_and_score(
    judge: Judge, records: Records, examples: Sequence[Examples], scores: Sequence[str], *,
    given: Labels | None = None, random: Collection[int] = (), seed: int = 0,
) -> Explained:  # fmt: skip
    """Explains latents, unless labels are ``given``, and scores what is said with its controls.

    ``random`` are the latents that were drawn as a control. Raises UnweaveError when there is no explanation at all,
    and errors as in ``judge.ask``.
    """
    latents = [one.latent for one in examples]
    if given is None:
        ratings = explain(judge, examples)
        labels = {row.case.latent: row.words for row in ratings.rows if row.answer}
        explained = Explained(labels, {row.case.latent: row.failure for row in ratings.rows if row.failure})
        explained.add("explained", latents, ratings)
    else:
        labels = {j: given[j] for j in latents if j in given}
        explained = Explained(labels, {j: "none was given" for j in latents if j not in given})
    if not labels:
        what = f"none of {len(examples)} latents has an explanation: {next(iter(explained.failures.values()))}"
        written = next((row["reply"] for row in explained.answers if row["reply"]), "")
        what += f"; the first reply is {written[:80]!r}" if written else ""
        raise UnweaveError(what, where=judge.name, remedy="use another judge, or explanations of these latents")
    for name in scores:
        if name == "rubric":
            explained.summaries.append(_clearness(judge, records, latents, random, explained, seed))
            continue
        own = score(judge, name, examples, labels, seed)
        other = score(judge, name, examples, strangers(labels, seed), seed)
        explained.own[name], explained.shuffled[name] = own.values, other.values
        for which, one in (("own", own), ("shuffled", other)):
            explained.add(which, one.latents, one.ratings, one.columns)
        explained.summaries.append(_summary(name, own, other, random, seed))
    return explained


def _summary(name: str, own: Scored, other: Scored, random: Collection[int], seed: int) -> ScoreSummary:
    """Means with intervals; latents that were drawn as a control stand apart from the others."""
    chosen, control = ({j: v for j, v in one.values.items() if j not in random} for one in (own, other))
    drawn = {j: v for j, v in own.values.items() if j in random}
    failures = Counter(own.ratings.failures) + Counter(other.ratings.failures)
    means = [interval([*some.values()], seed=seed) for some in (chosen, control, drawn)]
    return ScoreSummary(
        name, means[0], means[1], above(chosen, control, seed), means[2],
        len(own.latents) + len(other.latents), failures.total(), dict(failures.most_common()),
    )  # fmt: skip


def _clearness(
    judge: Judge, records: Records, latents: Sequence[int], random: Collection[int], explained: Explained, seed: int
) -> ScoreSummary:
    """The rubric of each latent, beside contexts of five different ones of them (as many, where there are five)."""
    enough = {*rubric.eligible(records).tolist()}
    rated = [j for j in latents if j in enough]
    items, n = [rubric.item_of(records, "real", [j] * rubric.CONTEXTS) for j in rated], len(rated)
    items += rubric.shuffled_items(records, n, seed, rated) if n >= rubric.CONTEXTS else []
    ratings = rate(judge, rubric.FORM, items)
    explained.add("own", [one.latent for one in items], ratings)
    real, shuffled = ratings.rows[:n], ratings.rows[n:]
    explained.own["rubric"] = {one.case.latents[0]: one.value if one.answer else None for one in real}
    chosen, drawn = ([one for one in real if (one.case.latent in random) == is_drawn] for is_drawn in (False, True))
    means = [rubric.summarise(some, seed).mean for some in (chosen, shuffled, drawn)]
    failures, gap = ratings.failures, rubric.difference(chosen, shuffled, seed)
    return ScoreSummary("rubric", means[0], means[1], gap, means[2], len(items), sum(failures.values()), failures)


# -- relevance to a query ---------------------------------------------------------------------------------------------


def rate_relevance(judge: Judge, query: str, explained: Explained) -> dict[int, float]:
    """How much each explanation is about the query: the judge's rating over 100; failures are left out."""
    values, ratings = relevance.rate_relevance(judge, query, explained.labels)
    explained.add("query", list(explained.labels), ratings)
    return values


# -- what latents read ------------------------------------------------------------------------------------------------


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
