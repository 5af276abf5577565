"""Labels of latents from texts with tags: matched on one part of the texts, tested on the other (METHODS 3.1).

1. One pass of the model over the texts to choose on, for all SAEs (``frequencies``).
2. Every latent and every label with enough support get a match score (``matching``).
3. From the best pair on, latents whose output score is too low are left out, until enough pairs are there.
4. The pairs are tested on texts held out, beside shuffled labels (``heldout``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unweave.core.errors import UnweaveError
from unweave.core.intervals import interval
from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.core.spec import digest
from unweave.latents.annotations import ScoredLabel
from unweave.latents.logit_weights import writes_into_stream
from unweave.latents.records import Records, RecordsSpec, build
from unweave.lm.model import LM
from unweave.methods.labels.frequencies import Frequencies, Reading, read
from unweave.methods.labels.heldout import HeldOut, Told, look, told
from unweave.methods.labels.levels import Array, threshold_of
from unweave.methods.labels.matching import Scores, TextLabels, best_scores
from unweave.methods.labels.result import LabelledLatent, Passage, Side, SiteLabels
from unweave.methods.labels.spec import MatchSpec
from unweave.sae.module import SAE
from unweave.sae.output_score import output_scores
from unweave.tasks.tagged.texts import TaggedTexts

_TRIED_AT_ONCE = 64
_SHOWN = 30
_PASSAGES = 4
_SIDES = {"chosen": "to choose on", "heldout": "held out"}


@dataclass(frozen=True)
class Pair:
    """A latent and a label, by their numbers."""

    latent: int
    label: int
    score: float
    level: int
    output_score: float | None


@dataclass(frozen=True)
class Matched:
    """What matching leaves of one SAE."""

    pairs: tuple[Pair, ...]
    firing: int
    candidates: int
    tried: int
    shuffled_best: float
    maxima: Array
    support: Array
    """of the labels"""


@dataclass(frozen=True)
class Labels:
    """The labels of each SAE, by site, and the texts that they were chosen and tested on."""

    sites: tuple[SiteLabels, ...]
    chosen_on: Side
    heldout: Side
    uncounted: int
    supported: int


def label(
    lm: LM,
    saes: Mapping[Site, SAE],
    texts: TaggedTexts,
    match: MatchSpec | None = None,
    *,
    folder: Path,
    context: int = 128,
    batch_tokens: int = 2048,
    seed: int = 0,
) -> Labels:
    """Labels latents of SAEs that read ``lm``. Tokens and sparse frequencies lie in ``folder``, where interrupted work
    goes on, and where the same texts are matched in another way without another pass over them.

    Raises UnweaveError for SAEs of another model, where the split leaves a side empty, where no label has the support,
    and where an output score is asked of an SAE that does not write into the residual stream.
    """
    match = match or MatchSpec()
    sides = {"chosen": np.flatnonzero(~texts.heldout), "heldout": np.flatnonzero(texts.heldout)}
    _refuse(lm, saes, texts, match, sides)
    folder = folder / _identity(saes, texts, context)
    chosen, heldout = (
        Reading.of(lm, saes, texts, which, folder / name, context=context, batch_tokens=batch_tokens)
        for name, which in sides.items()
    )
    pieces = Pieces(folder)
    frequencies = read(chosen, pieces)
    counted = np.stack([frequencies.tokens(site) > 0 for site in saes])
    if not counted.any():
        what = "no text to choose on has a token that counts: all are special, or excluded by the SAE's policy"
        raise UnweaveError(what, where=texts.source, remedy="give texts of words, or SAEs with another policy")
    kept = np.flatnonzero(texts.support(sides["chosen"]) >= match.support)
    matched = {
        site: best_pairs(lm, saes[site], frequencies, site, labels_of(texts, chosen, counted[i]).of(kept), match, seed)
        for i, site in enumerate(saes)
    }
    pairs = {site: [(pair.latent, int(kept[pair.label])) for pair in one.pairs] for site, one in matched.items()}
    seen = look(heldout, texts, pairs, pieces)
    sites = tuple(_site(heldout, texts, site, matched[site], kept, seen, match.prior, seed) for site in saes)
    return Labels(
        sites,
        Side(len(sides["chosen"]), chosen.store.n_tokens),
        Side(len(sides["heldout"]), heldout.store.n_tokens),
        len(sides["chosen"]) - int(counted.any(0).sum()),
        len(kept),
    )


def _refuse(lm: LM, saes: Mapping[Site, SAE], texts: TaggedTexts, match: MatchSpec, sides: Mapping[str, Array]) -> None:
    """Raises UnweaveError for what cannot be labelled, before the model runs."""
    for name, which in sides.items():
        if not len(which):
            remedy = f"give more texts, or another heldout{_alike(texts)}"
            raise UnweaveError(f"there are no texts {_SIDES[name]}", where=texts.source, remedy=remedy)
    support = texts.support(sides["chosen"])
    if not (support >= match.support).any():
        best = int(support.argmax())
        raise UnweaveError(
            f"no label has {match.support} of the {len(sides['chosen']):,} texts to choose on; "
            f"{texts.names[best]!r} has most, {support[best]}",
            where=texts.source,
            remedy="lower match.support, or give more texts",
        )
    for name, which in sides.items():
        own = texts.support(which)
        if not ((own > 0) & (own < len(which)))[support >= match.support].any():
            raise UnweaveError(
                f"no label parts the {len(which):,} texts {_SIDES[name]}: with support are only such that all of them "
                "have, or none",
                where=texts.source,
                remedy=f"give texts with the label and without{_alike(texts)}",
            )
    for site, sae in saes.items():
        sae.verify(lm)
        if match.output_score is not None and not writes_into_stream(lm, sae.write, sae.d_out):
            what = f"the SAE at {site} does not write into the residual stream, so its latents have no output score"
            raise UnweaveError(what, where="match.output_score", remedy="set match.output_score: null")


def _alike(texts: TaggedTexts) -> str:
    """What to add where a side lacks texts since near duplicates fall on the other."""
    if texts.alike < max(2, len(texts) / 2):
        return ""
    return f"; {texts.alike:,} of the {len(texts):,} are near duplicates (eight words in a row) and stay on one side"


def _identity(saes: Mapping[Site, SAE], texts: TaggedTexts, context: int) -> str:
    """Twelve digits over what is read by whom, so that one folder serves any settings of the matching."""
    drawn = [texts.folder.name, texts.rows.tolist(), np.packbits(texts.heldout).tolist()]
    return digest([*drawn, context, {str(site): sae.digest() for site, sae in saes.items()}])


def labels_of(texts: TaggedTexts, reading: Reading, counted: Array) -> TextLabels:
    """The labels of a reading's rows; ``counted`` bool [R]."""
    offsets, labels = texts.label_rows(reading.texts)
    return TextLabels(offsets, labels, len(texts.names), counted)


