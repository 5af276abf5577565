"""Automated interpretability: does a chat model that says what a latent responds to find the texts in which it fires?

1. Latents that fire often enough are drawn at random, some for each seed.
2. Windows of 21 tokens: around the 12 strongest firings, and 7 others drawn with probabilities proportional to f^2. 10
   and 5 of them are shown, with what the latent fires on marked, and the judge says in a few words what they share.
3. The other 4 and 10 random windows are listed, shuffled and without marks; the judge names those that fit.
4. The score is the judge's accuracy over the 14, and beside it that under another latent's explanation.

Correct form: all windows are of different documents, the latent is silent in the random ones, and accuracy is the mean
of that over firing and silent windows (to name none has 0.5, not 10/14). Compatible form: SAEBench 0.6's; windows do
not overlap, and random ones count as silent whatever the latent does there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.data.stream import ActivationSource
from unweave.data.tokens import TokenStore
from unweave.inputs.inputs import data_of, token_store
from unweave.judge.base import REPLIES, CachedJudge, Judge, check_judge, open_judge
from unweave.judge.check import Check, compared, known_texts
from unweave.judge.form import rate
from unweave.latents.explaining import EXPLAIN, SELECT, Selection, fires, marked, strangers, tokens_of
from unweave.latents.latent_record import Context
from unweave.lm.chat import Role
from unweave.lm.shown import pieces as pieces_of
from unweave.methods.saebench.spec import SaebenchSpec
from unweave.methods.saebench.spread import Scored
from unweave.methods.saebench.task import About, Array, Bench, Task
from unweave.sae.module import SAE

_AROUND = 10
"""tokens of a window on either side"""
_TOP, _DRAWN, _RANDOM = (10, 2), (5, 2), 10
"""windows around the strongest and the drawn firings, to show and to test with; random ones"""
_FIRING = sum(_TOP) + sum(_DRAWN)
_FEWEST = 15
"""firings that a latent must have more of"""
_MARKED = 0.01
"""share of a latent's largest value above which a token is marked"""
_TRIES = 40
"""tokens drawn for each random window, at most"""


@dataclass(frozen=True)
class Case:
    """A latent with what is shown of it, and what it is tested on."""

    latent: int
    marked: tuple[str, ...]
    texts: tuple[str, ...]
    fires: tuple[bool, ...]
    """whether it counts as firing in each text"""


