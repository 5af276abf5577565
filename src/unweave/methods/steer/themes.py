"""What latents are about, from the text they fire on: the words that their contexts share and others' contexts lack.

The logit lens of a direction says little about latents of early layers, whose effect goes through many more blocks; the
contexts do. A latent's theme are the words of at least three letters, each the only one in its token and whole there,
that occur in its top and quantile contexts from several documents, and in few of all latents' contexts; its clarity
adds up, over these words, the number of documents times the log of how rare the word is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from unweave.latents.contexts import KINDS
from unweave.latents.records import Records
from unweave.lm.model import LM
from unweave.lm.shown import is_letter, own_texts

_SHORTEST = 3
_MIN_DOCUMENTS = 3
_COMMON = 0.01
"""a word in a larger share of all contexts than this counts as no latent's theme"""
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
    spelled = _spelled(lm, contexts.ids)
    word_of, words = spelled.word_of, spelled.words
    window = np.repeat(np.arange(len(contexts)), np.diff(contexts.offsets))
    telling = contexts.kind != KINDS.index("random")  # random contexts show what a latent is not about
    at = (word_of[contexts.ids] >= 0) & telling[window] & _whole(spelled, contexts.ids, window)
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
    all_themes = [_theme(int(j), pairs, weights, words, word_of) for j in np.unique(pairs[:, 0])]
    return sorted(all_themes, key=lambda theme: (-theme.clarity, theme.latent))


def _theme(latent: int, pairs: Array, weights: Array, words: list[str], word_of: Array) -> Theme:
    mine = np.flatnonzero(pairs[:, 0] == latent)
    mine = mine[np.argsort(-weights[mine], kind="stable")][:_WORDS]
    chosen = pairs[mine, 1]
    ids = np.flatnonzero(np.isin(word_of, chosen))
    return Theme(latent, tuple(words[i] for i in chosen), tuple(ids.tolist()), float(weights[mine].sum()))


@dataclass(frozen=True)
class _Spelled:
    """Of every token id [V]: the number of the one word that it holds (-1: none), and whether letters or digits begin
    and end it. ``words`` by number, in lower case."""

    word_of: Array
    begins: Array
    ends: Array
    words: list[str]


def _spelled(lm: LM, ids: Array) -> _Spelled:
    """What the tokens of some text spell; without a tokenizer there are no words."""
    present = np.unique(ids).tolist()
    size = max(lm.vocab_size, max(present, default=-1) + 1)
    word_of, begins, ends = np.full(size, -1, dtype=np.int64), np.zeros(size, bool), np.zeros(size, bool)
    number: dict[str, int] = {}
    for i, text in zip(present, [] if lm.tokenizer is None else own_texts(lm.tokenizer, present), strict=False):
        if not text:
            continue
        begins[i], ends[i] = _in_word(text[0]), _in_word(text[-1])
        word = text
        while word and not _in_word(word[0]):
            word = word[1:]
        while word and not _in_word(word[-1]):
            word = word[:-1]
        if len(word) >= _SHORTEST and all(map(is_letter, word)):
            word_of[i] = number.setdefault(word.lower(), len(number))
    return _Spelled(word_of, begins, ends, list(number))


def _whole(spelled: _Spelled, ids: Array, window: Array) -> Array:
    """True where no word goes on from the token before or into the token behind, bool [W]. At a window's beginning a
    token that begins with a letter may be the end of a word that was cut."""
    joins = spelled.ends[ids[:-1]] & spelled.begins[ids[1:]] & (window[1:] == window[:-1])
    opens = np.append(True, window[1:] != window[:-1]) & spelled.begins[ids]
    return ~(opens | np.append(False, joins) | np.append(joins, False))


def _in_word(character: str) -> bool:
    """A letter, a digit, or a loose byte, which is part of a letter that other tokens share."""
    return is_letter(character) or character.isalnum() or "\udc80" <= character <= "\udcff"


def _unique(*columns: Array) -> Array:
    return np.unique(np.stack([np.asarray(column, dtype=np.int64) for column in columns], 1), axis=0)
