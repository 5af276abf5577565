"""First-letter absorption: does the latent for a letter go silent on words whose own latent says the letter too?

1. Words that are one token, in a prompt after examples ("{word} has the first letter:"); the activation at the word.
2. One probe a letter on the activations. Letters that it tells well count; u is its direction at unit length.
3. For each letter the latents are ordered by how much more they fire on its words. Its main latents: the first k, with
   k raised while a logistic regression's F1 rises by more than ``f1_jump``.
4. Of the test words that the probe says have their letter, with p_j = f_j (d_j . u) and M = sum of p over main latents:

       A = the sum of the three largest p_j > 0 among others with cos(d_j, u) >= 0.1
       fraction = 0 if M >= proj or A < 0.4 proj;  1 if M <= 0;  else a / (a + M), a = min(A, proj - M)
       full     = main latents silent, and the largest p_j has cos >= 0.025 and at least 0.4 of proj >= 0

   A letter's rates are means over these words, the result the mean over letters.

Correct form: proj = (x - b_dec) . u, which is what latents can explain; latents are ordered by the difference of means
in standard deviations; letters and main latents are chosen on validation words; the model's probe is trained on
activations in standard deviations. Compatible form: SAEBench 0.6's, proj = x . u and cos(d_j, u) in place of d_j . u,
latents ordered by the weights of an L1 probe that is stopped long before it converges, everything chosen on test words.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unweave.core.codes import Codes
from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.core.spec import digest
from unweave.data.pack import Row
from unweave.lm.chat import encode_text, encode_texts
from unweave.lm.model import LM
from unweave.methods.saebench.spec import AbsorptionSpec, SaebenchSpec
from unweave.methods.saebench.spread import Scored
from unweave.methods.saebench.task import About, Bench, Task
from unweave.sae.module import SAE

LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TAIL = " has the first letter:"
_OVERLAP = 0.2 / 0.6
_COLUMNS = {"absorption_fraction_score": "mean_absorption_fraction", "full_absorption_score": "full_absorption_rate",
            "num_split_features": "num_split_features"}  # fmt: skip
_COS_FULL, _COS_PART, _SHARE, _ABSORBERS, _SILENT = 0.025, 0.1, 0.4, 3, 1e-8


@dataclass(frozen=True)
class Probe:
    """Logits x weight^T + bias of the 26 letters: weight [26, D or F], bias [26]."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Parts:
    """Words of a seed, int64 each: to train on, to choose on, to test on (the same two in the compatible form)."""

    train: Tensor
    choose: Tensor
    test: Tensor


@dataclass(frozen=True)
class _Prepared:
    bench: Bench
    about: About
    """whose sample is the activation at every word [N, D]"""
    letters: Tensor
    """of each word, int64 [N]"""
    probes: tuple[tuple[Parts, Probe, tuple[int, ...]], ...]
    """of each seed: its words, the probe, and the letters that it tells"""

    def score(self, sae: SAE, pieces: Pieces) -> Scored:
        draws, rows = [], []
        with task("absorption", total=len(self.probes), unit="seeds") as shown:
            for number, (parts, probe, kept) in enumerate(self.probes):
                rows.append(pieces.value(f"letters-{number}", tuple[dict[str, Any], ...],
                    lambda parts=parts, probe=probe, kept=kept: tuple(letters_of(
                        sae, self.about.sample, self.letters, parts, probe, kept, self.bench.spec))))  # fmt: skip
                draws.append(_means(rows[-1]) | {"letters": float(len(rows[-1]))})
                shown.advance()
        return Scored.of(draws, _OVERLAP, rows[0])


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    values = {name: [float(row[column]) for row in rows] for name, column in _COLUMNS.items()}
    means = {f"mean_{name}": statistics.mean(of) for name, of in values.items()}
    return means | {f"std_dev_{name}": statistics.stdev(of) for name, of in values.items()}


