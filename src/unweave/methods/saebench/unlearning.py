"""Unlearning: how far a model forgets one subject, and keeps the rest, when latents of the subject are clamped.

1. Questions with four options, of a subject to forget and of others to retain. Those that the model answers rightly in
   all 24 orders of their options count; the others say nothing about forgetting.
2. How often each latent fires on texts to forget and on texts to retain. Of latents that fire on fewer than a share of
   the latter's tokens, the 10 or 20 that fire most on the former are clamped to a negative value wherever they fire.
3. Each setting (share, number, value) has an accuracy on the questions to forget and one on those to retain. Settings
   that retain at least 99 % count, and the score is 1 - the lowest accuracy among them on the subject; 0 without any.

Correct form: the setting is chosen on half of the questions and measured on the others; values are multiples of a
latent's own mean where it fires, so that its unit does not matter. Compatible form: SAEBench 0.6's; chosen and measured
on all questions, values of -25 to -200. Beside it the same with latents that are drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.core.spec import digest
from unweave.data.batches import by_length
from unweave.data.pack import Row
from unweave.data.stream import ActivationSource
from unweave.lm.chat import encode_text, encode_texts
from unweave.lm.model import LM, Tokens
from unweave.methods.saebench.spec import SaebenchSpec, UnlearningSpec
from unweave.methods.saebench.spread import Scored
from unweave.methods.saebench.task import About, Array, Bench, Task
from unweave.sae.edits import Edit
from unweave.sae.module import SAE
from unweave.tasks.choices.templates import lines
from unweave.tasks.entries import entries
from unweave.tasks.suitable import tokenizer_of
from unweave.tasks.tagged.spec import TaggedSpec
from unweave.tasks.tagged.texts import open_tagged

SIDES = ("forget", "retain")
_ORDERS = tuple(permutations(range(4)))
_SHARES, _NUMBERS = (0.001, 0.01), (10, 20)
_VALUES = {"correct": (1.0, 2.0, 5.0, 10.0), "compatible": (25.0, 50.0, 100.0, 200.0)}
_RETAINED = 0.99
_PROMPT = "The following are multiple choice questions (with answers).\n\n{}\n{}\nAnswer:"
_OURS = (
    "Questions and texts are ours, not WMDP: athletes' sports are to be forgotten, and sports news stands for the "
    "subject; capitals, opposites and young animals, and other news, are to be retained."
)


@dataclass(frozen=True)
class Question:
    """A question with four options; ``answer`` is the place of the right one."""

    side: str
    text: str
    options: tuple[str, ...]
    answer: int

    def prompt(self, order: Sequence[int]) -> str:
        """As the model is asked it, with the options in another order."""
        options = (f"{letter}. {self.options[i]}" for letter, i in zip("ABCD", order, strict=True))
        return _PROMPT.format(self.text, "\n".join(options))


@dataclass(frozen=True)
class Material:
    """Questions, texts by side, where they come from in words, and what a reader must know of them."""

    questions: tuple[Question, ...]
    texts: Mapping[str, Sequence[str]]
    source: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Prepared:
    bench: Bench
    about: About
    known: tuple[Question, ...]
    chunks: ActivationSource
    n_forget: int
    """of the store's rows; the others are to be retained"""

    def score(self, sae: SAE, pieces: Pieces) -> Scored:
        held = pieces.tensors("right", lambda: self._right(sae))
        forget = np.array([one.side == "forget" for one in self.known])
        draws, rng, form = [], np.random.default_rng(self.bench.spec.seed), self.bench.spec.form
        everything = np.arange(len(self.known))
        halves = [_halves(forget, rng) for _ in self.bench.seeds]
        for first, second in halves:
            draws.append(scores(held, forget, second if form == "compatible" else first, second))
        scored = Scored.of(draws, 1.0)
        if form == "compatible":
            scored = replace(scored, value=scores(held, forget, everything, everything))
        return scored

    def _right(self, sae: SAE) -> dict[str, Tensor]:
        """Which known questions are answered rightly under each setting, bool [settings, questions], by latents ranked
        and drawn."""
        fires, size = firing(sae, self.bench, self.chunks, self.n_forget)
        rng = np.random.default_rng([self.bench.spec.seed, 53])
        rows: dict[str, list[Tensor]] = {"ranked": [], "drawn": []}
        asked: dict[Any, Tensor] = {}
        values = _VALUES[self.bench.spec.form]
        with task("questions under edits", total=2 * len(_SHARES) * len(_NUMBERS), unit="sets of latents") as shown:
            for share, number in product(_SHARES, _NUMBERS):
                may = np.flatnonzero((fires[1] < share) & (fires[0] > 0))
                ranked = may[np.argsort(-fires[0][may], kind="stable")][:number]
                for name, latents in (("ranked", ranked), ("drawn", np.sort(rng.permutation(may)[:number]))):
                    for value in values:
                        key = (tuple(latents.tolist()), value)
                        if key not in asked:
                            unit = torch.from_numpy(size[latents]) if self.bench.spec.form == "correct" else 1.0
                            to = -value * unit * torch.ones(len(latents))
                            edit = clamped(sae, latents.tolist(), to) if len(latents) else None
                            asked[key] = right(self.bench, self.known, _ORDERS[0], edit)
                        rows[name].append(asked[key])
                    shown.advance()
        return {name: torch.stack(of) for name, of in rows.items()}


