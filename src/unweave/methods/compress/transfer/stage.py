"""The study of SAEs on compressed models: opens them, has every part measured, and puts the parts together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unweave.core.errors import UnweaveError
from unweave.core.intervals import Array
from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.core.writing import atomic_write
from unweave.data.batches import store_batches
from unweave.data.tokens import TokenStore
from unweave.inputs.identity import texts_of
from unweave.inputs.inputs import data_of, token_store
from unweave.inputs.saes import Opened, open_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.lm.model import LM, Tokens
from unweave.methods.compress.measure import compare, row_losses
from unweave.methods.compress.saes import Norms, check_saes, norms_of
from unweave.methods.compress.transfer import damage
from unweave.methods.compress.transfer.result import ORIGINAL, Cell, Compression, Damage, On, Transfer, pruned
from unweave.methods.compress.transfer.spec import TransferSpec
from unweave.methods.compress.transfer.study import Two, forms_of, latents_of, pruned_forms, sample
from unweave.methods.compress.transfer.survival import Setting, correlations, survival
from unweave.sae.module import SAE

LATENTS = "survival.parquet"
_WHY = "what becomes of it in a compressed model is what is asked"


@dataclass(frozen=True)
class _Damaged:
    """A compression, with the sums of every latent."""

    about: Compression
    tables: Mapping[str, Tensor]

    def damage(self, site: Site) -> Array:
        return damage.damages(self.own(site), self.tokens(site))

    def own(self, site: Site) -> Tensor:
        """Of the original SAE."""
        return self.tables[str(Setting(site, ORIGINAL, "compressed"))]

    def tokens(self, site: Site) -> int:
        return int(self.tables[str(site)][2])


def _also(spec: TransferSpec, handle: object) -> dict[str, str]:
    del handle
    return texts_of(OfSAEsSpec(saes=spec.saes, model=spec.model), spec.data)


@stage("compress-transfer", version=1, also=_also)
def run(spec: TransferSpec, ctx: Context) -> Transfer:
    """Every form of the SAEs in the first compressed model, the damage by all, and a table of latents."""
    opened = open_saes(OfSAEsSpec(saes=spec.saes, model=spec.model, device=spec.device))
    _check(spec, opened)
    data = data_of(next(iter(opened.saes.values())), spec.data)
    for name in spec.compressed[1:]:
        _compressed(spec, opened, name)  # what cannot be opened is refused now, not after the first model's work
    first, accepted = _compressed(spec, opened, spec.compressed[0])
    retrained = _retrained(spec, opened, first)
    store, _ = token_store(opened.lm, opened.model, data, "heldout", spec.tokens, ctx.runs)
    norms: Mapping[Site, Norms] = {}
    if spec.pruning.method == "wanda" and (spec.pruning.shares or spec.pruning.sweep):
        train, _ = token_store(opened.lm, opened.model, data, "train", spec.pruning.tokens, ctx.runs)
        batches = store_batches(first, train, range(train.n_rows), spec.batch_tokens, spread=1)
        norms = norms_of(first, opened.saes, batches)
    forms = forms_of(opened.saes, retrained, spec.pruning.shares, norms)
    two = Two({"original": opened.lm, "compressed": first}, forms, ctx.pieces)
    damaged = [_damaged(spec, two, store, 0, [])]
    cells = tuple(_cells(spec, two, store, damaged[0], norms))
    for place, name in enumerate(spec.compressed[1:], 1):
        lm, _ = _compressed(spec, opened, name)
        both: dict[On, LM] = {"original": opened.lm, "compressed": lm}
        damaged.append(_damaged(spec, replace(two, lms=both), store, place, [one.about.words for one in damaged]))
    _write_latents(ctx.path / LATENTS, two, damaged)
    by_site = {site: {one.about.words: one.damage(site) for one in damaged} for site in forms}
    main = damaged[0]
    known = {site: damage.features(forms[site][ORIGINAL], main.own(site), main.tokens(site)) for site in forms}
    predictors = (damage.predictor(site, known[site], by, spec.seed) for site, by in by_site.items())
    return Transfer(
        subject=replace(opened.subject, accepted=accepted),
        tokens=store.n_tokens,
        cells=cells,
        compressions=tuple(one.about for one in damaged),
        overlaps=tuple(one for site, by in by_site.items() for one in damage.overlaps(site, by)),
        predictors=tuple(one for one in predictors if one is not None),
        latents=Path(LATENTS),
    )


# -- opening ----------------------------------------------------------------------------------------------------------


def _check(spec: TransferSpec, opened: Opened) -> None:
    """Refuses what cannot be compared, before any work."""
    check_saes(opened.saes)
    for site, sae in opened.saes.items():
        if sae.is_transcoder:
            raise UnweaveError("only SAEs that write where they read are followed into compressed models",
                               where=str(site), remedy="leave transcoders out")  # fmt: skip
        if sae.input_norm is not None and spec.steer:
            raise UnweaveError(f"the SAE normalises every token ({sae.input_norm}), so its directions have no length",
                               where=str(site), remedy="leave steering out (steer 0)")  # fmt: skip


def _compressed(spec: TransferSpec, opened: Opened, name: str) -> tuple[LM, dict[str, object]]:
    """A compressed model in which the SAEs may be used, and by how much it differs at each site."""
    dtype = str(opened.lm.dtype).removeprefix("torch.")
    lm = LM.load(name, dtype=dtype, device=spec.device)
    if lm.tokenizer_fingerprint() != opened.lm.tokenizer_fingerprint():
        raise UnweaveError("this model has another tokenizer than the original one", where=name,
                           remedy="give a compressed form of the same model")  # fmt: skip
    return lm, {str(site): sae.accept(lm, _WHY) for site, sae in opened.saes.items()}


def _retrained(spec: TransferSpec, opened: Opened, first: LM) -> dict[Site, SAE]:
    """The retrained SAEs, which may be used in the original model too."""
    if not spec.retrained:
        return {}
    asked = OfSAEsSpec(saes=spec.retrained, model=spec.compressed[0], device=spec.device)
    saes = open_saes(asked, first).saes
    if strangers := set(saes) - set(opened.saes):
        raise UnweaveError(f"there is no original SAE at {min(strangers)}", where="retrained",
                           remedy="retrain at the sites of saes")  # fmt: skip
    for sae in saes.values():
        sae.accept(opened.lm, _WHY)
    return saes


# -- parts ------------------------------------------------------------------------------------------------------------


def _loss_batches(spec: TransferSpec, lm: LM, store: TokenStore) -> list[Tokens]:
    rows = range(max(1, int((store.starts[1:] <= spec.loss_tokens).sum())))
    return store_batches(lm, store, rows, spec.batch_tokens)


def _damaged(spec: TransferSpec, two: Two, store: TokenStore, place: int, taken: Sequence[str]) -> _Damaged:
    """What a compressed model loses, and its latents beside the original's; of the first in every form."""
    own = {key: sae for key, sae in two.settings.items() if not place or (key.form, key.on) == (ORIGINAL, "compressed")}
    tables = latents_of(two, store, own, str(place), spec.batch_tokens)
    losses = []
    for on, lm in two.lms.items():
        name = "loss" if on == "original" else f"loss-{place}"
        make = lambda lm=lm: {"rows": torch.from_numpy(row_losses(lm, _loss_batches(spec, lm, store)))}  # noqa: E731
        losses.append(two.pieces.tensors(name, make)["rows"].numpy())
    lm, sites = two.lms["compressed"], []
    for site in two.forms:
        before, after, n = tables[str(site)].tolist()
        sites.append(Damage(site, survival(tables[str(Setting(site, ORIGINAL, "compressed"))], int(n)), after, before))
    words = lm.note or lm.name
    words = f"{words} ({spec.compressed[place]})" if words in taken else words
    return _Damaged(Compression(lm.name, words, compare(*losses), tuple(sites)), tables)


