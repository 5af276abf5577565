"""Texts with a concept and without it, from tagged texts: to learn on, and held out.

Hard negatives are held-out texts without the concept's tag that its words suggest: of a random sample, those that a
word classifier ranks highest. AxBench's released code drops such rows from its AUROC; here they count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.methods.axbench.scores import Array
from unweave.tasks.tagged.texts import TaggedTexts

_FEATURES = 1 << 16
_FIT_MOST = 2000
_POOL = 10
"""candidates for each hard negative"""


@dataclass(frozen=True)
class ConceptTexts:
    """Texts of one concept; ``train_*`` are for learning, the others held out."""

    concept: str
    train_with: tuple[str, ...]
    train_without: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    hard: tuple[str, ...]
    words: WordClassifier
    levels: tuple[float, float]
    """what the classifier gives 5 and 1 of 100 held-out texts without the concept at least"""

    @property
    def heldout(self) -> list[str]:
        """Held-out texts: those with the concept, others, hard ones among these."""
        return [*self.positive, *self.negative, *self.hard]

    @property
    def train(self) -> tuple[list[str], list[bool]]:
        """Texts to learn on, and whether each has the concept."""
        texts = [*self.train_with, *self.train_without]
        return texts, [True] * len(self.train_with) + [False] * len(self.train_without)


class TooFewTexts(UnweaveError):
    """There are not enough texts with a concept, or without it."""


class WordClassifier:
    """Logistic regression on hashed words: which texts are about a concept, whatever model wrote them."""

    def __init__(self, with_concept: Sequence[str], without: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import LogisticRegression

        self._vectors = HashingVectorizer(n_features=_FEATURES, alternate_sign=False, stop_words="english")
        self._model = LogisticRegression(C=10.0, class_weight="balanced", solver="liblinear")
        labels = np.repeat([1, 0], [len(with_concept), len(without)])
        self._model.fit(self._vectors.transform([*with_concept, *without]), labels)

    def __call__(self, texts: Sequence[str]) -> Array:
        """Logits [N]; above 0 means the concept, with classes of equal weight."""
        return self._model.decision_function(self._vectors.transform(list(texts)))


@dataclass(frozen=True)
class Texts:
    """Draws texts of concepts: ``examples`` to learn on, ``heldout`` of each kind held out, cut to ``characters``."""

    tagged: TaggedTexts
    examples: int = 72
    heldout: int = 36
    characters: int = 600
    seed: int = 0

    @cached_property
    def _labels(self) -> tuple[Array, Array]:
        """(text, label) of every label of every text."""
        offsets, labels = self.tagged.label_rows(np.arange(len(self.tagged)))
        return np.repeat(np.arange(len(self.tagged)), np.diff(offsets)), labels

    def sample(self, n: int, *, heldout: bool = False) -> list[str]:
        """Up to n random texts to learn on, or held out, whatever their tags."""
        return self._read(self._drawn(np.flatnonzero(np.asarray(self.tagged.heldout) == heldout), n, "sample"))

    def of(self, concept: str) -> ConceptTexts:
        """Raises UnweaveError for a concept that is no tag, and TooFewTexts."""
        if concept not in self.tagged.names:
            raise UnweaveError(
                f"no text has the tag {concept!r}", where=self.tagged.source, remedy="give the texts that labelled it"
            )
        owner, label = self._labels
        has = np.zeros(len(self.tagged), dtype=bool)
        has[owner[label == self.tagged.names.index(concept)]] = True
        out = np.asarray(self.tagged.heldout)
        kinds = {"train_with": has & ~out, "train_without": ~has & ~out, "with": has & out, "without": ~has & out}
        rows = {
            "train_with": self._drawn(np.flatnonzero(kinds["train_with"]), _FIT_MOST, concept),
            "train_without": self._drawn(np.flatnonzero(kinds["train_without"]), 2 * _FIT_MOST, concept),
            "with": self._drawn(np.flatnonzero(kinds["with"]), self.heldout, concept),
            "without": self._drawn(np.flatnonzero(kinds["without"]), (1 + _POOL) * self.heldout, concept),
        }
        for kind, least in (("train_with", 2), ("train_without", 2), ("with", 2), ("without", 4)):
            if len(rows[kind]) < least:
                side, _, which = kind.rpartition("_")
                where = "to learn on" if side else "held out"
                raise TooFewTexts(
                    f"{len(rows[kind])} of its texts {where} are {which} it, fewer than {least}",
                    where=f"{concept!r} in {self.tagged.source}",
                    remedy="leave the concept out, or give more texts",
                )
        train_with, train_without = self._read(rows["train_with"]), self._read(rows["train_without"])
        words = WordClassifier(train_with, train_without)
        n = min(self.heldout, len(rows["without"]) // 2)
        negative, pool = self._read(rows["without"][:n]), self._read(rows["without"][n:])
        hardest = np.argsort(-words(pool), kind="stable")[:n]
        return ConceptTexts(
            concept,
            tuple(train_with[: self.examples]),
            tuple(train_without[: self.examples]),
            tuple(self._read(rows["with"])),
            tuple(negative),
            tuple(pool[i] for i in hardest),
            words,
            tuple(np.percentile(words([*negative, *pool]), [95, 99]).tolist()),
        )

    def of_all(self, concepts: Iterable[str]) -> tuple[dict[str, ConceptTexts], dict[str, str]]:
        """The texts of each concept, and why others have too few. Raises UnweaveError where none has enough."""
        texts: dict[str, ConceptTexts] = {}
        errors: dict[str, TooFewTexts] = {}
        for concept in concepts:
            try:
                texts[concept] = self.of(concept)
            except TooFewTexts as error:
                errors[concept] = error
        if not texts:
            raise next(iter(errors.values()))
        return texts, {concept: error.what for concept, error in errors.items()}

    def _drawn(self, rows: Array, n: int, salt: str) -> Array:
        seed = [self.seed, *salt.encode()]
        return np.random.default_rng(seed).permutation(rows)[:n]

    def _read(self, rows: Array) -> list[str]:
        return [self.tagged.text(int(i)).strip()[: self.characters] for i in rows]
