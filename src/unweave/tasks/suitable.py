"""Which examples suit a tokenizer: those without a problem are kept, the others counted by what is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from unweave.core.errors import UnweaveError
from unweave.lm.model import LM

_T = TypeVar("_T")


def tokenizer_of(lm: LM | Any) -> Any:
    """An LM's tokenizer, or the one given. UnweaveError where the LM has none."""
    tokenizer = lm.tokenizer if isinstance(lm, LM) else lm
    if tokenizer is None:
        raise UnweaveError("this LM has no tokenizer", remedy="make it with LM(model, tokenizer)")
    return tokenizer


def suitable(
    lm: LM | Any, candidates: Iterable[_T], problem_of: Callable[[Any, _T], str | None]
) -> tuple[list[_T], dict[str, int]]:
    """The candidates without a problem, and how many were left out for which reason."""
    tokenizer = tokenizer_of(lm)
    usable: list[_T] = []
    problems: Counter[str] = Counter()
    for candidate in candidates:
        problem = problem_of(tokenizer, candidate)
        if problem is None:
            usable.append(candidate)
        else:
            problems[problem] += 1
    return usable, dict(problems)
