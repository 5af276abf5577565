"""The parts of the study, each a finished piece of its run: SAEs pruned, measured, compared latent by latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.intervals import Array
from unweave.core.pieces import Pieces
from unweave.core.site import Site
from unweave.data.corpus import Document
from unweave.data.pack import PackSpec, pack
from unweave.data.policy import TokenPolicy
from unweave.data.stream import ActivationSource
from unweave.data.tokens import TokenStore
from unweave.latents import annotations
from unweave.lm.model import LM, Tokens
from unweave.methods.compress.saes import Norms, prune_sae
from unweave.methods.compress.transfer import effects
from unweave.methods.compress.transfer.result import ORIGINAL, RETRAINED, On, Steered, Told, pruned
from unweave.methods.compress.transfer.spec import ToldSpec
from unweave.methods.compress.transfer.survival import LEAST, Setting, compare
from unweave.sae.measure.evaluate import evaluate_all
from unweave.sae.measure.result import Metrics
from unweave.sae.module import SAE
from unweave.tasks.tagged.texts import TaggedTexts, open_tagged

_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Two:
    """The original model, the compressed one, and the forms of an SAE at each site; all of one policy."""

    lms: Mapping[On, LM]
    forms: Mapping[Site, Mapping[str, SAE]]
    """the original, pruned ones, and perhaps the retrained one"""
    pieces: Pieces

    @cached_property
    def settings(self) -> dict[Setting, SAE]:
        """Every form whose latents have the original's numbers in each model, but for the original in its own."""
        return {
            Setting(site, form, on): sae
            for site, forms in self.forms.items()
            for form, sae in forms.items()
            for on in self.lms
            if form != RETRAINED and (form, on) != (ORIGINAL, "original")
        }

    def metrics(self, site: Site, on: On, sweep: Mapping[str, SAE], batches: Sequence[Tokens]) -> dict[str, Metrics]:
        """Every form, and in the compressed model those of the sweep, on the same tokens."""
        saes = {**self.forms[site], **(sweep if on == "compressed" else {})}

        def measured() -> tuple[Metrics, ...]:
            return tuple(one.plain() for one in evaluate_all(self.lms[on], list(saes.values()), batches))

        values = self.pieces.value(f"metrics-{site}-{on}", tuple[Metrics, ...], measured)
        return dict(zip(saes, values, strict=True))

    def steered(self, site: Site, latents: Sequence[int], strengths: Tensor, seed: int) -> dict[Setting, Steered]:
        """What directions of latents do in every setting beside the original SAE in the original model."""
        settings = [key for key in self.settings if key.site == site]

        def made() -> tuple[Steered, ...]:
            def of(sae: SAE, on: On) -> tuple[Tensor, Tensor]:
                assert sae.write is not None
                return effects.changes(self.lms[on], sae.write, effects.pushes(sae, latents, strengths, seed))

            before = of(self.forms[site][ORIGINAL], "original")
            return tuple(effects.steered(before, of(self.settings[key], key.on)) for key in settings)

        return dict(zip(settings, self.pieces.value(f"steered-{site}", tuple[Steered, ...], made), strict=True))

    def told(self, spec: ToldSpec, batch_tokens: int, seed: int) -> dict[Setting, Told]:
        """How well the latents that have labels tell them in every setting; sites without any are left out."""
        sites = list(self.forms)
        said = annotations.load(spec.labels, sites)
        annotations.refuse_strangers(
            said, {site: forms[ORIGINAL].digest() for site, forms in self.forms.items()}, str(spec.labels)
        )
        texts = open_tagged(spec.texts)
        number = {name: i for i, name in enumerate(texts.names)}
        pairs: dict[Site, list[tuple[int, int]]] = {}
        for pair in annotations.pairs(said):
            if pair.site in self.forms and pair.label.label in number:
                pairs.setdefault(pair.site, []).append((pair.latent, number[pair.label.label]))
        if not pairs:
            raise UnweaveError("no latent of these SAEs has a label that the texts have", where=str(spec.labels),
                               remedy="give labels.jsonl of unweave labels on the same SAEs and texts")  # fmt: skip
        assert self.pieces.folder is not None
        folder = self.pieces.folder / "told-texts"
        store, which = _tokenised(texts, self.lms["original"], spec.context, folder)
        wanted = np.unique([label for some in pairs.values() for _, label in some])
        offsets, labels = texts.label_rows(which[np.asarray(store.documents)])
        inside = np.isin(labels, wanted)
        has = np.zeros((store.n_rows, len(wanted)), dtype=bool)
        row = np.repeat(np.arange(store.n_rows), np.diff(offsets))
        has[row[inside], np.searchsorted(wanted, labels[inside])] = True
        of = {site: has[:, np.searchsorted(wanted, [label for _, label in some])] for site, some in pairs.items()}
        shares = {on: self._shares(on, store, pairs, batch_tokens) for on in self.lms}
        return {
            key: effects.told(shares[key.on][str(key)], shares["original"][f"{key.site}/{ORIGINAL}/original"],
                              of[key.site], seed)
            for key in self.settings if key.site in pairs
        }  # fmt: skip

    def _shares(
        self, on: On, store: TokenStore, pairs: Mapping[Site, Sequence[tuple[int, int]]], batch_tokens: int
    ) -> dict[str, Array]:
        saes = {
            str(Setting(site, form, on)): (site, sae)
            for site in pairs
            for form, sae in self.forms[site].items()
            if form != RETRAINED
        }
        source = ActivationSource(self.lms[on], store, list(pairs), batch_tokens=batch_tokens)
        latents = {site: sorted({latent for latent, _ in some}) for site, some in pairs.items()}

        def made() -> dict[str, Tensor]:
            found = effects.firing_shares(source, saes, latents)
            return {name: torch.from_numpy(values) for name, values in found.items()}

        held = self.pieces.tensors(f"told-{on}", made)
        return {
            name: held[name].numpy()[:, np.searchsorted(latents[site], [latent for latent, _ in pairs[site]])]
            for name, (site, _) in saes.items()
        }


