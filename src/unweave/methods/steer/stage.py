"""Text with a latent turned up, at several strengths, beside the unchanged model's."""

from __future__ import annotations

from unweave.core.stage import Context, stage
from unweave.inputs.saes import open_one
from unweave.latents import stage as latents
from unweave.latents.spec import LatentsSpec
from unweave.methods.steer.choice import choose_latents
from unweave.methods.steer.result import Sample, Steering
from unweave.methods.steer.spec import SteerSpec
from unweave.sae.output_score import output_scores
from unweave.sae.steered import sweep


@stage("steer", version=4)
def run(spec: SteerSpec, ctx: Context) -> Steering:
    """Chooses a latent by what it does where none is named, and steers every prompt with it at every strength."""
    opened = open_one(spec)
    lm, sae = opened.lm, opened.sae
    records = latents.load(latents.run(_latents_spec(spec), ctx.runs))
    candidates = choose_latents(lm, sae, records) if spec.latent is None else []
    latent = records.latent(candidates[0].latent if spec.latent is None else spec.latent)
    if candidates:
        label, score = candidates[0].words, candidates[0].score
    else:
        (named,) = output_scores(lm, sae, [latent.latent])
        label, score = named.tokens, named.score
    texts = sweep(
        lm,
        sae,
        latent.latent,
        spec.prompts,
        spec.strengths,
        maximum=latent.maximum,
        mode=spec.mode,
        max_new_tokens=spec.max_new_tokens,
    )
    return Steering(
        subject=opened.subject,
        latent=latent.latent,
        label=tuple(label),
        output_score=score,
        candidates=tuple(candidates),
        mode=spec.mode,
        largest_activation=latent.maximum,
        read_tokens=records.n_tokens,
        samples=tuple(Sample(t.prompt, t.strength, t.text, t.on_theme, t.distinct, t.perplexity) for t in texts),
    )


def _latents_spec(spec: SteerSpec) -> LatentsSpec:
    """The records' question, as ``unweave latents`` would ask it, so that its run is shared."""
    return LatentsSpec(
        sae=spec.sae,
        model=spec.model,
        device=spec.device,
        accept_mismatch=spec.accept_mismatch,
        tokens=spec.latents_tokens,
    )
