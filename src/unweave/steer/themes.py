"""What latents are about, from the text they fire on: the words that their contexts share and others' contexts lack.

The logit lens of a direction says little about latents of early layers, whose effect goes through many more blocks; the
contexts do. A latent's theme are the whole words of at least three letters that occur in its top and quantile contexts
from several documents, and in few of all latents' contexts; its clarity adds up, over these words, the number of
documents times the log of how rare the word is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from unweave.lm.model import LM
from unweave.sae.contexts import KINDS
from unweave.sae.records import Records

_SHORTEST = 3
_MIN_DOCUMENTS = 3
_COMMON = 0.01
"""a word in a larger share of all contexts than this is no theme of any"""
_WORDS = 10

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Theme:
    """One latent's theme: ``words`` by weight, ``token_ids`` of all tokens that are one of them, and its clarity."""

    latent: int
    words: tuple[str, ...]
    token_ids: tuple[int, ...]
    clarity: float


def themes(lm: LM, records: Records, *, min_count: int = 20, max_rate: float = 0.02) -> list[Theme]:
    """The themes of all latents that have one, clearest first.

    Only latents that fire on at least ``min_count`` tokens and at most on ``max_rate`` of them are looked at: rarer
    ones are badly known, commoner ones are about form rather than content.
    """
    contexts = records.contexts
    word_of, words = _words(lm, contexts.ids)
    window = np.repeat(np.arange(len(contexts)), np.diff(contexts.offsets))
    telling = contexts.kind != KINDS.index("random")  # random contexts show what a latent is not about
    following = np.append(contexts.ids[1:], -1)
    same_window = np.append(window[1:] == window[:-1], False)
    goes_on = same_window & (word_of[following] == _CONTINUES)
    at = (word_of[contexts.ids] >= 0) & telling[window] & ~goes_on
    if not at.any():
        return []
    word, latent = word_of[contexts.ids[at]], contexts.latent[window[at]].astype(np.int64)
    document = contexts.document[window[at]]
    n_contexts = int(telling.sum())
    in_contexts = np.bincount(_unique(window[at], word)[:, 1], minlength=len(words))
    own = _unique(latent, word, document)[:, :2]
    pairs, documents = np.unique(own, axis=0, return_counts=True)
    usual = (records.count >= min_count) & (records.count <= max_rate * records.n_tokens)
    rare = in_contexts <= max(_COMMON * n_contexts, 2 * n_contexts / max(len(records), 1))
    good = (documents >= _MIN_DOCUMENTS) & usual[pairs[:, 0]] & rare[pairs[:, 1]]
    pairs, documents = pairs[good], documents[good]
    weights = documents * np.log(n_contexts / in_contexts[pairs[:, 1]])
    found = [_theme(int(j), pairs, weights, words, word_of) for j in np.unique(pairs[:, 0])]
    return sorted(found, key=lambda theme: (-theme.clarity, theme.latent))


def _theme(latent: int, pairs: Array, weights: Array, words: list[str], word_of: Array) -> Theme:
    mine = np.flatnonzero(pairs[:, 0] == latent)
    mine = mine[np.argsort(-weights[mine], kind="stable")][:_WORDS]
    chosen = pairs[mine, 1]
    ids = np.flatnonzero(np.isin(word_of, chosen))
    return Theme(latent, tuple(words[i] for i in chosen), tuple(ids.tolist()), float(weights[mine].sum()))


_CONTINUES = -2


def _words(lm: LM, ids: Array) -> tuple[Array, list[str]]:
    """For every token id [V + 1] the number of the word it begins with (-1: none, -2: it goes on with one); the words.

    The last entry stands for "no token". Tokens that begin a word are marked by their tokenizer with a sign for the
    space before them; without a tokenizer there are no words.
    """
    present = np.unique(ids)
    word_of = np.full(max(lm.vocab_size, int(present.max(initial=0)) + 1) + 1, -1, dtype=np.int64)
    number: dict[str, int] = {}
    if lm.tokenizer is None:
        return word_of, []
    for i, raw in zip(present.tolist(), lm.tokenizer.convert_ids_to_tokens(present.tolist()), strict=True):
        begins = raw[:1] in ("Ġ", "▁", " ")
        text = raw[1:] if begins else raw
        if begins and len(text) >= _SHORTEST and text.isascii() and text.isalpha():
            word_of[i] = number.setdefault(text.lower(), len(number))
        elif not begins and text[:1].isalpha():
            word_of[i] = _CONTINUES
    return word_of, list(number)


def _unique(*columns: Array) -> Array:
    return np.unique(np.stack([np.asarray(column, dtype=np.int64) for column in columns], 1), axis=0)
