"""The 1-to-5 rubric of the FAST paper (arXiv 2506.07691, section 5): how clear is what a latent responds to?

1. Latents with five firing contexts, each from another document, are drawn at random; the others are left out.
2. A judge sees each latent's five contexts, tokens with their values, scores them 1 to 5, and names the pattern.
3. The same judge sees as many sets of five contexts of five different latents each. Where those score as high as the
   real ones, the scores say more about the judge than about the latents (trap 39).
4. An answer that is not exactly of the form asked for is a failure: never a score, always counted.

Departures from the paper: contexts are windows of the records' width instead of sentences. Values of 0 are not written
out, which says the same in half the length. The others are relative to the latent's largest (10), so that latents of
different size look alike and shuffled sets do not betray themselves by it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.core.intervals import RESAMPLES, interval, resampled
from unweave.judge.base import Conversation
from unweave.judge.form import Answer, Form, Rating
from unweave.latents.contexts import KINDS, Array
from unweave.latents.explaining import says
from unweave.latents.records import Context, Records
from unweave.methods.explain.forms import PROMPTS, turns
from unweave.methods.explain.rubric.result import SCALE, Difference, Scores

CONTEXTS = 5
_TOP = 10.0
_FEWEST = 5
"""Scores needed on each side before two groups are compared: a bootstrap of fewer knows nothing of their spread."""
_ANSWER = re.compile(r"score:\s*\[\[([^\[\]]*)\]\]\s*,\s*name:\s*\[\[([^\[\]]*)\]\]", re.IGNORECASE)

Kind = Literal["real", "shuffled"]


@dataclass(frozen=True)
class Item:
    """Five contexts to be scored together. ``latents[i]`` is the latent of ``contexts[i]``, and ``largest[i]`` its
    largest value: in a real item all the same latent, in a shuffled one all different."""

    kind: Kind
    latents: tuple[int, ...]
    contexts: tuple[Context, ...]
    largest: tuple[float, ...]

    @property
    def latent(self) -> int | None:
        """The latent of a real item."""
        return self.latents[0] if self.kind == "real" else None


def eligible(records: Records) -> Array:
    """Latents int64 [n] with five top contexts, in all of which they fire; in ascending order.

    Others never fired, or in fewer than five documents.
    """
    columns = records.contexts
    firing = (columns.kind == KINDS.index("top")) & (columns.value > 0)
    counts = np.bincount(columns.latent[firing], minlength=len(records))
    return np.flatnonzero(counts >= CONTEXTS)


def real_items(records: Records, n: int, seed: int = 0) -> list[Item]:
    """``n`` random eligible latents with their five strongest contexts; all of them where there are fewer.

    With the same seed, more latents are the same ones and more. Raises UnweaveError where no latent is eligible.
    """
    among = _eligible(records, 1)
    chosen = np.random.default_rng([seed, 0]).permutation(among)[:n]
    return [item_of(records, "real", [int(j)] * CONTEXTS) for j in chosen]


def shuffled_items(records: Records, n: int, seed: int = 0, latents: Sequence[int] | None = None) -> list[Item]:
    """``n`` items of five different random eligible latents each (of ``latents``, which are eligible, where given): the
    strongest context of the first, the second strongest of the second, and so on, so that only the common pattern is
    missing.

    Raises UnweaveError where fewer than five latents are eligible.
    """
    if n == 0:
        return []
    among = _eligible(records, CONTEXTS) if latents is None else sorted(latents)
    generator = np.random.default_rng([seed, 1])
    drawn = [generator.choice(among, CONTEXTS, replace=False) for _ in range(n)]
    return [item_of(records, "shuffled", [int(j) for j in five]) for five in drawn]


def _eligible(records: Records, needed: int) -> Array:
    among = eligible(records)
    if len(among) < needed:
        raise UnweaveError(
            f"{len(among)} of {len(records):,} latents fire in {CONTEXTS} documents or more, at least {needed} needed",
            where="records",
            remedy="collect the records from more documents, with at least five top contexts",
        )
    return among


def item_of(records: Records, kind: Kind, latents: Sequence[int]) -> Item:
    """The i-th strongest context of the i-th of five latents, for each i."""
    shown = [records.latent(j) for j in latents]
    contexts = tuple(record.top[i] for i, record in enumerate(shown))
    return Item(kind, tuple(latents), contexts, tuple(record.maximum for record in shown))


# -- the question and its answer ----------------------------------------------------------------------------------


def question(item: Item) -> Conversation:
    """The conversation that asks for a score: the task, three short examples answered as it should be, the item. The
    examples bring small judges to the form asked for, and show a high, a low and a middling score."""
    task, *rest = turns("rubric", _texts(item))
    scale = "\n".join(f"{score}: {meaning}" for score, meaning in SCALE.items())
    return [{"role": "user", "content": task["content"].replace("SCALE", scale)}, *rest]


def _texts(item: Item) -> str:
    pairs = zip(item.contexts, item.largest, strict=True)
    return "\n".join(f"Text {i}: {_shown(context, largest)}" for i, (context, largest) in enumerate(pairs, 1))


def _shown(context: Context, largest: float) -> str:
    """Tokens, each with its value behind it unless that is 0; 10 is the latent's largest. Line breaks as in code."""
    words = []
    for text, value, counted, _ in context.shown():
        number = f"{_TOP * value / largest:.1f}".removesuffix(".0") if counted else "?"
        plain = text.replace("\r", "\\r").replace("\n", "\\n")
        words.append(plain if counted and value == 0 else f"{plain}{{{number}}}")
    return "".join(words)