def _cells(
    spec: TransferSpec, two: Two, store: TokenStore, damaged: _Damaged, norms: Mapping[Site, Norms]
) -> Iterator[Cell]:
    """Every form of every site in the two models."""
    told = {} if spec.told is None else two.told(spec.told, spec.batch_tokens, spec.seed)
    shares = {pruned(share): share for share in (*spec.pruning.shares, *spec.pruning.sweep)}
    for site, forms in two.forms.items():
        sae, n = forms[ORIGINAL], damaged.tokens(site)
        sweep = pruned_forms(sae, spec.pruning.sweep, norms.get(site))
        own = damaged.own(site)
        latents = sample(own, spec.steer, spec.seed)
        steered = two.steered(site, latents, own[7][latents].to(sae.W_dec.device), spec.seed) if latents else {}
        for on, lm in two.lms.items():
            batches = _loss_batches(spec, lm, store)
            for form, metrics in two.metrics(site, on, sweep, batches).items():
                key = Setting(site, form, on)
                table = damaged.tables.get(str(key))
                yield Cell(
                    site=site, form=form, sparsity=shares.get(form), on=on, metrics=metrics,
                    survival=None if table is None else survival(table, n),
                    told=told.get(key), steered=steered.get(key),
                )  # fmt: skip


def _write_latents(path: Path, two: Two, damaged: list[_Damaged]) -> None:
    """A row for each latent: its rate before, its correlation in each setting and by each further compression."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for site in two.forms:
        own, n = damaged[0].own(site), damaged[0].tokens(site)
        columns = {"site": [str(site)] * own.shape[1], "latent": range(own.shape[1]), "rate": (own[5] / n).tolist()}
        for key in (key for key in two.settings if key.site == site):
            columns[f"{key.form}, {key.on}"] = correlations(damaged[0].tables[str(key)], n)
        for one in damaged[1:]:
            columns[one.about.words] = correlations(one.own(site), one.tokens(site))
        tables.append(pa.table(columns))
    with atomic_write(path) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)
