"""Text with a latent turned up, at several strengths, beside the unchanged model's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from unweave.core.run import Run
from unweave.jobs import latents as latents_job
from unweave.jobs.common import open_sae, sae_digest
from unweave.jobs.specs import LatentsSpec, SteerSpec
from unweave.lm.model import LM
from unweave.sae.module import SAE
from unweave.sae.records import LatentRecord, Records
from unweave.steer.output_score import choose_latents, output_scores
from unweave.steer.sweep import SteeredText, sweep

VERSION = 1


def run(spec: SteerSpec, runs: Path) -> Run:
    """Chooses a latent where none is named, and steers every prompt with it at every strength."""
    with Run.open(runs, "steer", spec, version=VERSION, inputs={"sae": sae_digest(spec.sae)}) as run:
        if run.done:
            return run
        started = time.monotonic()
        lm, sae, record = open_sae(spec)
        records = _records(spec, runs)
        if spec.latent is None:
            chosen = choose_latents(lm, sae, records, n=5)
        else:
            chosen = output_scores(lm, sae, [spec.latent])
        latent = records.latent(chosen[0].latent)
        texts = _texts(spec, lm, sae, latent)
        run.finish(
            record
            | {
                "latent": latent.latent,
                "label": list(chosen[0].tokens),
                "output_score": chosen[0].score,
                "candidates": [{"latent": c.latent, "score": c.score, "tokens": list(c.tokens)} for c in chosen],
                "largest_activation": latent.maximum,
                "prompt": spec.prompts[0],
                "samples": [[_strength(t), t.text] for t in texts if t.prompt == spec.prompts[0]],
                "texts": [_plain(text) for text in texts],
                "note": f"{spec.mode}; strength 1 is the latent's largest activation in {records.n_tokens:,} tokens, "
                f"{latent.maximum:.1f}",
                "seconds": round(time.monotonic() - started, 1),
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
