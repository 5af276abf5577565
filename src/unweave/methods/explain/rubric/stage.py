"""How clear a judge rates what latents respond to, beside the same judge's scores of shuffled contexts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unweave.core.errors import UnweaveError
from unweave.core.stage import Context, stage
from unweave.core.writing import atomic_write
from unweave.inputs.inputs import load_lm
from unweave.judge.base import REPLIES, check_judge, open_judge
from unweave.latents import stage as latents
from unweave.latents.spec import LatentsSpec
from unweave.methods.explain.rubric.result import JudgeInfo, RatedLatent, RubricResult
from unweave.methods.explain.rubric.rubric import (
    Rating,
    difference,
    eligible,
    rate,
    real_items,
    shuffled_items,
    summarise,
)
from unweave.methods.explain.rubric.spec import RubricSpec


@stage("rubric", version=4)
def run(spec: RubricSpec, ctx: Context) -> RubricResult:
    """Scores random latents; ``ratings.jsonl`` holds every prompt, reply and score.

    Raises UnweaveError when no prompt got any reply. Interrupted, it goes on from the replies that came.
    """
    check_judge(spec.judge)
    collected = latents.run(_latents_spec(spec), ctx.runs)
    subject, records = collected.result.subject, latents.load(collected)
    load_lm.cache_clear()  # the records are all that is needed; the judge may want the memory
    items = real_items(records, spec.latents, spec.seed)
    items += shuffled_items(records, len(items) if spec.shuffled is None else spec.shuffled, spec.seed)
    judge = open_judge(spec.judge, ctx.runs / REPLIES, spec.device)
    asked = time.monotonic()
    ratings = rate(judge, items)
    ctx.log("judge", {"seconds_per_prompt": _seconds_per_prompt(ratings, time.monotonic() - asked)})
    if all(rating.reply.text is None for rating in ratings):
        raise UnweaveError(
            f"the judge answered none of {len(ratings)} prompts: {ratings[0].failure}",
            where=judge.name,
            remedy="mend that and ask again",
        )
    _write(ctx.path / "ratings.jsonl", ratings, subject.saes[0].digest)
    real = [rating for rating in ratings if rating.item.kind == "real"]
    shuffled = [rating for rating in ratings if rating.item.kind == "shuffled"]
    return RubricResult(
        subject=subject,
        records_run=collected.path.name,
        eligible=len(eligible(records)),
        judge=JudgeInfo(judge.name, judge.note, spec.judge.base_url is None),
        real=summarise(real, spec.seed),
        shuffled=summarise(shuffled, spec.seed) if shuffled else None,
        above_shuffled=difference(real, shuffled, spec.seed),
        latents=tuple(RatedLatent(rating.item.latents[0], rating.score, rating.name) for rating in real),
        prompt_tokens=sum(rating.reply.prompt_tokens for rating in ratings),
        new_tokens=sum(rating.reply.new_tokens for rating in ratings),
    )


def _latents_spec(spec: RubricSpec) -> LatentsSpec:
    """The records' question, as ``unweave latents`` would ask it, so that its run is shared."""
    return LatentsSpec(
        sae=spec.sae,
        model=spec.model,
        device=spec.device,
        accept_mismatch=spec.accept_mismatch,
        data=spec.data,
        split=spec.split,
        tokens=spec.latents_tokens,
    )


def _seconds_per_prompt(ratings: Sequence[Rating], seconds: float) -> float | None:
    """Of the prompts that were asked now; None where every reply was kept from before."""
    new = sum(not rating.reply.kept for rating in ratings)
    return round(seconds / new, 2) if new else None


def _write(path: Path, ratings: Sequence[Rating], sae: str) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as out:
        for rating in ratings:
            out.write(json.dumps(_line(rating, sae), ensure_ascii=False, allow_nan=False) + "\n")


def _line(rating: Rating, sae: str) -> dict[str, Any]:
    """Latents are named by the SAE's digest and their number: numbers alone get mixed up between SAEs (trap 41)."""
    item, reply = rating.item, rating.reply
    return {
        "kind": item.kind,
        "latents": [f"{sae}/{j}" for j in dict.fromkeys(item.latents)],
        "score": rating.score,
        "name": rating.name,
        "failure": rating.failure,
        "tokens": [context.token for context in item.contexts],
        "largest": list(item.largest),
        "prompt": list(rating.prompt),
        "reply": reply.text,
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": reply.new_tokens,
        "cut": reply.cut,
    }
