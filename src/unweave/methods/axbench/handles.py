"""What steers each pair, by every method: the labelled latents, random ones, and directions learnt from texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.progress import task
from unweave.core.site import Site
from unweave.latents.annotations import Pair, name_of
from unweave.lm.model import LM
from unweave.methods.axbench.directions import (
    Direction,
    ReftOptions,
    difference_of_means,
    linear_probe,
    passage_values,
    reft_r1,
    sae_of,
    token_activations,
)
from unweave.methods.axbench.generate import Handle
from unweave.methods.axbench.scores import Array
from unweave.methods.axbench.texts import ConceptTexts
from unweave.sae.edits import Mode, Where
from unweave.sae.module import SAE

LEARNT = ("diffmean", "probe", "reft")
_CANDIDATES = 16
"""random latents that are tried for each pair, until one fires"""


@dataclass(frozen=True, kw_only=True)
class Steering:
    """How latents steer. Learnt directions are always added, as in AxBench."""

    mode: Mode = "clamp"
    where: Where = "all"
    text_tokens: int = 128
    seed: int = 0
    reft: ReftOptions = field(default_factory=ReftOptions)


def find_handles(
    lm: LM, saes: Mapping[Site, SAE], pairs: Sequence[Pair], concepts: Mapping[str, ConceptTexts],
    sample: Sequence[str], methods: Sequence[str], how: Steering, pieces: Pieces,
) -> dict[str, list[Handle]]:  # fmt: skip
    """A handle for every pair, by method. Largest activations are taken over ``sample`` and the concepts' texts.

    Raises UnweaveError for a latent that never fires there, and where no random latent does.
    """
    candidates = {"sae": [[(saes[pair.site], pair.latent)] for pair in pairs]}
    if "random" in methods:
        candidates["random"] = _random(saes, pairs, how.seed)
    for method in LEARNT:
        if method in methods:
            found = _learnt(lm, saes, pairs, concepts, method, how, pieces)
            candidates[method] = [[one] for one in found]
    flat = [one for of_pairs in candidates.values() for several in of_pairs for one in several]
    texts = [*sample, *(text for one in concepts.values() for text in one.train_with)]
    largest = pieces.tensors("maxima", lambda: _largest(lm, flat, texts, how.text_tokens))["maxima"].tolist()
    handles: dict[str, list[Handle]] = {}
    for method, of_pairs in candidates.items():
        mode: Mode = "add" if method in LEARNT else how.mode
        handles[method] = []
        for pair, several in zip(pairs, of_pairs, strict=True):
            maxima, largest = largest[: len(several)], largest[len(several) :]
            alive = [(one, maximum) for one, maximum in zip(several, maxima, strict=True) if maximum > 0]
            if not alive:
                raise UnweaveError(
                    f"{method}: nothing for {name_of(pair.site, pair.latent)} ({pair.label.label}) is ever active",
                    where=f"{len(texts)} texts",
                    remedy="leave the pair out, or read more texts",
                )
            (sae, latent), maximum = alive[0]
            handles[method].append(Handle(sae, latent, maximum, mode, how.where))
    return handles


def _largest(lm: LM, latents: Sequence[tuple[SAE, int]], texts: Sequence[str], most: int) -> dict[str, Tensor]:
    _, largest = passage_values(lm, latents, texts, most)
    return {"maxima": torch.from_numpy(np.nan_to_num(np.nanmax(largest, 0)))}


def _random(saes: Mapping[Site, SAE], pairs: Sequence[Pair], seed: int) -> list[list[tuple[SAE, int]]]:
    """Random latents of each pair's own SAE, none of them labelled, and no two pairs alike."""
    drawn: dict[Site, Array] = {}
    for site in {pair.site for pair in pairs}:
        labelled = [pair.latent for pair in pairs if pair.site == site]
        free = np.setdiff1d(np.arange(saes[site].d_sae), labelled)
        each = min(_CANDIDATES, len(free) // len(labelled))
        if each < 1:
            raise UnweaveError(f"{site} has no {len(labelled)} latents beside the labelled ones", where="random")
        chosen = np.random.default_rng([seed, *str(site).encode()]).permutation(free)[: each * len(labelled)]
        drawn[site] = chosen.reshape(len(labelled), each)
    taken = dict.fromkeys(drawn, 0)
    several = []
    for pair in pairs:
        several.append([(saes[pair.site], int(j)) for j in drawn[pair.site][taken[pair.site]]])
        taken[pair.site] += 1
    return several


def _learnt(
    lm: LM, saes: Mapping[Site, SAE], pairs: Sequence[Pair], concepts: Mapping[str, ConceptTexts], method: str,
    how: Steering, pieces: Pieces,
) -> list[tuple[SAE, int]]:  # fmt: skip
    """A direction for each concept and site that occur together, as latents of one SAE per site."""
    wanted = list(dict.fromkeys((pair.site, pair.label.label) for pair in pairs))
    learnt: dict[Site, list[Direction]] = {}
    place: dict[tuple[Site, str], int] = {}
    with task(f"learn {method}", total=len(wanted), unit="concepts") as shown:
        for number, (site, concept) in enumerate(wanted):
            make = partial(_learn, lm, saes[site], concepts[concept], method, how)
            held = pieces.tensors(f"{method}-{number:04}", make)
            of_site = learnt.setdefault(site, [])
            place[site, concept] = len(of_site)
            of_site.append(Direction(held["w"].to(lm.device), float(held["b"]), method == "reft"))
            shown.advance()
    by_site = {site: sae_of(several, site, saes[site].policy) for site, several in learnt.items()}
    return [(by_site[pair.site], place[pair.site, pair.label.label]) for pair in pairs]


def _learn(lm: LM, sae: SAE, texts: ConceptTexts, method: str, how: Steering) -> dict[str, Tensor]:
    site, (documents, label) = sae.write, texts.train
    assert site is not None
    if method == "reft":
        one = reft_r1(lm, site, sae.policy, documents, label, most=how.text_tokens, options=how.reft)
    else:
        x, owner = token_activations(lm, site, sae.policy, documents, how.text_tokens)
        learn = difference_of_means if method == "diffmean" else linear_probe
        one = learn(x, torch.tensor(label, device=owner.device)[owner])
    return {"w": one.w, "b": torch.tensor(one.b, dtype=torch.float64)}
