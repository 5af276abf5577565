"""Ratings without a chat model, by rules that anyone can follow; each 0, 1 or 2, and checked on known cases.

    concept       a word classifier trained on the tagged texts: 1 and 2 above the value that 5 and 1 of 100 held-out
                  texts without the concept exceed
    instruction   of two other instructions, after how many the unedited model finds the text less likely
    fluency       the lower of two: perplexity under the unedited model (2: as 95 of 100 held-out texts; 0: above half
                  of the same texts with their words shuffled), and distinct 3-grams (2: as 95 of 100 held-out texts; 0:
                  below half of that)

An empty text is 0 throughout.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from unweave.core.progress import task
from unweave.lm.chat import Role
from unweave.lm.model import LM, Tokens
from unweave.methods.axbench.directions import WRITE
from unweave.methods.axbench.forms import Case
from unweave.methods.axbench.result import RATINGS
from unweave.methods.axbench.scores import Array
from unweave.methods.axbench.texts import ConceptTexts
from unweave.sae.steered import distinct, prompt_tokens

NAME = "scripted truth"
_NOTE = (
    "No chat model: the concept's rating is a word classifier's, trained on the tagged texts; the others are the "
    "unedited model's likelihoods. See methods/axbench/truth.py."
)
_BATCH = 16


@dataclass(frozen=True)
class Likelihood:
    """Of one text after one prompt: mean log-probability of its tokens (nats), and its share of distinct 3-grams."""

    mean: float
    distinct: float


def likelihoods(lm: LM, prompts: Sequence[str], texts: Sequence[str], most: int) -> list[Likelihood]:
    """Of every text after its prompt, as the model's answer; ``most`` tokens of it. Mean is NaN for empty texts."""
    answers = [lm.tokenizer(text, add_special_tokens=False)["input_ids"][:most] for text in texts]
    frames = {prompt: prompt_tokens(lm, [prompt], None) for prompt in dict.fromkeys(prompts)}
    rows = [
        (
            [*frames[prompt].ids[0].tolist(), *ids],
            [*frames[prompt].roles[0].tolist(), *[int(Role.ASSISTANT)] * len(ids)],
        )
        for prompt, ids in zip(prompts, answers, strict=True)
    ]
    means = np.full(len(rows), np.nan)
    order = [i for i in np.argsort([len(ids) for ids, _ in rows], kind="stable").tolist() if answers[i]]
    with task("likelihoods", total=len(order), unit="texts") as shown:
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            width = max(len(answers[i]) for i in part)
            batch = Tokens.pad([rows[i] for i in part], lm.pad_id, "left").to(lm.device)
            logits = lm(batch, keep_logits=width + 1)
            assert logits is not None
            targets = batch.ids[:, -width:]
            logprobs = torch.log_softmax(logits[:, :-1].float(), -1).gather(2, targets.unsqueeze(2))[..., 0].double()
            for row, i in enumerate(part):
                means[i] = float(logprobs[row, width - len(answers[i]) :].mean())
            shown.advance(len(part))
    return [
        Likelihood(float(mean), distinct(torch.tensor(ids, dtype=torch.int64)))
        for mean, ids in zip(means, answers, strict=True)
    ]


def broken(text: str, seed: int, *, loop: bool) -> str:
    """The text with its words in random order, or its first few words over and over."""
    words = text.split()
    if loop:
        return " ".join((words[:4] * len(words))[: len(words)])
    return " ".join(random.Random(seed).sample(words, len(words)))


class TruthRater:
    """The ratings above. ``fluent`` are held-out texts that are taken for fluent."""

    name, note = NAME, _NOTE

    def __init__(
        self,
        lm: LM,
        concepts: Mapping[str, ConceptTexts],
        fluent: Sequence[str],
        instructions: Sequence[str],
        most: int,
    ) -> None:
        self._lm, self._instructions, self._most = lm, list(instructions), most
        self._concepts = {name: texts.words for name, texts in concepts.items()}
        self._levels = {name: np.array(texts.levels) for name, texts in concepts.items()}
        shuffled = [broken(text, i, loop=False) for i, text in enumerate(fluent)]
        whole = likelihoods(lm, [WRITE] * len(fluent), fluent, most)
        self._likely = (
            float(np.nanpercentile([one.mean for one in whole], 5)),
            float(np.nanmedian([one.mean for one in likelihoods(lm, [WRITE] * len(fluent), shuffled, most)])),
        )
        self._distinct = float(np.percentile([one.distinct for one in whole], 5))

    def rate(self, cases: Sequence[Case], ratings: Sequence[str] = RATINGS) -> tuple[Array, list[list[str]]]:
        """Ratings [cases, ratings], and nothing that was said."""
        by = {"concept": self._concept, "instruction": self._instruction, "fluency": self._fluency}
        empty = np.array([not case.text.strip() for case in cases])
        columns = [np.where(empty, 0.0, by[name](cases)) for name in ratings]
        return np.stack(columns, -1), [[] for _ in cases]

    def _concept(self, cases: Sequence[Case]) -> Array:
        rated = np.zeros(len(cases))
        for concept in dict.fromkeys(case.concept for case in cases):
            rows = [i for i, case in enumerate(cases) if case.concept == concept]
            values = self._concepts[concept]([cases[i].text for i in rows])
            rated[rows] = (values[:, None] > self._levels[concept]).sum(1)
        return rated

    def _instruction(self, cases: Sequence[Case]) -> Array:
        pool = self._instructions
        place = {instruction: i for i, instruction in enumerate(pool)}
        asked: list[tuple[str, str]] = []
        for case in cases:
            i = place[case.instruction]
            others = (pool[(i + 1) % len(pool)], pool[(i + len(pool) // 2) % len(pool)])
            asked += [(prompt, case.text) for prompt in (case.instruction, *others)]
        distinct_asked = list(dict.fromkeys(asked))
        means = dict(zip(distinct_asked, self._of(distinct_asked), strict=True))
        values = np.array([means[one].mean for one in asked]).reshape(-1, 3)
        return (values[:, :1] > values[:, 1:]).sum(1).astype(float)

    def _fluency(self, cases: Sequence[Case]) -> Array:
        asked = [(WRITE, case.text) for case in cases]
        distinct_asked = list(dict.fromkeys(asked))
        known = dict(zip(distinct_asked, self._of(distinct_asked), strict=True))
        mean = np.array([known[one].mean for one in asked])
        unlike = np.array([known[one].distinct for one in asked])
        fluent, shuffled = self._likely
        likely = (mean >= fluent).astype(float) + (mean > min(shuffled, fluent))
        varied = (unlike >= self._distinct).astype(float) + (unlike >= self._distinct / 2)
        return np.minimum(likely, varied)

    def _of(self, asked: Sequence[tuple[str, str]]) -> list[Likelihood]:
        return likelihoods(self._lm, [prompt for prompt, _ in asked], [text for _, text in asked], self._most)