def _tokenised(texts: TaggedTexts, lm: LM, context: int, folder: Path) -> tuple[TokenStore, Array]:
    """The held-out texts as rows of tokens in a folder, and which of all texts they are."""
    which = np.flatnonzero(texts.heldout)
    if not (folder / "meta.json").exists():
        documents = (Document(texts.text(int(i)), None, texts.source, int(i)) for i in which)
        rows = pack(documents, lm.tokenizer, PackSpec(context=context, min_tokens=1))
        TokenStore.write(folder, rows, None, {}, unit="documents")
    return TokenStore.open(folder), which


def latents_of(
    two: Two, store: TokenStore, settings: Mapping[Setting, SAE], name: str, batch_tokens: int
) -> dict[str, Tensor]:
    """``survival.compare`` over a store; the original model's activations are kept for the next compressed one."""
    saes = {site: forms[ORIGINAL] for site, forms in two.forms.items()}
    assert two.pieces.folder is not None
    caches = {"original": two.pieces.folder / "activations", "compressed": None}
    sources = [
        ActivationSource(lm, store, list(saes), chunk_tokens=_CHUNK_TOKENS, batch_tokens=batch_tokens, cache=caches[on])
        for on, lm in two.lms.items()
    ]
    return two.pieces.tensors(f"latents-{name}", lambda: compare(sources[0], sources[1], saes, settings))


def pruned_forms(sae: SAE, shares: Sequence[float], norms: Norms | None) -> dict[str, SAE]:
    """An SAE with each share of its weights taken out, by name; by magnitude without norms."""
    return {pruned(share): prune_sae(sae, share, norms) for share in shares}


def forms_of(
    saes: Mapping[Site, SAE], retrained: Mapping[Site, SAE], shares: Sequence[float], norms: Mapping[Site, Norms]
) -> dict[Site, dict[str, SAE]]:
    """Each site's original SAE, pruned ones, and the retrained one where there is one, all with one policy."""
    forms: dict[Site, dict[str, SAE]] = {}
    for site, sae in saes.items():
        new = {RETRAINED: retrained[site]} if site in retrained else {}
        policy = TokenPolicy.common(one.policy for one in (sae, *new.values()))
        for one in (sae, *new.values()):
            one.policy = policy
        forms[site] = {ORIGINAL: sae, **pruned_forms(sae, shares, norms.get(site)), **new}
    return forms


def sample(table: Tensor, n: int, seed: int) -> list[int]:
    """So many latents that fire often enough, at random, ascending."""
    firing = (table[5] >= LEAST).nonzero().flatten().cpu().numpy()
    return sorted(np.random.default_rng(seed).permutation(firing)[:n].tolist())