def _prepare(bench: Bench) -> _Prepared:
    options = bench.spec.absorption
    words = words_of(bench.lm, options.words_per_letter, bench.spec.seed)
    rows, places, kept = prompts(bench.lm, words, options.examples, bench.spec.seed)
    if len(kept) < 26 * 5:
        raise UnweaveError(f"only {len(kept)} words are single tokens of this tokenizer", where="absorption",
                           remedy="leave absorption out of tasks for this model")  # fmt: skip
    x = bench.at(rows, places)
    letters = torch.tensor([LETTERS.index(word.strip()[0].lower()) for word in kept])
    probes = []
    for seed in bench.seeds:
        parts = _divided(len(kept), seed, bench.spec.form)
        held = bench.pieces.tensors(f"probe-{seed}", lambda p=parts, s=seed: _probe(x, letters, p, s, bench.spec.form))
        probe = Probe(held["weight"], held["bias"])
        tells = _told(probe, x[parts.choose], letters[parts.choose], options.least_f1)
        if len(tells) < options.least_letters:
            raise UnweaveError(
                f"the model's activations tell {len(tells)} first letters, fewer than {options.least_letters}",
                where=str(bench.site),
                remedy="measure it at another layer, or lower absorption.least_letters or least_f1",
            )
        probes.append((parts, probe, tells))
    words_used = f"{len(kept):,} words that are single tokens of the tokenizer, {options.examples} examples before each"
    told = ", ".join(str(len(tells)) for *_, tells in probes)
    note = f"Letters that the model's own probe tells (F1 above {options.least_f1}), of each seed: {told}."
    about = About(digest([kept, [row.ids for row in rows]]), words_used, x, (note,))
    return _Prepared(bench, about, letters, tuple(probes))


# -- words ------------------------------------------------------------------------------------------------------------


def words_of(lm: LM, per_letter: int, seed: int) -> list[str]:
    """Tokens of letters only, with or without a space before them, at most so many of each letter."""
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise UnweaveError("words need a tokenizer", where=lm.name, remedy="use a model that comes with one")
    ids = sorted(set(tokenizer.get_vocab().values()) - set(lm.special_ids))
    strings = {text for text in lm.token_strings(ids) if text.removeprefix(" ").isalpha() and text.isascii()}
    words = sorted(strings)
    random.Random(seed).shuffle(words)
    of = {letter: [word for word in words if word.strip()[0].lower() == letter][:per_letter] for letter in LETTERS}
    return [word for some in of.values() for word in some]


def prompts(lm: LM, words: Sequence[str], examples: int, seed: int) -> tuple[list[Row], list[int], list[str]]:
    """A row for each word that is one token where it stands, the word's place in it, and the words."""
    rng, special = random.Random(seed), set(lm.special_ids)
    texts = []
    for word in words:
        drawn = [other for other in rng.sample(words, min(examples + 1, len(words))) if other != word][:examples]
        lines = [f"{other}{_TAIL} {other.strip()[0].upper()}" for other in drawn]
        texts.append("\n".join(["", *lines, f"{word}{_TAIL}"]))
    tail = [i for i in encode_text(lm.tokenizer, _TAIL)[0] if i not in special]
    rows, places, kept = [], [], []
    for word, (ids, roles) in zip(words, encode_texts(lm.tokenizer, texts), strict=True):
        place = len(ids) - len(tail) - 1
        if place >= 0 and ids[place + 1 :] == tail and lm.token_strings([ids[place]])[0].strip() == word.strip():
            rows.append(Row(ids, roles, len(rows)))
            places.append(place)
            kept.append(word)
    return rows, places, kept


def _divided(n: int, seed: int, form: str) -> Parts:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if form == "compatible":
        return Parts(order[: int(0.8 * n)], order[int(0.8 * n) :], order[int(0.8 * n) :])
    return Parts(order[: int(0.6 * n)], order[int(0.6 * n) : int(0.8 * n)], order[int(0.8 * n) :])


# -- probes -----------------------------------------------------------------------------------------------------------