def parse(text: str, item: Item | None = None) -> Answer:
    """The score and the name in a reply. Raises ValueError with a short reason when it is not exactly as asked for.

    There must be one ``score: [[n]], name: [[words]]`` with a whole number from 1 to 5 and a name of letters or
    digits. Anything around it is the judge's description.
    """
    answers = list(_ANSWER.finditer(text))
    if not answers:
        raise ValueError("no answer of the form asked for")
    if len(answers) > 1:
        raise ValueError("more than one answer")
    score, name = (part.strip() for part in answers[0].groups())
    if score not in ("1", "2", "3", "4", "5"):
        raise ValueError("the score is no whole number from 1 to 5")
    if not says(name):
        raise ValueError("no name")
    return Answer((int(score),), (text.index(score, answers[0].start(1)),), name)


FORM: Form[Item] = Form("rubric", PROMPTS["rubric"]["version"], question, parse, tuple(sorted(SCALE)))
"""The question as a form; the whole reply is read, since two answers in it are none."""


# -- the numbers --------------------------------------------------------------------------------------------------


def summarise(ratings: Sequence[Rating[Item]], seed: int = 0) -> Scores:
    """Distribution, mean and shares with bootstrap intervals over the items that were scored."""
    scores = _scores(ratings)
    failures = Counter(rating.failure for rating in ratings if rating.failure)
    distribution = tuple(int((scores == score).sum()) for score in sorted(SCALE))
    return Scores(
        len(ratings), len(scores), len(ratings) - len(scores), dict(failures.most_common()), distribution,
        *(interval(some, seed=seed) for some in (scores, scores >= 4, scores <= 2)),
    )  # fmt: skip


def difference(real: Sequence[Rating[Item]], shuffled: Sequence[Rating[Item]], seed: int = 0) -> Difference | None:
    """How much higher the mean score of real items is than that of shuffled ones; None where one has no score.

    The interval is a bootstrap's over items. It has no width where either side always scores the same, however few
    they are, so what decides is ``p``: how often 10,000 random relabellings of all these scores as real and shuffled
    give means at least as far apart.
    """
    a, b = _scores(real), _scores(shuffled)
    if not len(a) or not len(b):
        return None
    value = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return Difference(value, None, None, None)
    low, high = np.percentile(resampled(a, seed=[seed, 0]) - resampled(b, seed=[seed, 1]), [2.5, 97.5])
    p = _relabelled(a, b, [seed, 2]) if min(len(a), len(b)) >= _FEWEST else None
    return Difference(value, float(low), float(high), p)


def _relabelled(a: Array, b: Array, seed: list[int]) -> float:
    """Share of relabellings of a [n] and b [m] whose means are as far apart, the real one among them."""
    values, counts = np.unique(np.concatenate([a, b]), return_counts=True)
    # Drawing n of the pooled scores is drawing how many of each value they are.
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(counts, len(a), RESAMPLES)
    sums, total = np.append(drawn @ values, a.sum()), int(values @ counts)
    apart = np.abs(sums * len(b) - (total - sums) * len(a))  # of the means, times both sizes: whole numbers
    return float((apart >= apart[-1]).mean())


def _scores(ratings: Sequence[Rating[Item]]) -> Array:
    return np.array([rating.answer.values[0] for rating in ratings if rating.answer], dtype=np.int64)