def best_pairs(
    lm: LM, sae: SAE, frequencies: Frequencies, site: Site, labels: TextLabels, match: MatchSpec, seed: int
) -> Matched:
    """The best pairs of one SAE; labels are those with enough support."""
    blocks = frequencies.blocks(site)
    scores = best_scores(blocks, sae.d_sae, labels, match.quantiles, match.prior)
    chance = best_scores(blocks, sae.d_sae, labels.shuffled(seed), match.quantiles, match.prior)
    pairs: list[Pair] = []
    output: dict[int, float] = {}
    taken, most = np.zeros(scores.score.shape[1], dtype=np.int64), match.per_label or match.top
    with task(f"output scores at {site}", total=match.top, unit="pairs") as shown:
        for some in _by_score(scores):
            some = [pair for pair in some if taken[pair[1]] < most]
            latents = sorted({latent for latent, _ in some} - set(output))
            if match.output_score is not None and latents:
                output |= {one.latent: one.score for one in output_scores(lm, sae, latents)}
            for latent, name in some:
                if taken[name] < most and (match.output_score is None or output[latent] >= match.output_score):
                    level = int(scores.level[latent, name])
                    pairs.append(Pair(latent, name, float(scores.score[latent, name]), level, output.get(latent)))
                    taken[name] += 1
                    shown.advance()
            if len(pairs) >= match.top or (taken >= most).all():
                break
    if not pairs:
        low = "their output scores are too low", "lower match.output_score, or give more texts"
        none = "none fires in a text that has one", "check that the SAE fits the texts, and its policy's exclusions"
        reason, remedy = low if (scores.score > 0).any() else none
        raise UnweaveError(f"no latent at {site} has a label: {reason}", where="match", remedy=remedy)
    firing, candidates = int((scores.firing > 0).sum()), int((scores.score > 0).sum())
    best = tuple(pairs[: match.top])
    return Matched(
        best, firing, candidates, len(output), float(chance.score.max()), frequencies.maxima(site), labels.support
    )


