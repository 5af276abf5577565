"""Latents of special tokens, and what adding one does to a model's answers (FAST, section 6 and appendix F).

1. Which latents answer to a special token: a latent's largest value over the token's occurrences in a conversation,
   averaged over the conversations that hold it.
2. One of them is added at every position, z' = z + alpha d, with d its direction at length 1 (equation 8); the model
   answers questions greedily at each alpha, and so it does with latents drawn at random, moved by the same length.
3. How much of the text changed: answers that differ at all, and words without a partner in the unedited answer. How far
   it fell apart: how much less of it is distinct 3-grams (it repeats itself), and how much less probable it is to the
   unedited model. A loop can be very probable, so that neither number will do alone. Every mean is over questions, with
   an interval from drawing the questions again.

The FAST paper (section 6) speaks of a range of alpha in which answers improve. ``sweet_spot`` finds the range in which
they change and do not degrade in those two ways; whether they improve is for a reader to say.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.intervals import Interval, interval
from unweave.core.progress import task
from unweave.lm.model import LM, Tokens
from unweave.methods.special_tokens.result import AlphaSweep, Answer, Level, SweetSpot, TokenMaxima
from unweave.methods.special_tokens.spec import Tolerance
from unweave.sae.module import SAE
from unweave.sae.steered import sweep
from unweave.tasks.special_tokens import QUESTIONS, SpecialTokens

_DENSE_ELEMENTS = 1 << 23

# -- which latents answer to a special token --------------------------------------------------------------------------


def average_maxima(
    lm: LM,
    sae: SAE,
    batches: Iterable[Tokens],
    *,
    special: SpecialTokens | None = None,
    top: int = 5,
    max_norm: float = math.inf,
) -> list[TokenMaxima]:
    """The latents of each special token that occurs, by id (appendix F.3); every row of ``batches`` is a conversation.

    ``top`` latents of each, those with an average of zero left out. Raises UnweaveError when the SAE names no site or
    is not this model's, and when no token is special.
    """
    if sae.read is None:
        raise UnweaveError("this SAE does not say which site it belongs to", remedy='name it: sae.at("resid_post.9")')
    sae.verify(lm)
    chosen = special or SpecialTokens.of(lm)
    sums = _Maxima(sae, chosen.ids)
    with torch.no_grad(), task("special tokens' latents", total=0, unit="tokens") as shown:
        for piece in batches:
            batch = piece.to(lm.device)
            with lm.taps(read=[sae.read], stop=None if sae.read.point == "path" else sae.read) as seen:
                lm(batch)
            sums.add(batch, chosen.mask(batch), seen[sae.read], max_norm)
            shown.advance(batch.n_tokens)
    maxima = [sums.of(place, lm, top) for place in range(len(chosen.ids)) if sums.tokens[place]]
    if not maxima:
        raise UnweaveError(
            "no token is special", remedy="give conversations, or name the ids that this model's template writes"
        )
    return maxima


class _Maxima:
    """Sums over conversations of every latent's maximum at each of S special ids, with and without outliers."""

    def __init__(self, sae: SAE, ids: Sequence[int]) -> None:
        self.sae, self.ids = sae, torch.tensor(sorted(ids), device=sae.W_enc.device)
        self.totals = torch.zeros(2, len(ids), sae.d_sae, dtype=torch.float64, device=sae.W_enc.device)
        self.tokens = torch.zeros(len(ids), dtype=torch.int64)
        self.outliers = torch.zeros(len(ids), dtype=torch.int64)
        self.talks = torch.zeros(2, len(ids), dtype=torch.int64)

    def add(self, batch: Tokens, special: Tensor, x: Tensor, max_norm: float) -> None:
        """Takes in the special tokens [B, P] of one batch of activations [B, P, d_in]."""
        rows = torch.arange(len(batch), device=x.device)[:, None].expand_as(special)[special]
        places = torch.searchsorted(self.ids, batch.ids[special])
        pairs = rows * len(self.ids) + places  # one for each conversation and id
        order = pairs.argsort()
        x, pairs, places = x[special][order], pairs[order], places[order]
        inside = x.float().norm(dim=-1) <= max_norm
        self.tokens += torch.bincount(places, minlength=len(self.ids)).cpu()
        self.outliers += torch.bincount(places[~inside], minlength=len(self.ids)).cpu()
        distinct, pairs, sizes = torch.unique_consecutive(pairs, return_inverse=True, return_counts=True)
        place_of = distinct % len(self.ids)
        ends = sizes.cumsum(0).tolist()
        step = max(1, _DENSE_ELEMENTS // self.sae.d_sae)
        for first in range(0, len(sizes), step):
            last = min(first + step, len(sizes))
            tokens = slice(ends[first - 1] if first else 0, ends[last - 1])
            self._add_pairs(x[tokens], pairs[tokens] - first, inside[tokens], place_of[first:last])

    def _add_pairs(self, x: Tensor, pairs: Tensor, inside: Tensor, place_of: Tensor) -> None:
        """Tokens x [n, d_in] of some conversations' ids: ``pairs`` [n] of them, which are of ``place_of`` [p]."""
        codes = self.sae.codes(x.to(self.sae.W_enc.dtype))
        rows = codes.row_of_each()
        where = pairs[rows] * self.sae.d_sae + codes.indices
        for which, counted in enumerate((torch.ones_like(inside), inside)):
            maxima = codes.values.new_zeros(len(place_of) * self.sae.d_sae)
            of_counted = counted[rows]
            maxima.scatter_reduce_(0, where[of_counted], codes.values[of_counted], "amax")
            self.totals[which].index_add_(0, place_of, maxima.view(len(place_of), -1).double())
            holds_any = torch.bincount(pairs[counted], minlength=len(place_of)) > 0
            self.talks[which] += torch.bincount(place_of[holds_any], minlength=len(self.ids)).cpu()

    def of(self, place: int, lm: LM, top: int) -> TokenMaxima:
        best = []
        for which in (0, 1):
            means = self.totals[which, place] / max(1, int(self.talks[which, place]))
            values, latents = means.topk(min(top, len(means)))
            pairs = zip(latents.tolist(), values.tolist(), strict=True)
            best.append(tuple((latent, value) for latent, value in pairs if value > 0))
        return TokenMaxima(
            id=int(self.ids[place]),
            text=lm.token_strings([int(self.ids[place])])[0],
            tokens=int(self.tokens[place]),
            conversations=int(self.talks[0, place]),
            top=best[0],
            outliers=int(self.outliers[place]),
            conversations_without_outliers=int(self.talks[1, place]),
            top_without_outliers=best[1],
        )


def strongest(lm: LM, maxima: Sequence[TokenMaxima], token: str | None = None) -> tuple[int, int]:
    """(id, latent): a special token and its strongest latent. By default the token that opens a turn, where it occurs.

    Raises UnweaveError for a token that is not among ``maxima``, and where no latent fires on it.
    """
    opener = _opener(lm) if token is None else None
    chosen = next((m for m in maxima if (m.id == opener if token is None else m.text == token)), None)
    if chosen is None and token is not None:
        remedy = f"use one of {', '.join(repr(m.text) for m in maxima)}"
        raise UnweaveError(f"{token!r} is not among the special tokens that occur", where="token", remedy=remedy)
    chosen = chosen or maxima[0]
    if not chosen.top:
        raise UnweaveError(f"no latent fires on {chosen.text!r}", remedy="choose another --token, or name a --latent")
    return chosen.id, chosen.top[0][0]


def _opener(lm: LM) -> int | None:
    """The token that opens a turn: the first that the template writes to let the assistant speak."""
    talk = [[{"role": "user", "content": "7"}]]
    closed = lm.chat(talk).ids[0].tolist()
    opened = lm.chat(talk, add_generation_prompt=True).ids[0].tolist()
    return opened[len(closed)] if len(opened) > len(closed) and opened[: len(closed)] == closed else None


# -- answers along alpha ----------------------------------------------------------------------------------------------


def alpha_sweep(
    lm: LM,
    sae: SAE,
    latent: int,
    alphas: Sequence[float],
    *,
    unit: float = 1.0,
    questions: Sequence[str] = QUESTIONS,
    controls: Sequence[int] = (),
    max_new_tokens: int = 60,
) -> AlphaSweep:
    """Greedy answers with z + alpha d at every position that is not padding, for ``latent`` and each of ``controls``.

    The positions are all of the prompt and of the answer, also those that the SAE's policy excludes (``where="all"``),
    as in the paper. d has length 1, so that an alpha moves as far with every latent: by ``alpha * unit`` in the
    activation's own units. Alpha 0, the unedited model, is always among the levels. Raises UnweaveError for a negative
    alpha, for none above 0, and for a latent without a direction.
    """
    rising = sorted({float(alpha) for alpha in alphas if alpha != 0})
    if not rising or not all(0 < alpha < math.inf for alpha in rising) or not 0 < unit < math.inf:
        raise UnweaveError(
            f"cannot move activations by {list(alphas)} times {unit}", remedy="give alphas above 0, and a unit above 0"
        )
    if len(set(questions)) != len(questions):
        raise UnweaveError("a question is asked twice", remedy="ask each once: intervals are over questions")
    by_latent: dict[int, list[Answer]] = {}
    with task("steer", total=1 + len(controls), unit="latents") as shown:
        for chosen in (latent, *controls):
            by_latent[chosen] = _answers(lm, sae, chosen, rising, unit, questions, max_new_tokens)
            shown.advance()
    every = (0.0, *rising)
    return AlphaSweep(
        latent=latent,
        controls=tuple(controls),
        unit=unit,
        answers=tuple(by_latent[latent]),
        control_answers=tuple(answer for control in controls for answer in by_latent[control]),
        levels=levels_of([by_latent[latent]], questions, every, unit),
        control_levels=levels_of([by_latent[c] for c in controls], questions, every, unit) if controls else (),
    )


def random_latents(latent: int, firing_counts: Tensor, n: int, seed: int = 0) -> tuple[int, ...]:
    """``n`` latents for comparison, drawn from those other than ``latent`` that fire at all (counts [F]), or fewer."""
    others = [j for j in firing_counts.nonzero().flatten().tolist() if j != latent]
    return tuple(sorted(np.random.default_rng(seed).permutation(others)[:n].astype(int).tolist()))


def _answers(
    lm: LM, sae: SAE, latent: int, alphas: Sequence[float], unit: float, questions: Sequence[str], max_new_tokens: int
) -> list[Answer]:
    length = float(sae.subset([latent]).directions.norm())
    if not length > 0:
        raise UnweaveError(f"latent {latent} has no direction", remedy="choose another")
    texts = sweep(
        lm, sae, latent, questions, alphas, maximum=unit / length, mode="add", where="all",
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    unedited = {t.prompt: t.text for t in texts if t.strength is None}
    return [
        Answer(t.prompt, t.strength or 0.0, latent, t.text, t.n_tokens, t.distinct, t.perplexity,
               words_changed(unedited[t.prompt], t.text))
        for t in texts
    ]  # fmt: skip


_DEFAULT = Tolerance()


def sweet_spot(levels: Sequence[Level], tolerance: Tolerance = _DEFAULT) -> SweetSpot:
    """The longest run of neighbouring alphas above 0 at which, on the mean over questions, ``distinct`` and perplexity
    stay within the tolerance, no more answers are empty than at alpha 0, and enough of them differ; the first of
    equally long runs.

    This is no statement about quality: a text can change for the worse in many ways that neither number sees.
    """

    def within(loss: float | None, ratio: float | None) -> bool:
        losses = (loss, tolerance.max_distinct_loss), (ratio, tolerance.max_perplexity_ratio)
        return all(one is not None and one <= most for one, most in losses)

    runs: list[list[Level]] = [[]]
    certain: dict[float, bool] = {}
    for level in levels[1:]:
        loss, ratio = level.distinct_loss, level.perplexity_ratio
        changed = level.answers_changed.value >= tolerance.min_answers_changed and level.empty <= levels[0].empty
        if changed and ratio is not None and within(loss.value, ratio.value):
            runs[-1].append(level)
            certain[level.alpha] = within(loss.high, ratio.high)
        else:
            runs.append([])
    alphas = tuple(level.alpha for level in max(runs, key=len))
    return SweetSpot(alphas, bool(alphas) and all(certain[alpha] for alpha in alphas), **tolerance.to_dict())


def words_changed(before: str, after: str) -> float:
    """1 - 2 M / T, with T words in the two texts and M of them matched in order: 0 for equal texts, 1 for strangers."""
    if before == after:
        return 0.0
    return 1.0 - difflib.SequenceMatcher(None, before.split(), after.split(), autojunk=False).ratio()


def levels_of(
    by_latent: Sequence[Sequence[Answer]], questions: Sequence[str], alphas: Sequence[float], unit: float
) -> tuple[Level, ...]:
    """One level per alpha."""

    answered = [{(answer.question, answer.alpha): answer for answer in answers} for answers in by_latent]

    def level(alpha: float) -> Level:
        def at(value: Callable[[Answer, Answer], float]) -> np.ndarray:
            """A value of each answer and the unedited one, averaged over latents, [Q]."""
            return np.array([_mean([value(a[q, alpha], a[q, 0.0]) for a in answered]) for q in questions])

        def sure(value: Callable[[Answer, Answer], float]) -> Interval:
            known = interval(at(value))
            assert known is not None  # these values are never missing
            return known

        return Level(
            alpha=alpha,
            length=alpha * unit,
            distinct=sure(lambda a, _: a.distinct),
            distinct_loss=sure(lambda a, z: z.distinct - a.distinct),
            perplexity=_exp(interval(at(lambda a, _: _nats(a)))),
            perplexity_ratio=_exp(interval(at(lambda a, z: _nats(a) - _nats(z)))),
            answers_changed=sure(lambda a, z: float(a.text != z.text)),
            words_changed=sure(lambda a, _: a.words_changed),
            empty=float(at(lambda a, _: float(a.n_tokens == 0)).mean()),
        )

    return tuple(level(alpha) for alpha in alphas)


def _nats(answer: Answer) -> float:
    return math.nan if answer.perplexity is None else math.log(answer.perplexity)


def _mean(values: Sequence[float]) -> float:
    """The mean of what is not NaN; NaN where nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _exp(nats: Interval | None) -> Interval | None:
    if nats is None:
        return None
    low, high = (None if bound is None else math.exp(bound) for bound in (nats.low, nats.high))
    return Interval(math.exp(nats.value), low, high)
