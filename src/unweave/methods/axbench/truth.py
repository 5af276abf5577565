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

import numpy as np
import torch

from unweave.lm.likelihood import mean_log_probs
from unweave.lm.model import LM
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


def likelihoods(lm: LM, prompts: Sequence[str], texts: Sequence[str], most: int) -> Array:
    """The mean log-probability, in nats, of each text's first ``most`` tokens as the answer to its prompt [N]; NaN for
    empty texts. Equal cases are computed once, and so is each prompt."""
    means: dict[str, dict[str, float]] = {prompt: {} for prompt in prompts}
    for prompt, text in zip(prompts, texts, strict=True):
        means[prompt][text] = np.nan
    for prompt, own in means.items():
        frame = prompt_tokens(lm, [prompt], None).ids[0].tolist()
        own.update(zip(own, mean_log_probs(lm, frame, [_ids(lm, text, most) for text in own]), strict=True))
    return np.array([means[prompt][text] for prompt, text in zip(prompts, texts, strict=True)])


def _ids(lm: LM, text: str, most: int) -> list[int]:
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"][:most]


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
        self._lm, self._concepts, self._instructions, self._most = lm, concepts, list(instructions), most
        words = [text.split() for text in fluent]
        shuffled = [" ".join(random.Random(i).sample(several, len(several))) for i, several in enumerate(words)]
        self._likely = float(np.nanpercentile(self._likelihoods(WRITE, fluent), 5))
        self._shuffled = min(float(np.nanmedian(self._likelihoods(WRITE, shuffled))), self._likely)
        self._distinct = float(np.percentile(self._varied(fluent), 5))

    def rate(self, cases: Sequence[Case], ratings: Sequence[str] = RATINGS) -> tuple[Array, list[list[str]]]:
        """Ratings [cases, ratings], and nothing that was said."""
        by = {"concept": self._concept, "instruction": self._instruction, "fluency": self._fluency}
        empty = np.array([not case.text.strip() for case in cases])
        return np.stack([np.where(empty, 0.0, by[name](cases)) for name in ratings], -1), [[] for _ in cases]

    def _concept(self, cases: Sequence[Case]) -> Array:
        rated = np.zeros(len(cases))
        for name in dict.fromkeys(case.concept for case in cases):
            rows = [i for i, case in enumerate(cases) if case.concept == name]
            values = self._concepts[name].words([cases[i].text for i in rows])
            rated[rows] = (values[:, None] > np.array(self._concepts[name].levels)).sum(1)
        return rated

    def _instruction(self, cases: Sequence[Case]) -> Array:
        pool = self._instructions
        place = {instruction: i for i, instruction in enumerate(pool)}
        own = np.array([place[case.instruction] for case in cases], dtype=int)
        prompts = [pool[i % len(pool)] for step in (0, 1, len(pool) // 2) for i in own + step]
        values = likelihoods(self._lm, prompts, [case.text for case in cases] * 3, self._most).reshape(3, -1)
        return (values[0] > values[1:]).sum(0).astype(float)

    def _fluency(self, cases: Sequence[Case]) -> Array:
        texts = [case.text for case in cases]
        mean, varied = self._likelihoods(WRITE, texts), self._varied(texts)
        likely = (mean >= self._likely).astype(float) + (mean > self._shuffled)
        return np.minimum(likely, (varied >= self._distinct).astype(float) + (varied >= self._distinct / 2))

    def _likelihoods(self, prompt: str, texts: Sequence[str]) -> Array:
        return likelihoods(self._lm, [prompt] * len(texts), texts, self._most)

    def _varied(self, texts: Sequence[str]) -> Array:
        return np.array([distinct(torch.tensor(_ids(self._lm, text, self._most))) for text in texts])