def fit(x: Tensor | Codes, letters: Tensor, *, l1: float, l2: float, batch: int, seed: int) -> Probe:
    """One-vs-rest logistic regressions of all letters at once: Adam, 50 epochs, the rate falling from 1e-2 to 1e-5,
    positives weighed by their rarity. ``x`` are activations [N, D] or latents."""
    n, width = x.shape
    y = F.one_hot(letters, 26).float()
    weigh = (n - y.sum(0)) / y.sum(0).clamp(min=1)
    generator = torch.Generator().manual_seed(seed)
    bound = width**-0.5
    weight, bias = ((torch.rand(shape, generator=generator) * 2 - 1).mul(bound).requires_grad_()
                    for shape in ((width, 26), (26,)))  # fmt: skip
    optimiser = torch.optim.Adam([weight, bias], lr=1e-2, weight_decay=l2)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimiser, gamma=1e-3 ** (1 / 50))
    with torch.enable_grad():
        for _ in range(50):
            for rows in torch.randperm(n, generator=generator).split(batch):
                logits = _rows(x, rows, weight) + bias
                loss = F.binary_cross_entropy_with_logits(logits, y[rows], pos_weight=weigh)
                loss = loss + l1 * weight.abs().sum(0).mean() if l1 else loss
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            decay.step()
    return Probe(weight.detach().T.contiguous(), bias.detach())


def _rows(x: Tensor | Codes, rows: Tensor, weight: Tensor) -> Tensor:
    """x[rows] weight, [n, 26]."""
    if isinstance(x, Tensor):
        return x[rows] @ weight
    part = x.take(rows)
    return F.embedding_bag(part.indices, weight, part.offsets, mode="sum", per_sample_weights=part.values,
                           include_last_offset=True)  # fmt: skip


def _probe(x: Tensor, letters: Tensor, parts: Parts, seed: int, form: str) -> dict[str, Tensor]:
    train = x[parts.train]
    mean, scale = torch.zeros_like(train[0]), torch.ones_like(train[0])
    if form != "compatible":
        mean, scale = train.mean(0), train.std(0).clamp(min=1e-6)
    batch = 4096 if form == "compatible" else 256
    probe = fit((train - mean) / scale, letters[parts.train], l1=0.0, l2=1e-4, batch=batch, seed=seed)
    weight = probe.weight / scale
    return {"weight": weight, "bias": probe.bias - weight @ mean}


def _told(probe: Probe, x: Tensor, letters: Tensor, least: float) -> tuple[int, ...]:
    says = (x @ probe.weight.T + probe.bias) > 0
    return tuple(i for i in range(26) if f1(says[:, i], letters == i) > least)


def f1(says: Tensor, has: Tensor) -> float:
    """2 TP / (2 TP + FP + FN); 0 where nothing is said or there."""
    right = float((says & has).sum())
    return 2 * right / max(1.0, float(says.sum() + has.sum()))


# -- absorption -------------------------------------------------------------------------------------------------------


def letters_of(
    sae: SAE, x: Tensor, letters: Tensor, parts: Parts, probe: Probe, kept: Sequence[int], spec: SaebenchSpec
) -> list[dict[str, Any]]:
    """SAEBench's row of each letter."""
    options, compatible = spec.absorption, spec.form == "compatible"
    codes, W_dec, b_dec = sae.codes(x.to(sae.W_enc)).cpu(), sae.W_dec.float().cpu(), sae.b_dec.float().cpu()
    train, choose = codes.take(parts.train), codes.take(parts.choose)
    if compatible:
        order = fit(train, letters[parts.train], l1=0.01, l2=1e-6, batch=4096, seed=spec.seed).weight
    else:
        order = differences(train, letters[parts.train])
    rows = []
    for letter in (one for one in kept if bool((letters[parts.train] == one).any())):
        best = order[letter].topk(min(options.max_k, sae.d_sae)).indices
        main = best[: split(train, choose, letters[parts.train] == letter, letters[parts.choose] == letter,
                            best, options)]  # fmt: skip
        test = parts.test[letters[parts.test] == letter]
        test = test[x[test] @ probe.weight[letter] + probe.bias[letter] > 0]
        if not len(test):
            continue
        u = F.normalize(probe.weight[letter], dim=0)
        cos = F.normalize(W_dec, dim=1) @ u
        written = cos if compatible else W_dec @ u
        projection = x[test] @ u - (0.0 if compatible else float(b_dec @ u))
        fraction, full = absorbed(codes.take(test).dense().float(), written, cos, projection, main)
        rows.append({
            "first_letter": LETTERS[letter],
            "mean_absorption_fraction": float(fraction.mean()),
            "full_absorption_rate": float(full.double().mean()),
            "num_full_absorption": int(full.sum()),
            "num_probe_true_positives": len(test),
            "num_split_features": len(main),
        })  # fmt: skip
    return rows


