"""Who says which latents of a classifier's circuits are irrelevant: a file, a rule or a chat model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unweave.circuits.graph import Circuit
from unweave.circuits.support import means, strongest
from unweave.core.errors import UnweaveError
from unweave.core.run import write_json
from unweave.core.site import Site
from unweave.core.spec import digest
from unweave.inputs.saes import Opened
from unweave.judge.base import REPLIES, open_judge
from unweave.latents import annotations as annotated
from unweave.latents.collect_many import records_of
from unweave.methods.shift import relevance
from unweave.methods.shift.relevance import Verdict
from unweave.methods.shift.spec import CircuitShiftSpec
from unweave.sae.module import SAE

_SILENT = {"file": "the file does not say", "chat": "never fires in the text looked at", "rule": "unknown"}
"""why there is no verdict, where it was not for an answer that could not be used"""


def judged(
    spec: CircuitShiftSpec,
    opened: Opened,
    saes: Mapping[Site, SAE],
    circuits: Sequence[Mapping[str, Circuit]],
    runs: Path,
    folder: Path,
) -> tuple[dict[str, Verdict], dict[str, Any]]:
    """The verdict on every latent of every seed's circuit by name, and what to say of the judge."""
    strong = {
        s.name: s
        for found in circuits
        for s in strongest(means(found["circuit"]), threshold=spec.threshold, top=spec.top)
    }
    if not strong:
        raise UnweaveError(
            "no latent supports the classifier's labels",
            where="threshold",
            remedy=f"lower the threshold of {spec.threshold}",
        )
    latents = [(s.site, s.latent) for s in sorted(strong.values(), key=lambda s: (s.site, s.latent))]
    about: dict[str, Any] = {"kind": spec.judge, "failures": {}}
    if spec.judge == "file":
        assert spec.annotations is not None
        said = annotated.load(spec.annotations, saes)
        annotated.refuse_strangers(said, {s: sae.digest() for s, sae in saes.items()}, str(spec.annotations))
        verdicts = relevance.by_annotation(latents, said)
    else:
        by_site: dict[Site, list[int]] = {}
        for site, latent in latents:
            by_site.setdefault(site, []).append(latent)
        found = records_of(opened, spec.data, spec.latents_tokens, runs, by_site, model=spec.model)
        records = {(site, latent): found[site].latent(latent) for site, latent in latents}
        if spec.judge == "rule":
            verdicts = relevance.by_rule(records, context_share=spec.context_share, promoted_share=spec.promoted_share)
        else:
            judge = open_judge(spec.chat, Path(runs) / REPLIES, spec.device)
            verdicts, about["failures"] = relevance.by_chat(records, judge)
            about |= {"model": judge.name, "note": judge.note}
    counts = {True: 0, False: 0, None: 0}
    for verdict in verdicts:
        counts[verdict.irrelevant] += 1
    about |= {"irrelevant": counts[True], "relevant": counts[False], "unknown": counts[None]}
    write_json(folder / "verdicts.json", [line(verdict) for verdict in verdicts])
    return {verdict.name: verdict for verdict in verdicts}, about


def digest_of(verdicts: Sequence[Verdict]) -> str:
    """Twelve digits over what was judged, whatever the reasons."""
    return digest([[verdict.name, verdict.irrelevant] for verdict in verdicts])


def in_words(about: Mapping[str, Any]) -> str:
    """How many latents were judged to be what."""
    counts = f"of {_many(about)} latents {about['irrelevant']} irrelevant, {about['relevant']} relevant"
    return counts + (f", {about['unknown']} without a verdict, which are kept" if about["unknown"] else "")


def _many(about: Mapping[str, Any]) -> int:
    return about["irrelevant"] + about["relevant"] + about["unknown"]


def warning(about: Mapping[str, Any]) -> str:
    """What a reader of results must know of latents without a verdict; empty where there are none."""
    if not about["unknown"]:
        return ""
    silent = about["unknown"] - sum(about["failures"].values())
    reasons = [f"{reason}: {count}" for reason, count in about["failures"].items()]
    if silent:
        reasons.append(f"{_SILENT[about['kind']]}: {silent}")
    return f"{about['unknown']} of {_many(about)} latents have no verdict and were kept ({'; '.join(reasons)})"


def line(verdict: Verdict) -> dict[str, Any]:
    return {"name": verdict.name, "irrelevant": verdict.irrelevant, "why": verdict.why}
