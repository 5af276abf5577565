"""How clear a judge finds what latents respond to, beside the same judge's scores of shuffled contexts."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unweave.core.contents import tree_of as stamp
from unweave.core.errors import UnweaveError
from unweave.core.run import Run, atomic_write
from unweave.inputs.identity import sae as sae_digest
from unweave.inputs.inputs import load_lm
from unweave.judge.base import REPLIES, Judge, check_judge, open_judge
from unweave.judge.spec import DEFAULT_JUDGE
from unweave.latents import stage as latents_job
from unweave.latents.spec import LatentsSpec
from unweave.methods.rubric.rubric import (
    Difference,
    Interval,
    Rating,
    Scores,
    difference,
    eligible,
    rate,
    real_items,
    shuffled_items,
    summarise,
)
from unweave.methods.rubric.spec import RubricSpec

VERSION = 3


def run(spec: RubricSpec, runs: Path) -> Run:
    """Scores random latents; ``ratings.jsonl`` holds every prompt, reply and score, the result their distribution.

    Raises UnweaveError when no prompt got any reply. Interrupted, it goes on from the replies that came.
    """
    inputs = {"sae": sae_digest(spec.sae)}
    if spec.judge.base_url is None and (judge_files := stamp(spec.judge.model)):
        inputs["judge"] = judge_files
    with Run.open(runs, "rubric", spec, version=VERSION, inputs=inputs) as run:
        if run.done:
            return run
        check_judge(spec.judge)
        latents_run = latents_job.run(_latents_spec(spec), runs)
        records = latents_job.load(latents_run)
        load_lm.cache_clear()  # the records are all that is needed; the judge may want the memory
        items = real_items(records, spec.latents, spec.seed)
        n_shuffled = len(items) if spec.shuffled is None else spec.shuffled
        items += shuffled_items(records, n_shuffled, spec.seed)
        judge = open_judge(spec.judge, Path(runs) / REPLIES, spec.device)
        asked = time.monotonic()
        ratings = rate(judge, items)
        run.log("judge", {"seconds_per_prompt": _seconds_per_prompt(ratings, time.monotonic() - asked)})
        if all(rating.reply.text is None for rating in ratings):
            raise UnweaveError(
                f"the judge answered none of {len(ratings)} prompts: {ratings[0].failure}",
                where=judge.name,
                remedy="mend that and ask again",
            )
        _write(run.path / "ratings.jsonl", ratings, inputs["sae"])
        subject = latents_run.result.subject
        used = {"model": subject.model, "model_note": subject.note}
        used |= {"accepted": subject.accepted} if subject.accepted else {}
        result = used | {"records_run": latents_run.path.name, "eligible": len(eligible(records))}
        result |= _found(spec, judge, ratings, inputs["sae"])
        run.finish(result)
    return run


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


def _found(spec: RubricSpec, judge: Judge, ratings: Sequence[Rating], sae: str) -> dict[str, Any]:
    real = [rating for rating in ratings if rating.item.kind == "real"]
    shuffled = [rating for rating in ratings if rating.item.kind == "shuffled"]
    scores, control = summarise(real, spec.seed), summarise(shuffled, spec.seed) if shuffled else None
    above = difference(real, shuffled, spec.seed)
    notes = _notes(spec, judge)
    return {
        "summary": _summary(judge, notes, scores, control, above),
        "judge": {"model": judge.name, "note": judge.note, "notes": notes},
        "real": asdict(scores),
        "shuffled": None if control is None else asdict(control),
        "real_above_shuffled": None if above is None else asdict(above),
        "latents": [
            {"id": f"{sae}/{r.item.latent}", "latent": r.item.latent, "score": r.score, "name": r.name} for r in real
        ],
        "prompt_tokens": sum(r.reply.prompt_tokens for r in ratings),
        "new_tokens": sum(r.reply.new_tokens for r in ratings),
    }


def _notes(spec: RubricSpec, judge: Judge) -> list[str]:
    notes = [judge.note] if judge.note else []
    if spec.judge.base_url is None and judge.name == DEFAULT_JUDGE:
        notes.append("a small judge: read its scores only beside those of shuffled contexts")
    return notes


def _summary(
    judge: Judge, notes: Sequence[str], real: Scores, control: Scores | None, above: Difference | None
) -> list[list[Any]]:
    rows: list[list[Any]] = [["judge", judge.name, "; ".join(notes)]]
    for name, scores in (("latents", real), ("shuffled", control)):
        if scores is None:
            continue
        about = "sets of contexts of five different latents" if name == "shuffled" else "latents drawn at random"
        failed = f"; {scores.failed} answers could not be used" if scores.failed else ""
        rows.append([f"{name}: scored", f"{scores.scored} of {scores.asked}", about + failed])
        rows.append([f"{name}: mean score", _shown(scores.mean), "1 no pattern, 5 a clear one; 95 % interval"])
        rows.append([f"{name}: 4 or 5", _shown(scores.high), "share"])
        rows.append([f"{name}: below 3", _shown(scores.low), "share"])
        counts = "  ".join(f"{score}: {count}" for score, count in scores.distribution.items())
        rows.append([f"{name}: how many", counts, "of each score"])
    if control is not None:
        chance = "" if above is None or above.p is None else f", p = {above.p:.2g}"
        rows.append(["latents above shuffled", _shown(above) + chance, _verdict(above)])
    return rows


def _shown(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.2f}"
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _verdict(above: Difference | None) -> str:
    if above is None:
        return "nothing to compare"
    if above.p is None:
        return "too few to tell"
    if above.shown:
        return "the judge tells latents from shuffled contexts"
    return "the judge was not shown to tell latents from shuffled contexts: do not build on its scores"