def _by_score(scores: Scores) -> Iterator[list[tuple[int, int]]]:
    """Pairs (latent, label) with a score above 0 from the best on, a few at a time; of equal ones the first first."""
    flat = scores.score.ravel()
    n, start = min(4096, len(flat)), 0
    while True:
        least = np.partition(flat, len(flat) - n)[len(flat) - n]
        places = np.flatnonzero(flat >= max(least, np.nextafter(np.float32(0), np.float32(1))))
        order = places[np.argsort(-flat[places], kind="stable")]
        for at in range(start, len(order), _TRIED_AT_ONCE):
            some = order[at : at + _TRIED_AT_ONCE]
            yield [divmod(int(place), scores.score.shape[1]) for place in some]
        if n == len(flat) or least <= 0:
            return
        start, n = len(order), min(16 * n, len(flat))


# -- results ----------------------------------------------------------------------------------------------------------


def _site(
    reading: Reading, texts: TaggedTexts, site: Site, matched: Matched, kept: Array, seen: HeldOut,
    prior: float | None, seed: int,
) -> SiteLabels:  # fmt: skip
    tests = [
        told(histogram, pair.level, prior, seed + i)
        for i, (pair, histogram) in enumerate(zip(matched.pairs, seen.histograms[site], strict=True))
    ]
    codes, where = seen.codes[site]
    sae, latents = reading.saes[site], seen.latents[site].tolist()
    records = build(reading.lm, sae, codes, where, reading.store, RecordsSpec(top=_PASSAGES, per_band=0, random=0),
                    latents=latents)  # fmt: skip
    pairs = tuple(
        _labelled(pair, texts.names[kept[pair.label]], one, texts, reading, records, matched, shown=i < _SHOWN)
        for i, (pair, one) in enumerate(zip(matched.pairs, tests, strict=True))
    )
    return SiteLabels(
        site=site,
        latents=sae.d_sae,
        firing=matched.firing,
        candidates=matched.candidates,
        tried=matched.tried,
        shuffled_best=max(matched.shuffled_best, 0.0),
        pairs=pairs,
        auroc=interval([one.auroc for one in tests], seed=seed),
        shuffled_auroc=interval([one.shuffled for one in tests], seed=seed),
    )


def _labelled(
    pair: Pair, name: str, test: Told, texts: TaggedTexts, reading: Reading, records: Records, matched: Matched,
    *, shown: bool,
) -> LabelledLatent:  # fmt: skip
    record = records.latent(pair.latent)
    passages = []
    for context in record.top if shown else ():
        parts = context.shown()
        number = int(reading.texts[reading.row_of(np.array([context.token]))[0]])
        has = name in {texts.names[label] for label in texts.labels(number)}
        peak = next(place for place, part in enumerate(parts) if part.focus)
        values = tuple(round(part.value, 3) for part in parts)
        passages.append(Passage(tuple(part.text for part in parts), values, peak, has))
    scored = ScoredLabel(
        label=name,
        threshold=threshold_of(pair.level),
        score=pair.score,
        support=int(matched.support[pair.label]),
        maximum=float(matched.maxima[pair.latent]),
        output_score=pair.output_score,
        auroc=test.auroc,
        auroc_low=test.low,
        auroc_high=test.high,
    )
    promoted = tuple(text for text, _ in record.promoted)
    return LabelledLatent(pair.latent, scored, test.positive, test.score, test.shuffled, promoted, tuple(passages))
