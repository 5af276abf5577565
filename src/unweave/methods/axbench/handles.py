"""What steers each pair, by every method: the labelled latents, random ones, and directions learnt from texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.progress import say, task
from unweave.core.site import Site
from unweave.data.policy import TokenPolicy
from unweave.latents.annotations import name_of
from unweave.lm.model import LM
from unweave.methods.axbench import directions
from unweave.methods.axbench.directions import Direction
from unweave.methods.axbench.generate import Handle, Setting
from unweave.methods.axbench.spec import LearningSpec, SteeringSpec
from unweave.methods.axbench.texts import ConceptTexts
from unweave.sae.edits import Mode
from unweave.sae.module import SAE

LEARNT = ("diffmean", "probe", "reft")
_CANDIDATES = 16
"""random latents that are tried for each pair, until one fires"""


def find_handles(
    setting: Setting, sample: Sequence[str], methods: Sequence[str], steering: SteeringSpec, learning: LearningSpec,
    pieces: Pieces,
) -> dict[str, list[Handle]]:  # fmt: skip
    """A handle for every pair, by method. Largest activations are taken over ``sample`` and the concepts' texts. Learnt
    directions are always added, as in AxBench.

    A labelled latent that never fires there has the largest activation that its label came with; a direction that is
    never active adds nothing. Raises UnweaveError where no random latent fires.
    """
    candidates = {"sae": [[(setting.saes[pair.site], pair.latent)] for pair in setting.pairs]}
    if "random" in methods:
        candidates["random"] = _random(setting)
    for method in [method for method in LEARNT if method in methods]:
        candidates[method] = [[latent] for latent in _learnt(setting, method, learning, pieces)]
    flat = [latent for of_pairs in candidates.values() for several in of_pairs for latent in several]
    texts = [*sample, *(text for one in setting.concepts.values() for text in one.train_with)]
    largest = pieces.tensors("maxima", lambda: _largest(setting.lm, flat, texts, learning.tokens))["maxima"]
    maxima = iter(largest.tolist())
    handles: dict[str, list[Handle]] = {method: [] for method in candidates}
    for method, of_pairs in candidates.items():
        mode: Mode = "add" if method in LEARNT else steering.mode
        for pair, several in zip(setting.pairs, of_pairs, strict=True):
            alive = [(latent, most) for latent, most in zip(several, maxima) if most > 0]  # noqa: B905 (one iterator)
            if not alive and method == "sae" and pair.label.maximum > 0:
                alive = [(several[0], pair.label.maximum)]  # as on the texts that labelled it
            if not alive and method in LEARNT:
                name = name_of(pair.site, pair.latent)
                say(f"{method} for {name} ({pair.label.label}) is never active: it adds nothing")
                alive = [(several[0], 0.0)]
            if not alive:
                what = f"{method}: nothing for {name_of(pair.site, pair.latent)} ({pair.label.label}) is ever active"
                raise UnweaveError(what, where=f"{len(texts)} texts", remedy="leave the pair out, or read more texts")
            (sae, latent), maximum = alive[0]
            handles[method].append(Handle(sae, latent, maximum, mode, steering.where))
    return handles


def _largest(lm: LM, latents: Sequence[tuple[SAE, int]], texts: Sequence[str], most: int) -> dict[str, Tensor]:
    with task("largest activations", total=len(texts), unit="texts") as shown:
        _, largest = directions.passage_values(lm, latents, texts, most, shown)
    return {"maxima": torch.from_numpy(np.nan_to_num(np.nanmax(largest, 0)))}


def _random(setting: Setting) -> list[list[tuple[SAE, int]]]:
    """Random latents of each pair's own SAE, none of them labelled, and no two pairs alike."""
    drawn: dict[Site, list[int]] = {}
    for site in dict.fromkeys(pair.site for pair in setting.pairs):
        free = set(range(setting.saes[site].d_sae)) - {pair.latent for pair in setting.pairs if pair.site == site}
        drawn[site] = np.random.default_rng([setting.seed, *str(site).encode()]).permutation(sorted(free)).tolist()
    several = []
    for number, pair in enumerate(setting.pairs):
        left = sum(other.site == pair.site for other in setting.pairs[number:])
        each = min(_CANDIDATES, len(drawn[pair.site]) // left)
        if each < 1:
            raise UnweaveError("there are too few latents beside the labelled ones", where=f"random, at {pair.site}")
        several.append([(setting.saes[pair.site], drawn[pair.site].pop()) for _ in range(each)])
    return several


def _learnt(setting: Setting, method: str, learning: LearningSpec, pieces: Pieces) -> list[tuple[SAE, int]]:
    """A direction for each concept and SAE that occur together, learnt, read and added where that SAE writes."""
    saes, wanted = setting.saes, list(dict.fromkeys((pair.site, pair.label.label) for pair in setting.pairs))
    learnt: dict[Site, dict[str, Direction]] = {site: {} for site, _ in wanted}
    with task(f"learn {method}", total=len(wanted), unit="concepts") as shown:
        for number, (site, concept) in enumerate(wanted):
            make = partial(_learn, setting, saes[site], setting.concepts[concept], method, learning)
            held = pieces.tensors(f"{method}-{number:04}", make)
            learnt[site][concept] = Direction(held["w"].to(setting.lm.device), float(held["b"]), method == "reft")
            shown.advance()
    by_site = {site: directions.sae_of(list(several.values()), *_place(saes[site])) for site, several in learnt.items()}
    return [(by_site[pair.site], list(learnt[pair.site]).index(pair.label.label)) for pair in setting.pairs]


def _learn(setting: Setting, sae: SAE, texts: ConceptTexts, method: str, learning: LearningSpec) -> dict[str, Tensor]:
    lm, (site, policy), (documents, label), most = setting.lm, _place(sae), texts.train, learning.tokens
    if method == "reft":
        one = directions.reft_r1(
            lm, site, policy, documents, label, most=most, options=learning.reft, seed=setting.seed
        )
    else:
        x, owner = directions.token_activations(lm, site, policy, documents, most)
        learn = directions.difference_of_means if method == "diffmean" else directions.linear_probe
        one = learn(x, torch.tensor(label, device=owner.device)[owner])
    return {"w": one.w, "b": torch.tensor(one.b, dtype=torch.float64)}


def _place(sae: SAE) -> tuple[Site, TokenPolicy]:
    """Where an SAE writes, and which tokens count there: a largest norm is of what it reads."""
    assert sae.write is not None
    return sae.write, sae.policy if sae.read == sae.write else replace(sae.policy, max_norm=None)
