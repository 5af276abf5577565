"""How clear a judge rates what latents respond to, beside the same judge's scores of shuffled contexts."""

from __future__ import annotations

import json
import time

from unweave.core.errors import UnweaveError
from unweave.core.stage import Context, stage
from unweave.core.writing import write_file
from unweave.inputs.inputs import load_lm
from unweave.judge.base import REPLIES, check_judge, open_judge
from unweave.judge.form import Rating, rate
from unweave.latents import stage as latents
from unweave.latents.spec import LatentsSpec
from unweave.methods.explain.rubric.result import JudgeInfo, RatedLatent, RubricResult
from unweave.methods.explain.rubric.rubric import (
    FORM,
    Item,
    difference,
    eligible,
    real_items,
    shuffled_items,
    summarise,
)  # fmt: skip
from unweave.methods.explain.rubric.spec import RubricSpec


@stage("rubric", version=4)
def run(spec: RubricSpec, ctx: Context) -> RubricResult:
    """Scores random latents; ``ratings.jsonl`` holds every prompt, reply and score.

    Raises UnweaveError when no prompt got any reply. Interrupted, it goes on from the replies that came.
    """
    check_judge(spec.judge)
    records_spec = LatentsSpec(  # as ``unweave latents`` would ask, so that its run is shared
        sae=spec.sae, model=spec.model, device=spec.device, accept_mismatch=spec.accept_mismatch,
        data=spec.data, split=spec.split, tokens=spec.latents_tokens,
    )  # fmt: skip
    collected = latents.run(records_spec, ctx.runs)
    subject, records = collected.result.subject, latents.load(collected)
    load_lm.cache_clear()  # the records are all that is needed; the judge may want the memory
    items = real_items(records, spec.latents, spec.seed)
    n = len(items)
    items += shuffled_items(records, n if spec.shuffled is None else spec.shuffled, spec.seed)
    judge = open_judge(spec.judge, ctx.runs / REPLIES, spec.device)
    started = time.monotonic()
    ratings = rate(judge, FORM, items).rows
    new = sum(not rating.reply.kept for rating in ratings)
    ctx.log("judge", {"seconds_per_prompt": round((time.monotonic() - started) / new, 2) if new else None})
    if all(rating.reply.text is None for rating in ratings):
        what = f"the judge answered none of {len(ratings)} prompts: {ratings[0].failure}"
        raise UnweaveError(what, where=judge.name, remedy="mend that and ask again")
    write_file(ctx.path / "ratings.jsonl", "".join(_line(rating, subject.saes[0].digest) for rating in ratings))
    real, shuffled = ratings[:n], ratings[n:]
    return RubricResult(
        subject=subject,
        records_run=collected.path.name,
        eligible=len(eligible(records)),
        judge=JudgeInfo(judge.name, judge.note, spec.judge.base_url is None),
        real=summarise(real, spec.seed),
        shuffled=summarise(shuffled, spec.seed) if shuffled else None,
        above_shuffled=difference(real, shuffled, spec.seed),
        latents=tuple(
            RatedLatent(one.case.latents[0], one.answer.values[0] if one.answer else None, one.words) for one in real
        ),
        prompt_tokens=sum(rating.reply.prompt_tokens for rating in ratings),
        new_tokens=sum(rating.reply.new_tokens for rating in ratings),
    )


def _line(rating: Rating[Item], sae: str) -> str:
    """Latents are named by the SAE's digest and their number: numbers alone get mixed up between SAEs (trap 41)."""
    item, reply = rating.case, rating.reply
    values = {
        "kind": item.kind, "latents": [f"{sae}/{j}" for j in dict.fromkeys(item.latents)],
        "score": rating.answer.values[0] if rating.answer else None, "name": rating.words, "failure": rating.failure,
        "tokens": [context.token for context in item.contexts], "largest": list(item.largest),
        "prompt": list(rating.prompt), "reply": reply.text,
        "prompt_tokens": reply.prompt_tokens, "new_tokens": reply.new_tokens, "cut": reply.cut,
    }  # fmt: skip
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