def differences(codes: Codes, letters: Tensor) -> Tensor:
    """How far each latent's mean over a letter's words lies above that over the others, in its standard deviations over
    all words: [26, F]."""
    n, width = codes.n_rows, codes.n_latents
    values = codes.values.double()
    where = letters[codes.row_of_each()] * width + codes.indices
    sums = torch.zeros(26 * width, dtype=torch.float64).index_add_(0, where, values).view(26, width)
    square = torch.zeros(width, dtype=torch.float64).index_add_(0, codes.indices, values.square())
    counts, total = torch.bincount(letters, minlength=26)[:, None], sums.sum(0)
    apart = sums / counts.clamp(min=1) - (total - sums) / (n - counts).clamp(min=1)
    return (apart / (square / n - (total / n) ** 2).clamp(min=1e-12).sqrt()).float()


def split(train: Codes, choose: Codes, has: Tensor, has_choose: Tensor, best: Tensor, options: AbsorptionSpec) -> int:
    """How many of the latents ``best`` a letter is split into: more while F1 on words to choose on rises enough."""
    from sklearn.linear_model import LogisticRegression

    ascending, back = best.sort()
    place = back.argsort()  # of each of best among the columns below
    columns = [(one.of(ascending).dense()[:, place]).numpy() for one in (train, choose)]
    reached, k = -1.0, 0
    while k < len(best):
        probe = LogisticRegression(max_iter=500, class_weight="balanced")
        probe.fit(columns[0][:, : k + 1], has.numpy())
        score = f1(torch.from_numpy(probe.decision_function(columns[1][:, : k + 1]) > 0), has_choose)
        if score <= reached + options.f1_jump and k:
            break
        reached, k = score, k + 1
    return k


def absorbed(f: Tensor, written: Tensor, cos: Tensor, projection: Tensor, main: Tensor) -> tuple[Tensor, Tensor]:
    """The absorbed fraction [n] and full absorption bool [n] of words with latents f [n, F], of which a unit writes
    ``written`` [F] along the probe, and projections on it [n]; see the head of this file."""
    p = f * written
    ours = p[:, main].sum(1)
    others = p.where(cos >= _COS_PART, torch.zeros_like(p)).clamp(min=0)
    others[:, main] = 0
    theirs = others.topk(min(_ABSORBERS, others.shape[1]), dim=1).values.sum(1)
    none = (ours >= projection) | (theirs / projection < _SHARE)
    part = torch.minimum(theirs, projection - ours)
    fraction = (part / (part + ours)).clamp(0, 1)
    fraction = torch.where(none, 0.0, torch.where(ours <= 0, 1.0, fraction))
    largest, top = p.max(1)
    full = (f[:, main] < _SILENT).all(1) & (cos[top] >= _COS_FULL) & (projection >= 0)
    return fraction, full & (largest / projection >= _SHARE)


def _config(spec: SaebenchSpec) -> dict[str, Any]:
    options = spec.absorption
    return {
        "random_seed": spec.seed,
        "f1_jump_threshold": options.f1_jump,
        "max_k_value": options.max_k,
        "prompt_template": "{word}" + _TAIL,
        "prompt_token_pos": -6,
        "min_GT_probe_f1": options.least_f1,
        "min_feats_for_eval": options.least_letters,
    }


TASK = Task(
    name="absorption",
    eval_type="absorption_first_letter",
    version=1,
    headlines={"mean_absorption_fraction_score": -1, "mean_full_absorption_score": -1},
    baselines=("random directions", "neurons"),
    prepare=_prepare,
    config=_config,
    categories=lambda spec: {"mean": [f"{kind}_{name}" for kind in ("mean", "std_dev") for name in _COLUMNS]},
)
