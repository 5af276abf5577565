"""Choosing among candidates, and drawing controls.

1. Whoever judges gives every candidate a relevance, from a query or a label, or says yes or no. None: nothing is known.
2. Of those that pass, of the sites and sign asked for, the strongest are taken.
3. A control is as many of the other candidates, drawn without replacement (the paper's random ablation, which sometimes
   does as well); or at each site as many random orthonormal directions as the chosen ones span.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.site import Site
from unweave.latents.annotations import Annotation
from unweave.latents.latent_record import LatentRecord
from unweave.methods.finetune.attribute.attribute import Sign
from unweave.methods.finetune.attribute.result import Candidate

Key = tuple[Site, int]
_FIRED, _PROMOTED = 8, 6


class Verdict(NamedTuple):
    """What a judge says of a candidate: its relevance, where it has one, whether that is enough, and why."""

    relevance: float | None
    passes: bool
    why: str


def by_rule(candidates: Sequence[Candidate]) -> dict[Key, Verdict]:
    """Every candidate, with its rank."""
    n = len(candidates)
    return {one.key: Verdict(None, True, f"rank {i} of {n}") for i, one in enumerate(candidates, 1)}


def by_relevance(relevance: Mapping[Key, float], words: Mapping[Key, str], at_least: float) -> dict[Key, Verdict]:
    """Those whose relevance to a query is enough."""
    return {key: Verdict(value, value >= at_least, f"{words[key]} ({value:.2f})") for key, value in relevance.items()}


def by_label(said: Mapping[Key, Annotation], patterns: Sequence[str], auroc: float) -> dict[Key, Verdict]:
    """Those with a label of such a name that holds on texts held out; of several the one that holds best."""
    verdicts = {}
    for key, one in said.items():
        named = [label for label in one.labels if any(fnmatchcase(label.label, pattern) for pattern in patterns)]
        best = max(named, key=lambda label: -1.0 if label.auroc is None else label.auroc, default=None)
        if best is not None:
            value = best.auroc
            shown = "no held-out AUROC" if value is None else f"AUROC {value:.2f}"
            verdicts[key] = Verdict(value, value is not None and value >= auroc, f"{best.label}, {shown}")
    return verdicts


def by_annotation(said: Mapping[Key, Annotation]) -> dict[Key, Verdict]:
    """Those that somebody marked as relevant."""
    return {
        key: Verdict(None, bool(one.relevant), one.annotation or "marked as relevant")
        for key, one in said.items()
        if one.relevant is not None
    }


def choose(
    candidates: Sequence[Candidate],
    verdicts: Mapping[Key, Verdict],
    *,
    top: int | None = None,
    sign: Sign = "either",
    sites: Sequence[str] = (),
) -> list[Candidate]:
    """The ``top`` strongest of those that pass, and are of this sign and these sites (patterns). UnweaveError, with the
    best that was refused, where there is none."""
    eligible = [
        one
        for one in candidates
        if (sign == "either" or (one.score > 0) == (sign == "positive"))
        and (not sites or any(fnmatchcase(str(one.site), pattern) for pattern in sites))
    ]
    if not eligible:
        there = ", ".join(map(str, sorted({one.site for one in candidates})))
        what = f"no candidate is of the sites {', '.join(sites) or '*'} and sign {sign}"
        raise UnweaveError(what, where="sites, sign", remedy=f"there are: {there}")
    judged = [(verdicts[one.key], one) for one in eligible if one.key in verdicts]
    if passing := [one for verdict, one in judged if verdict.passes]:
        return passing[:top]
    rated = [(verdict.relevance, one) for verdict, one in judged if verdict.relevance is not None]
    if not rated:
        what = f"nothing is selected: nothing speaks for any of {len(eligible)} candidates"
        raise UnweaveError(what, remedy="give a file of annotations that has these latents, or choose by another way")
    value, best = max(rated, key=lambda pair: (pair[0], abs(pair[1].score)))
    raise UnweaveError(
        f"nothing is selected: the best candidate, {best.name}, has {value:.3f} ({verdicts[best.key].why}); "
        f"{len(rated)} of {len(eligible)} candidates could be judged",
        remedy=f"ask for at least {value:.2f} or less, or ask for something else",
    )


def draws(candidates: Sequence[Candidate], chosen: Sequence[Candidate], n: int, seed: int = 0) -> list[list[Candidate]]:
    """``n`` controls: each as many candidates as were chosen, none of them chosen. UnweaveError for too few."""
    others = [one for one in candidates if one not in chosen]
    if n and len(others) < len(chosen):
        what = f"{len(chosen)} of {len(candidates)} candidates are chosen, and only {len(others)} are left for controls"
        remedy = "choose fewer, attribute more candidates (--top), or go without (--controls.random 0)"
        raise UnweaveError(what, where="controls.random", remedy=remedy)
    return [random.Random(f"{seed} {draw}").sample(others, len(chosen)) for draw in range(n)]


def random_directions(sizes: Mapping[Site, tuple[int, int]], seed: int) -> dict[Site, Tensor]:
    """Orthonormal rows [r, D] at each site, of (r, D), uniformly distributed."""
    rows = {}
    for place, (site, (rank, width)) in enumerate(sorted(sizes.items())):
        g = torch.Generator().manual_seed(1_000_003 * seed + place)
        q, r = torch.linalg.qr(torch.randn(width, rank, generator=g, dtype=torch.float64))
        rows[site] = (q * r.diagonal().sign()).T.float().contiguous()
    return rows


def described(record: LatentRecord) -> str:
    """In words, without a judge, on which tokens a latent fires most strongly and which it promotes; empty where it
    never fires."""
    fired = dict.fromkeys(context.texts[context.focus].strip() for context in (*record.top, *record.quantile))
    promoted = [text.strip() for text, _ in record.promoted]
    parts = [", ".join([text for text in fired if text][:_FIRED]), ", ".join([t for t in promoted if t][:_PROMOTED])]
    if not parts[0]:
        return ""
    return parts[0] + (f"; promotes {parts[1]}" if parts[1] else "")