@dataclass(frozen=True)
class _Prepared:
    bench: Bench
    about: About
    chunks: ActivationSource
    judge: Judge

    def score(self, sae: SAE, pieces: Pieces) -> Scored:
        spec, judge = self.bench.spec, self.judge
        cases = pieces.value("cases", tuple[Case, ...], lambda: tuple(self._cases(sae)))
        rows = rate(judge, EXPLAIN, cases).rows
        labels = {row.case.latent: row.words for row in rows if row.answer}
        own, other = (selected(judge, cases, of, spec.form) for of in (labels, strangers(labels, spec.seed)))
        draws = [_numbers(cases[i :: spec.seeds], own, other) for i in range(spec.seeds)]
        details = [
            {"latent": one.latent, "explanation": labels.get(one.latent), "score": own.get(one.latent),
             "shuffled_score": other.get(one.latent)} for one in cases
        ]  # fmt: skip
        deviation = float(np.std([score for score in own.values() if score is not None]))
        scored = Scored.of(draws, 0.0, details)
        return replace(scored, value=scored.value | {"autointerp_std_dev": deviation})

    def _cases(self, sae: SAE) -> list[Case]:
        n, compatible = self.bench.spec.autointerp.latents, self.bench.spec.form == "compatible"
        firings, documents = counts_of(sae, self.bench, self.chunks)
        enough = firings > _FEWEST if compatible else documents >= _FIRING
        drawn = np.random.default_rng([self.bench.spec.seed, 41]).permutation(np.flatnonzero(enough))
        drawn = drawn[: n + n // 2 + 8]
        text = Text.of(self.bench, self.chunks, sae, np.sort(drawn))
        cases = [case for j in drawn.tolist() if (case := case_of(j, text, self.bench.spec)) is not None][:n]
        if len(cases) < n:
            raise UnweaveError(
                f"only {len(cases)} latents fire in {_FIRING} windows of different "
                f"{'places' if compatible else 'documents'}, fewer than {n}",
                where="autointerp.latents", remedy="read more text (autointerp.tokens), or ask for fewer latents",
            )  # fmt: skip
        return cases


def _numbers(
    cases: Sequence[Case], own: Mapping[int, float | None], other: Mapping[int, float | None]
) -> dict[str, float]:
    both = [(own.get(one.latent), other.get(one.latent)) for one in cases]
    usable = [(a, b) for a, b in both if a is not None and b is not None]
    if not usable:
        raise UnweaveError("the judge has no usable answer about any latent of a seed", where="autointerp.judge",
                           remedy="use a larger judge, or more latents")  # fmt: skip
    a, b = np.array(usable).T
    return {
        "autointerp_score": float(a.mean()),
        "shuffled_autointerp_score": float(b.mean()),
        "autointerp_std_dev": float(a.std()),
        "autointerp_unanswered": 1 - len(usable) / len(both),
    }


def _prepare(bench: Bench) -> _Prepared:
    options = bench.spec.autointerp
    check_judge(options.judge)
    data = data_of(bench.saes[0], options.data)
    store, _ = token_store(bench.lm, bench.model, data, "train", options.tokens, bench.runs)
    source = bench.source(store, 16_384)
    judge: CachedJudge = open_judge(options.judge, bench.runs / REPLIES, bench.spec.device)
    known = check_selecting(judge)
    note = f"Explained and judged by {', '.join(filter(None, (judge.name, judge.note)))}; {known.verdict}."
    words = f"{store.n_tokens:,} tokens of {', '.join(one.path for one in data.sources)}"
    return _Prepared(bench, About(store.digest, words, bench.counted(source, 0)[0], (note,)), source, judge)


# -- the judge --------------------------------------------------------------------------------------------------------


def selected(judge: Judge, cases: Sequence[Case], labels: Mapping[int, str], form: str) -> dict[int, float | None]:
    """The score of every latent that has a label; None where the judge's answer cannot be read."""
    labelled = [one for one in cases if one.latent in labels]
    rows = rate(judge, SELECT, [Selection(labels[one.latent], one.texts) for one in labelled]).rows
    return {
        one.latent: accuracy(one.fires, row.answer.values, form) if row.answer else None
        for one, row in zip(labelled, rows, strict=True)
    }


def accuracy(truth: Sequence[bool], named: Sequence[int], form: str) -> float:
    """How many texts are named (from 1 on) or left out rightly; in the correct form the mean of that over texts in
    which the latent fires and over others."""
    right = np.array([(i in named) == fires for i, fires in enumerate(truth, 1)])
    if form == "compatible":
        return float(right.mean())
    return float(np.mean([right[np.array(truth) == side].mean() for side in (True, False)]))


def check_selecting(judge: Judge) -> Check:
    """Whether the judge finds the texts that mention a concept among near misses and others."""
    known = known_texts()
    order = np.random.default_rng(0).permutation(len(known))
    some = {one.concept: [known[i] for i in order if known[i].concept == one.concept] for one in known}
    rows = rate(judge, SELECT, [Selection(name, tuple(one.text for one in of)) for name, of in some.items()]).rows
    values = [float(i in row.answer.values) if row.answer else np.nan for row in rows
              for i in range(1, len(row.case.texts) + 1)]  # fmt: skip
    failures = Counter(row.failure for row in rows for _ in row.case.texts if row.failure)
    cases = [(one, one.right, one.kind) for of in some.values() for one in of]
    return compared(SELECT.id, judge.name, values, cases, dict(failures))


# -- latents and their windows ----------------------------------------------------------------------------------------


def counts_of(sae: SAE, bench: Bench, source: ActivationSource) -> tuple[Array, Array]:
    """On how many tokens, and in how many documents, each latent fires; int64 [F] each."""
    firings, documents = np.zeros(sae.d_sae, np.int64), np.zeros(sae.d_sae, np.int64)
    of_row = np.asarray(source.store.documents)
    for x, row in bench.chunks(source):
        codes = sae.codes(x.to(sae.W_enc.dtype))
        latent, document = codes.indices.cpu().numpy(), of_row[row[codes.row_of_each()].cpu().numpy()]
        on = codes.values.cpu().numpy() > 0
        firings += np.bincount(latent[on], minlength=sae.d_sae)
        pairs = np.unique(document[on] * sae.d_sae + latent[on])
        documents += np.bincount(pairs % sae.d_sae, minlength=sae.d_sae)
    return firings, documents


@dataclass(frozen=True)
class Text:
    """A store, its tokens that count, and where some latents fire: {latent: (tokens, values)}; tokens ascend."""

    store: TokenStore
    tokenizer: Any
    counted: Array
    firings: Mapping[int, tuple[Array, Array]]

    @classmethod
    def of(cls, bench: Bench, source: ActivationSource, sae: SAE, latents: Array) -> Text:
        parts: list[tuple[Array, Array, Array]] = []
        counted = []
        for chunk in range(source.n_chunks):
            x, where = bench.placed(source, chunk)
            codes = sae.codes(x.to(sae.W_enc.dtype)).of(torch.from_numpy(latents))
            on = (codes.values > 0).cpu().numpy()
            columns = (codes.indices, codes.row_of_each(), codes.values.float())
            which, row, values = (column.cpu().numpy()[on] for column in columns)
            parts.append((which, where[row], values))
            counted.append(where)
        which, token, values = map(np.concatenate, zip(*parts, strict=True))
        order = np.lexsort((token, which))
        bounds = np.searchsorted(which[order], np.arange(len(latents) + 1))
        firings = {
            int(j): (token[order[a:b]], values[order[a:b]])
            for j, a, b in zip(latents, bounds[:-1], bounds[1:], strict=True)
        }
        return cls(source.store, bench.lm.tokenizer, np.sort(np.concatenate(counted)), firings)

    @cached_property
    def starts(self) -> Array:
        return np.asarray(self.store.starts)

    def document(self, tokens: Array) -> Array:
        """The document of each token."""
        return np.asarray(self.store.documents)[np.searchsorted(self.starts, tokens, side="right") - 1]

    def around(self, latent: int, token: int) -> tuple[int, int, slice]:
        """Where a token's window begins and ends in the store, and which of the latent's firings are in it."""
        row = int(np.searchsorted(self.starts, token, side="right")) - 1
        begin = max(token - _AROUND, int(self.starts[row]))
        end = min(token + _AROUND + 1, int(self.starts[row + 1]))
        return begin, end, slice(*np.searchsorted(self.firings[latent][0], (begin, end)).tolist())

    def window(self, latent: int, token: int) -> Context:
        """A token and those around it in its row, with the latent's values."""
        begin, end, here = self.around(latent, token)
        at, values = self.firings[latent]
        of = np.zeros(end - begin)
        of[at[here] - begin] = values[here]
        ids = np.asarray(self.store.ids[begin:end]).tolist()
        shown = pieces_of(self.tokenizer, ids)
        counted = np.isin(np.arange(begin, end), self.counted)
        return Context(
            tuple(ids), tuple(one.text for one in shown), tuple(of.tolist()), tuple(counted.tolist()), token - begin,
            token, int(self.document(np.array([token]))[0]), Role.TEXT, None, tuple(one.goes_on for one in shown),
        )  # fmt: skip


def case_of(latent: int, text: Text, spec: SaebenchSpec) -> Case | None:
    """What is shown of a latent, and what it is tested on; None where it fires in too few windows."""
    rng, compatible = np.random.default_rng([spec.seed, 43, latent]), spec.form == "compatible"
    tokens, values = text.firings[latent]
    documents = text.document(tokens)

    def clash(i: int) -> Array:
        near = np.abs(tokens - tokens[i]) <= 2 * _AROUND
        return near if compatible else documents == documents[i]

    free = np.ones(len(tokens), bool)
    top = _picked(np.argsort(-values, kind="stable"), sum(_TOP), free, clash)
    keys = np.log(rng.random(len(tokens))) / values.astype(np.float64) ** 2  # the largest: drawn in proportion to f^2
    drawn = _picked(np.argsort(-keys, kind="stable"), sum(_DRAWN), free, clash)
    quiet = _quiet(text, latent, documents[[*top, *drawn]], rng, compatible)
    if len(top) + len(drawn) < _FIRING or len(quiet) < _RANDOM:
        return None
    top, drawn = rng.permutation(top), rng.permutation(drawn)
    shown = tokens[np.concatenate([top[: _TOP[0]], drawn[: _DRAWN[0]]])]
    tests = [(int(t), True) for t in tokens[np.concatenate([top[_TOP[0] :], drawn[_DRAWN[0] :]])]]
    tests += [(t, False) for t in quiet]
    tests = [tests[i] for i in rng.permutation(len(tests))]
    windows = [text.window(latent, int(t)) for t in shown]
    return Case(
        latent,
        tuple(marked(one, fires(one, _MARKED, float(values.max()))) for one in windows),
        tuple("".join(tokens_of(text.window(latent, t))) for t, _ in tests),
        tuple(on for _, on in tests),
    )


def _picked(order: Array, n: int, free: Array, clash: Callable[[int], Array]) -> list[int]:
    """The first ``n`` of an order that are free; what clashes with them is free no more (in place)."""
    picked: list[int] = []
    for i in order.tolist():
        if len(picked) == n:
            break
        if free[i]:
            picked.append(i)
            free &= ~clash(i)
    return picked


def _quiet(text: Text, latent: int, taken: Array, rng: np.random.Generator, compatible: bool) -> list[int]:
    """Random tokens: any, or of documents of their own in whose windows the latent is silent."""
    drawn = rng.choice(text.counted, min(len(text.counted), _RANDOM * _TRIES), replace=False).tolist()
    if compatible:
        return drawn[:_RANDOM]
    seen, quiet, documents = {*taken.tolist()}, [], text.document(np.array(drawn)).tolist()
    for token, document in zip(drawn, documents, strict=True):
        if len(quiet) == _RANDOM:
            break
        *_, firing = text.around(latent, token)
        if document not in seen and firing.start == firing.stop:
            seen.add(document)
            quiet.append(token)
    return quiet


def _config(spec: SaebenchSpec) -> dict[str, Any]:
    options = spec.autointerp
    return {
        "n_latents": options.latents,
        "override_latents": None,
        "dead_latent_threshold": _FEWEST,
        "random_seed": spec.seed,
        "buffer": _AROUND,
        "no_overlap": True,
        "act_threshold_frac": _MARKED,
        "total_tokens": options.tokens,
        "scoring": True,
        "max_tokens_in_explanation": options.judge.max_new_tokens,
        "use_demos_in_explanation": True,
        "n_top_ex_for_generation": _TOP[0],
        "n_iw_sampled_ex_for_generation": _DRAWN[0],
        "n_top_ex_for_scoring": _TOP[1],
        "n_random_ex_for_scoring": _RANDOM,
        "n_iw_sampled_ex_for_scoring": _DRAWN[1],
    }


TASK = Task(
    name="autointerp",
    eval_type="autointerp",
    version=1,
    headlines={"autointerp_score": 1},
    baselines=("random directions",),
    prepare=_prepare,
    config=_config,
    categories=lambda spec: {"autointerp": ["autointerp_score", "autointerp_std_dev"]},
)
