"""How well explanations hold on contexts that the explainer has not seen, beside those of other latents.

1. Detection: the judge is given the explanation and a text; does something in it fit? The score is the AUROC of its
   answers (expected ratings where it gives log-probabilities) between texts in which the latent fires and others.
2. Fuzzing: the text has tokens marked, those on which the latent fires, or as many others; do the marked ones fit?
3. Simulation: expected activations against true ones; see ``simulate.py``.
4. The control is the same with the explanation of another latent, each latent's being used for exactly one other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unweave.core.intervals import RESAMPLES, interval
from unweave.judge.base import Judge
from unweave.judge.check import auroc
from unweave.judge.form import Form, Ratings, rate
from unweave.latents.explaining import fires, marked, tokens_of
from unweave.methods.explain.examples import THRESHOLD, Examples, elsewhere
from unweave.methods.explain.forms import DETECTION, FUZZING, Claim
from unweave.methods.explain.rubric.result import Difference
from unweave.methods.explain.simulate import Simulated, activations, correlation, simulate

Labels = Mapping[int, str]
"""{latent: explanation}"""
CLAIMS: Mapping[str, Form[Claim]] = {"detection": DETECTION, "fuzzing": FUZZING}


@dataclass(frozen=True)
class Scored:
    """A score of every latent under some labels, with the answers that it is made of: of which latent each is, and
    columns beside those of ``ratings``."""

    values: dict[int, float | None]
    latents: list[int]
    ratings: Ratings[Any]
    columns: dict[str, list[float | None]]


def score(judge: Judge, name: str, examples: Sequence[Examples], labels: Labels, seed: int = 0) -> Scored:
    """The score ``name`` of every latent that has a label; errors as in ``judge.ask``."""
    labelled = [one for one in examples if one.latent in labels]
    if name == "simulation":
        return _simulation(judge, labelled, labels)
    cases = [(one.latent, *case) for one in labelled for case in claims(name, one, labels[one.latent], seed)]
    ratings = rate(judge, CLAIMS[name], [claim for _, claim, _ in cases])
    latents, truth = [j for j, *_ in cases], [true for *_, true in cases]
    at, right, best = np.array(latents, dtype=np.int64), np.array(truth, dtype=bool), ratings.best
    values = {
        one.latent: auroc(best[(at == one.latent) & right], best[(at == one.latent) & ~right]) for one in labelled
    }
    return Scored(values, latents, ratings, {"truth": list(map(float, truth))})


def claims(name: str, examples: Examples, label: str, seed: int = 0) -> Iterator[tuple[Claim, bool]]:
    """The tests of a latent under a label, each with the right answer."""
    if name == "detection":
        yield from ((Claim(label, "".join(tokens_of(one))), true) for one, true in examples.tests)
        return
    rng = np.random.default_rng([seed, 3, examples.latent])
    for one in examples.active:
        on = fires(one, THRESHOLD)
        off = elsewhere(one, on, rng)
        if off is not None:
            yield Claim(label, marked(one, on)), True
            yield Claim(label, marked(one, off)), False


def simulations(examples: Examples, label: str) -> Iterator[tuple[Simulated, np.ndarray[Any, Any]]]:
    """A latent's test contexts under a label, each with the true activations, from 0 to 9 of the largest shown."""
    contexts = [one.shown() for one, _ in examples.tests]
    largest = max(token.value for context in contexts for token in context if token.counted)
    for (one, _), shown in zip(examples.tests, contexts, strict=True):
        true = np.array([int(9 * token.value / largest) if token.counted else 0 for token in shown], dtype=np.float64)
        yield Simulated(label, tuple(tokens_of(one))), true


def _simulation(judge: Judge, examples: Sequence[Examples], labels: Labels) -> Scored:
    cases = [(one.latent, *case) for one in examples for case in simulations(one, labels[one.latent])]
    ratings = simulate(judge, [case for _, case, _ in cases])
    expected = [activations(row) for row in ratings.rows]
    usable: dict[int, list[tuple[Any, Any]]] = {one.latent: [] for one in examples}
    for (j, _, true), e in zip(cases, expected, strict=True):
        usable[j] += [(e, true)] if e is not None else []
    values = {
        j: correlation(*map(np.concatenate, zip(*some, strict=True))) if some else None for j, some in usable.items()
    }
    each = [None if e is None else correlation(e, true) for (*_, true), e in zip(cases, expected, strict=True)]
    return Scored(values, [j for j, *_ in cases], ratings, {"correlation": each})


def above(own: Mapping[int, float | None], other: Mapping[int, float | None], seed: int = 0) -> Difference | None:
    """How far latents' own scores are above those under other labels, in pairs: the mean difference with a bootstrap
    interval over latents, and a p value by changing signs (two-sided; None below five pairs)."""
    pairs = [(own[j], other.get(j)) for j in own]
    d = np.array([a - b for a, b in pairs if a is not None and b is not None])
    mean = interval(d, seed=seed)
    if mean is None:
        return None
    if len(d) < 5:
        return Difference(mean.value, mean.low, mean.high, None)
    signs = np.random.default_rng([seed, 4]).choice([-1.0, 1.0], (RESAMPLES, len(d)))
    apart = np.abs(np.append(signs @ d, d.sum()))
    return Difference(mean.value, mean.low, mean.high, float((apart >= apart[-1] - 1e-12).mean()))
