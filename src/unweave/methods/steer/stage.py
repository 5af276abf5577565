"""Text with latents changed, at several strengths, beside the unchanged model's."""

from __future__ import annotations

from collections.abc import Sequence

from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.inputs.saes import Opened, open_one, open_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.latents import stage as latents
from unweave.latents.annotations import name_of
from unweave.latents.records import Records
from unweave.latents.spec import LatentsSpec
from unweave.methods.steer.changes import OpenedEdit, open_edits
from unweave.methods.steer.choice import choose_latents
from unweave.methods.steer.result import Candidate, Edited, Sample, Steering
from unweave.methods.steer.spec import EditSpec, SteerSpec
from unweave.sae.output_score import NEUTRAL, output_scores
from unweave.sae.steered import confidence_changes, lens_tokens, side_by_side


@stage("steer", version=6)
def run(spec: SteerSpec, ctx: Context) -> Steering:
    """Chooses a latent by what it does where none is named, and steers every prompt at every strength."""
    opened, main = _opened(spec)
    lm, saes = opened.lm, opened.saes
    asked = spec.edits or (_edit(spec, main, spec.latent or 0),)
    named = open_edits(lm, asked, saes, lambda site, latent: 1.0)  # refuses before records are collected
    records = _records(spec, opened, main, named, ctx)
    candidates: list[Candidate] = []
    if not spec.edits and spec.latent is None:
        candidates = choose_latents(lm, saes[main], records[main])
        asked = (_edit(spec, main, candidates[0].latent),)
    edits = open_edits(lm, asked, saes, lambda site, latent: records[site].latent(latent).maximum)
    site, sae, latent = edits[0].site, edits[0].sae, edits[0].latent
    record = records[site].latent(latent)
    label, score, input_score = tuple(candidates[0].words) if candidates else (), None, None
    if sae.d_out == lm.d_model:
        (scored,) = output_scores(lm, sae, [latent])
        label, score = label or scored.tokens, scored.score
        input_score = record.input_score(lens_tokens(lm, sae, [latent])[0].tolist())
    texts = side_by_side(
        lm,
        spec.prompts,
        [(strength, [edit.change(strength) for edit in edits]) for strength in spec.strengths],
        themes=[(edit.sae, edit.latent) for edit in edits],
        max_new_tokens=spec.max_new_tokens,
        persist=spec.persist,
    )
    held = [None if edit.when is None else bool(edit.when.held) for edit in edits]
    return Steering(
        subject=opened.subject,
        latent=latent,
        label=label,
        output_score=score,
        candidates=tuple(candidates),
        mode=edits[0].spec.mode,
        largest_activation=record.maximum,
        read_tokens=records[site].n_tokens,
        samples=tuple(
            Sample(t.prompt, t.strength, t.text, t.on_theme, t.distinct, t.perplexity, t.log_prob, t.kl) for t in texts
        ),
        edits=tuple(
            Edited(e.name, e.spec.mode, e.amount, e.spec.where, e.spec.when, one)
            for e, one in zip(edits, held, strict=True)
        ),
        persist=spec.persist,
        input_score=input_score,
        confidence_change=confidence_changes(lm, [[edit.change() for edit in edits]], [NEUTRAL])[0],
    )


def _opened(spec: SteerSpec) -> tuple[Opened, Site]:
    """The model with its SAEs, and the site of the first SAE, whose latent is steered with where no edits are named."""
    if not spec.more:
        opened = open_one(spec)
        return opened, next(iter(opened.saes))
    names = (str(spec.sae), *spec.more)
    asked = OfSAEsSpec(saes=names, model=spec.model, device=spec.device, accept_mismatch=spec.accept_mismatch)
    opened = open_saes(asked)
    return opened, next(site for site, name in opened.names.items() if name == str(spec.sae))


def _edit(spec: SteerSpec, site: Site, latent: int) -> EditSpec:
    return EditSpec(latent=name_of(site, latent), mode=spec.mode, where=spec.where, when=spec.when)


def _records(
    spec: SteerSpec, opened: Opened, main: Site, edits: Sequence[OpenedEdit], ctx: Context
) -> dict[Site, Records]:
    """Records by site: of one SAE those of all latents, as ``unweave latents`` would ask for them, so that its run is
    shared; of several those of the latents that are edited."""
    if spec.more:
        named: dict[Site, list[int]] = {}
        for edit in edits:
            named.setdefault(edit.site, []).append(edit.latent)
        if spec.edits or spec.latent is not None:
            return latents.records_of(opened, None, spec.latents_tokens, ctx.runs, named)
    asked = LatentsSpec(
        sae=spec.sae,
        model=spec.model,
        device=spec.device,
        accept_mismatch=spec.accept_mismatch,
        tokens=spec.latents_tokens,
    )
    return {main: latents.load(latents.run(asked, ctx.runs))}