def _halves(forget: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Two halves of the questions of each side."""
    sides = [rng.permutation(np.flatnonzero(forget == side)) for side in (True, False)]
    return tuple(np.concatenate([side[i::2] for side in sides]) for i in (0, 1))  # type: ignore[return-value]


def scores(held: Mapping[str, Tensor], forget: Array, choose: Array, test: Array) -> dict[str, float]:
    """The score of latents ranked and drawn, with the setting chosen on some questions and measured on others."""
    numbers = {}
    for name, of in held.items():
        table = of.numpy()
        table = np.concatenate([np.ones_like(table[:1]), table])  # without an edit every known question is answered
        chosen = table[:, choose[forget[choose]]].mean(1)
        chosen = np.where(table[:, choose[~forget[choose]]].mean(1) >= _RETAINED, chosen, np.inf)
        best = table[int(np.argmin(chosen))]
        begins = "" if name == "ranked" else "random_"
        numbers[f"{begins}unlearning_score"] = float(1 - best[test[forget[test]]].mean())
        numbers[f"{begins}unlearning_retained"] = float(best[test[~forget[test]]].mean())
    return numbers


def _prepare(bench: Bench) -> _Prepared:
    options = bench.spec.unlearning
    material = ours(bench.spec.seed) if options.material is None else read(options.material)
    known = known_questions(bench, material.questions, options)
    texts = [material.texts[side] or _news(side, options.texts, bench.spec.seed) for side in SIDES]
    cut = [text[: 20 * options.context] for some in texts for text in some]
    rows = [Row(ids[: options.context], roles[: options.context], i)
            for i, (ids, roles) in enumerate(encode_texts(bench.lm.tokenizer, cut))]  # fmt: skip
    source = bench.source(bench.stored(rows), 16_384)
    counts = {side: sum(one.side == side for one in known) for side in SIDES}
    words = ", ".join(f"{n} questions to {side}" for side, n in counts.items())
    about = About(
        digest([source.store.digest, [one.prompt(_ORDERS[0]) for one in known]]),
        f"{material.source}: {words}, that the model answers in every order", bench.counted(source, 0)[0],
        material.notes,
    )  # fmt: skip
    return _Prepared(bench, about, known, source, len(texts[0]))


# -- questions and texts ----------------------------------------------------------------------------------------------


def ours(seed: int) -> Material:
    """Athletes' sports to forget; capitals, opposites and young animals to retain. Wrong options are other answers."""
    sports = dict(line.split("\t") for line in lines("athletes.tsv"))
    facts = {"forget": {"Which sport is {} known for?": [(name, sport) for sport in sports
                                                         for name in sports[sport].split(", ")]}}  # fmt: skip
    facts["retain"] = {
        text: [(subject, answer) for subject, _, answer in (pair.partition("=") for pair in pairs.split(", "))]
        for text, pairs in (line.split("\t") for line in lines("facts.tsv"))
    }
    rng, questions = Random(seed), []
    for side, of in facts.items():
        for text, pairs in of.items():
            answers = sorted({answer for _, answer in pairs})
            for subject, answer in pairs:
                options = [answer, *rng.sample([other for other in answers if other != answer], 3)]
                rng.shuffle(options)
                questions.append(Question(side, text.format(subject), tuple(options), options.index(answer)))
    rng.shuffle(questions)
    return Material(tuple(questions), dict.fromkeys(SIDES, ()), "sports and general knowledge (ours)", (_OURS,))


def _news(side: str, n: int, seed: int) -> list[str]:
    texts = open_tagged(TaggedSpec(source="topics"))
    sport, rng = texts.names.index("sports news"), np.random.default_rng([seed, 59])
    drawn: list[str] = []
    for i in rng.permutation(len(texts)).tolist():
        if len(drawn) < n and (texts.labels(i) == [sport]) == (side == "forget"):
            drawn.append(texts.text(i))
    return drawn


def read(path: Path) -> Material:
    """A file of objects: {"side": "forget" or "retain", "text": ...} and {"side": ..., "question": ..., "options": four
    texts, "answer": 0 to 3}. UnweaveError for anything else, and for a side without texts or questions."""
    questions, texts = [], {side: [] for side in SIDES}
    for where, one in entries(path, "questions and texts", ("side",)):
        side: Any
        options: Any
        answer: Any
        side, options, answer = (one.get(name) for name in ("side", "options", "answer"))
        asks = isinstance(one.get("question"), str) and isinstance(options, list) and answer in range(4)
        asks = asks and len(options) == 4 and all(isinstance(option, str) for option in options)
        if side not in SIDES or asks == isinstance(one.get("text"), str):
            raise UnweaveError(
                "this is neither a question nor a text", where=where,
                remedy='write {"side": "forget" or "retain", "text": ...}, or question, four options and answer (0-3)',
            )  # fmt: skip
        if asks:
            questions.append(Question(side, one["question"], tuple(options), answer))
        else:
            texts[side].append(one["text"])
    for side in SIDES:
        if not texts[side] or not any(one.side == side for one in questions):
            raise UnweaveError(f"there are no texts, or no questions, to {side}", where=str(path), remedy="add some")
    return Material(tuple(questions), texts, path.name, ())


def known_questions(bench: Bench, questions: Sequence[Question], options: UnlearningSpec) -> tuple[Question, ...]:
    """The first questions of each side that the model answers rightly in all orders of their options. UnweaveError
    where there are too few."""
    known: list[Question] = []
    for side in SIDES:
        asked = [one for one in questions if one.side == side][: options.questions]
        left, first = asked, 0.0
        with task(f"questions to {side}", total=len(_ORDERS), unit="orders") as shown:
            for number, order in enumerate(_ORDERS, 1):
                answers = right(bench, left, order).tolist()
                first = float(np.mean(answers)) if number == 1 else first
                left = [one for one, fine in zip(left, answers, strict=True) if fine]
                shown.advance()
                if len(left) < options.least:
                    raise UnweaveError(
                        f"of {len(asked)} questions to {side} the model answers {len(left)} rightly in {number} of "
                        f"{len(_ORDERS)} orders of their options, fewer than {options.least}; in the first order alone "
                        f"{first:.0%} (chance 25 %)",
                        where="unlearning", remedy="use a model that answers such questions, or a file of easier ones",
                    )  # fmt: skip
        known += left
    return tuple(known)


def letters(lm: LM) -> Tensor:
    """The tokens of A to D as answers, int64 [4]. UnweaveError where they are no single tokens."""
    tokenizer = tokenizer_of(lm)
    begin = encode_text(tokenizer, "Answer:")[0]
    for blank in (" ", ""):
        whole = [encode_text(tokenizer, f"Answer:{blank}{letter}")[0] for letter in "ABCD"]
        if all(ids[:-1] == begin for ids in whole):
            return torch.tensor([ids[-1] for ids in whole])
    raise UnweaveError("the letters A to D are no single tokens of this tokenizer", where=lm.name,
                       remedy="leave unlearning out of tasks for this model")  # fmt: skip


def right(bench: Bench, questions: Sequence[Question], order: Sequence[int], edit: Edit | None = None) -> Tensor:
    """Whether the likeliest letter is the right one, with the options in an order, bool [N]."""
    lm, answers = bench.lm, letters(bench.lm).to(bench.lm.device)
    rows = encode_texts(lm.tokenizer, [one.prompt(order) for one in questions])
    said = torch.empty(len(rows), dtype=torch.int64)
    for group in by_length([len(ids) for ids, _ in rows], bench.spec.batch_tokens):
        tokens = Tokens.pad([rows[i] for i in group], lm.pad_id, "left")
        with lm.taps(edit=edit):
            logits = lm(tokens, keep_logits=1)
        assert logits is not None
        said[group] = logits[:, -1, answers].argmax(1).cpu()
    return said == torch.tensor([list(order).index(one.answer) for one in questions])


# -- latents ----------------------------------------------------------------------------------------------------------


def firing(sae: SAE, bench: Bench, source: ActivationSource, n_forget: int) -> tuple[Array, Array]:
    """The share of tokens on which each latent fires, of texts to forget and to retain, [2, F]; and its mean where it
    fires on the former, [F]."""
    fires, total = np.zeros((2, sae.d_sae)), np.zeros(2)
    value = np.zeros(sae.d_sae)
    for x, row in bench.chunks(source):
        codes = sae.codes(x.to(sae.W_enc.dtype))
        side = (row >= n_forget).long()
        total += np.bincount(side.cpu().numpy(), minlength=2)
        of, values = side[codes.row_of_each()].cpu().numpy(), codes.values.double().cpu().numpy()
        latent, on = codes.indices.cpu().numpy(), values > 0
        for i in range(2):
            fires[i] += np.bincount(latent[on & (of == i)], minlength=sae.d_sae)
        here = on & (of == 0)
        value += np.bincount(latent[here], values[here], minlength=sae.d_sae)
    size = (value / np.maximum(fires[0], 1)).astype(np.float32)
    return fires / np.maximum(total, 1)[:, None], size


def clamped(sae: SAE, latents: Sequence[int], to: Tensor) -> Edit:
    """x + sum_j 1[f_j(x) > 0] (c_j - f_j(x)) d_j, with c [S]: latents take a value wherever they fire."""
    subset = sae.subset(latents)
    c = to.to(subset.W_enc)

    def added(source: Tensor, x: Tensor, tokens: Tensor) -> Tensor:
        del x
        f = subset.encode(source)
        return subset.writes(torch.where((f > 0) & tokens.unsqueeze(-1), c - f, 0.0), source)

    return Edit(f"clamp {list(latents)} where they fire", sae, added, "policy")


def _config(spec: SaebenchSpec) -> dict[str, Any]:
    options = spec.unlearning
    return {
        "random_seed": spec.seed,
        "dataset_names": [str(options.material) if options.material else "sports and general knowledge"],
        "intervention_method": "clamp_feature_activation",
        "retain_thresholds": list(_SHARES),
        "n_features_list": list(_NUMBERS),
        "multipliers": list(_VALUES[spec.form]),
        "dataset_size": options.texts,
        "seq_len": options.context,
        "target_metric": "correct",
    }


TASK = Task(
    name="unlearning",
    eval_type="unlearning",
    version=1,
    headlines={"unlearning_score": 1},
    baselines=("random directions",),
    prepare=_prepare,
    config=_config,
    categories=lambda spec: {"unlearning": ["unlearning_score"]},
)
