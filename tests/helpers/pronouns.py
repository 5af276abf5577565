"""What a sentence asks for before its blank, said by hand, and sentences with one word open."""

from __future__ import annotations

from collections.abc import Iterable

# What stands before a blank: a verb or a preposition asks for an object, anything else for a subject. Written by hand.
CONJUNCTIONS = {
    *("because", "that", "when", "before", "so that", "although", "then", "unless", "whether", "until", "while"),
    *("after", "as", ",", "in the end", "long before", "years before", "not long after", "shortly after"),
}


def is_subject(before: str) -> bool:
    words = before.split()
    ends = {words[-1], words[-1][-1], " ".join(words[-2:]), " ".join(words[-3:])}
    return bool(ends & CONJUNCTIONS) and " ".join(words[-2:]) not in ("looked after", "ran after", "runs after")


def one_word_open(texts: Iterable[str]) -> set[str]:
    """Every text with each of its words left out in turn."""
    rows = [text.casefold().split() for text in texts]
    return {" ".join([*words[:i], "*", *words[i + 1 :]]) for words in rows for i in range(len(words))}
