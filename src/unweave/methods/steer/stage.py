"""Text with a latent turned up, at several strengths, beside the unchanged model's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from unweave.core.run import Run
from unweave.inputs.inputs import open_sae, sae_digest
from unweave.latents import stage as latents_job
from unweave.latents.records import LatentRecord, Records
from unweave.latents.spec import LatentsSpec
from unweave.lm.model import LM
from unweave.methods.steer.output_score import choose_latents, output_scores
from unweave.methods.steer.spec import SteerSpec
from unweave.sae.module import SAE
from unweave.sae.steered import SteeredText, sweep

VERSION = 3


def run(spec: SteerSpec, runs: Path) -> Run:
    """Chooses a latent by what it does where none is named, and steers every prompt with it at every strength."""
    with Run.open(runs, "steer", spec, version=VERSION, inputs={"sae": sae_digest(spec.sae)}) as run:
        if run.done:
            return run
        lm, sae, record = open_sae(spec)
        records = _records(spec, runs)
        candidates = choose_latents(lm, sae, records) if spec.latent is None else []
        latent = records.latent(candidates[0].latent if spec.latent is None else spec.latent)
        if candidates:
            label, score = candidates[0].words, candidates[0].score
        else:
            (named,) = output_scores(lm, sae, [latent.latent])
            label, score = named.tokens, named.score
        texts = _texts(spec, lm, sae, latent)
        run.finish(
            record
            | {
                "summary": [
                    ["latent", latent.latent, " ".join(word.strip() for word in label[:6])],
                    *([f"{_strength(t)}: {t.prompt}", t.text, ""] for t in texts),
                ],
                "latent": latent.latent,
                "label": list(label),
                "output_score": score,
                "candidates": [asdict(candidate) for candidate in candidates],
                "largest_activation": latent.maximum,
                "prompt": spec.prompts[0],
                "samples": [[_strength(t), t.text] for t in texts if t.prompt == spec.prompts[0]],
                "texts": [_plain(text) for text in texts],
                "note": f"{spec.mode}; strength 1 is the latent's largest activation in {records.n_tokens:,} tokens, "
                f"{latent.maximum:.1f}",
            }
        )
    return run


def _records(spec: SteerSpec, runs: Path) -> Records:
    asked = LatentsSpec(
        sae=spec.sae,
        model=spec.model,
        device=spec.device,
        accept_mismatch=spec.accept_mismatch,
        tokens=spec.latents_tokens,
    )
    return latents_job.load(latents_job.run(asked, runs))


def _texts(spec: SteerSpec, lm: LM, sae: SAE, latent: LatentRecord) -> list[SteeredText]:
    return sweep(
        lm,
        sae,
        latent.latent,
        spec.prompts,
        spec.strengths,
        maximum=latent.maximum,
        mode=spec.mode,
        max_new_tokens=spec.max_new_tokens,
    )


def _strength(text: SteeredText) -> float | str:
    return "unedited" if text.strength is None else text.strength


def _plain(text: SteeredText) -> dict[str, Any]:
    return {
        "prompt": text.prompt,
        "strength": _strength(text),
        "text": text.text,
        "on_theme": text.on_theme,
        "distinct": text.distinct,
        "perplexity": text.perplexity,
    }
