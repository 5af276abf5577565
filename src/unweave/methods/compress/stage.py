"""Compressing a model, or SAEs, and measuring both before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.core.writing import friendly_io, write_json
from unweave.data.batches import store_batches
from unweave.data.spec import DEFAULT_MODEL
from unweave.inputs.inputs import token_store
from unweave.inputs.saes import Opened, open_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.inputs.subject import Subject
from unweave.lm.model import LM, Tokens
from unweave.lm.projections import projections
from unweave.lm.sources import quiet
from unweave.methods.compress import saes as of_saes
from unweave.methods.compress.calibrate import Order
from unweave.methods.compress.masks import Pattern
from unweave.methods.compress.measure import compare, row_losses
from unweave.methods.compress.models import Method, check_method, compress_model, pruning, ranking, rounding
from unweave.methods.compress.result import Compressed, SAEChange
from unweave.methods.compress.spec import CompressSpec, LowRankSpec, PruneSpec, QuantiseSpec
from unweave.sae.formats import quantised
from unweave.sae.measure.evaluate import evaluate
from unweave.sae.module import SAE


@stage("compress-prune", version=1)
def prune(spec: PruneSpec, ctx: Context) -> Compressed:
    """Zeros in a model's projections, or in SAEs."""
    share = spec.sparsity if spec.pattern is None else Pattern.parse(spec.pattern)
    if not spec.saes:
        return _model(spec, ctx, pruning(spec.method, share), spec.order)

    def change(opened: Opened) -> dict[Site, SAE]:
        lm, saes = opened.lm, opened.saes
        of_saes.check_saes(saes, share)
        wanda = spec.method == "wanda"
        norms = of_saes.norms_of(lm, saes, _calibration(spec, ctx, lm, opened.model)) if wanda else {}
        return {site: of_saes.prune_sae(sae, share, norms.get(site)) for site, sae in saes.items()}

    plain = _SAEWork(pruning(spec.method, share).words, change, lambda sae, folder: sae.save(folder))
    return _saes(spec, ctx, plain, spec.data.tokens if spec.method == "wanda" else 0)


@stage("compress-quantise", version=1)
def quantise(spec: QuantiseSpec, ctx: Context) -> Compressed:
    """Rounded weights in a model's projections, or in SAEs."""
    method = rounding(spec.bits, spec.group)
    if not spec.saes:
        return _model(spec, ctx, method, "blocks")

    def change(opened: Opened) -> dict[Site, SAE]:
        of_saes.check_saes(opened.saes, group=spec.group)
        return {site: of_saes.round_sae(sae, spec.bits, spec.group) for site, sae in opened.saes.items()}

    def save(sae: SAE, folder: Path) -> Path:
        return quantised.save(sae, folder, spec.bits, spec.group)

    return _saes(spec, ctx, _SAEWork(method.words, change, save, (spec.bits, spec.group)), 0)


@stage("compress-lowrank", version=1)
def low_rank(spec: LowRankSpec, ctx: Context) -> Compressed:
    """Projections of low rank."""
    return _model(spec, ctx, ranking(spec.share, aware=spec.method == "activations"), spec.order)


def _calibration(spec: CompressSpec, ctx: Context, lm: LM, model: str) -> list[Tokens]:
    store, _ = token_store(lm, model, spec.data, "train", spec.data.tokens, ctx.runs)
    return store_batches(lm, store, range(store.n_rows), spec.batch_tokens, spread=1)


def _heldout(spec: CompressSpec, ctx: Context, lm: LM, model: str) -> list[Tokens]:
    store, _ = token_store(lm, model, spec.data, "heldout", None, ctx.runs)
    return store_batches(lm, store, range(store.n_rows), spec.batch_tokens)


def _model(spec: CompressSpec, ctx: Context, method: Method, order: Order) -> Compressed:
    model = spec.model or DEFAULT_MODEL
    lm = LM.load(model, device=spec.device)  # a copy of its own: stages share what ``load_lm`` gives
    chosen = projections(lm, spec.projections)
    check_method(method, chosen, spec.data.tokens)
    calibration = _calibration(spec, ctx, lm, model) if method.needs != "nothing" else []
    heldout = _heldout(spec, ctx, lm, model)
    before = row_losses(lm, heldout)
    tensors = compress_model(lm, chosen, method, calibration, order)
    loss = compare(before, row_losses(lm, heldout))
    folder = ctx.path / "model"
    with friendly_io(folder), quiet():
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    write_json(folder / "unweave.json", {"note": "; ".join(filter(None, [lm.note, method.words]))})
    return Compressed(
        subject=Subject(lm.name, lm.note, (), {}),
        method=method.words,
        calibration=sum(batch.n_tokens for batch in calibration),
        tensors=tensors,
        parameters=sum(parameter.numel() for parameter in lm.model.parameters()),
        loss=loss,
        saes=(),
        folder=Path("model"),
    )


@dataclass(frozen=True)
class _SAEWork:
    words: str
    change: Callable[[Opened], dict[Site, SAE]]
    save: Callable[[SAE, Path], Path]
    grid: tuple[int, int] | None = None
    """bits and group"""


def _saes(spec: CompressSpec, ctx: Context, work: _SAEWork, calibration: int) -> Compressed:
    opened = open_saes(
        OfSAEsSpec(saes=spec.saes, model=spec.model, device=spec.device, accept_mismatch=spec.accept_mismatch)
    )
    lm, changes = opened.lm, []
    after = work.change(opened)
    heldout = _heldout(spec, ctx, lm, opened.model)
    for site, old in opened.saes.items():
        new, folder = after[site], Path("sae") / str(site)
        before, reached = (evaluate(lm, sae, heldout).plain() for sae in (old, new))
        losses = [row_losses(lm, heldout, sae.reconstruct()) for sae in (old, new)]
        work.save(new, ctx.path / folder)
        tensors, lost = of_saes.changes_of(old, new, work.grid), of_saes.silenced(old, new)
        changes.append(SAEChange(site, tensors, lost, before, reached, compare(*losses), folder))
    return Compressed(opened.subject, work.words, calibration, (), 0, None, tuple(changes), None)
