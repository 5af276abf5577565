"""One page from what the stages found about an SAE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unweave.core.run import Run, atomic_write
from unweave.core.spec import digest
from unweave.inputs.inputs import sae_digest
from unweave.latents.records import Records
from unweave.latents.view import entry_of
from unweave.methods.report.page import render
from unweave.methods.report.spec import ReportSpec
from unweave.sae.activations import TopK
from unweave.sae.module import SAE
from unweave.show import model as page

VERSION = 4
_STAGES = ("eval", "latents", "trace", "steer")


def run(spec: ReportSpec, runs: Path) -> Run:
    """Writes ``report.html`` from the newest finished run of each stage; stages that were not run are named in it."""
    identity = sae_digest(spec.sae)
    found = {stage: newest(Path(runs), stage, identity) for stage in _STAGES}
    inputs = {"sae": identity} | {stage: run.digest for stage, run in found.items() if run is not None}
    with Run.open(runs, "report", spec, version=VERSION, inputs=inputs) as run:
        if run.done:
            return run
        text = render(gather(spec, found))
        with atomic_write(run.path / "report.html") as temporary:
            temporary.write_text(text, encoding="utf-8")
        missing = [stage for stage, one in found.items() if one is None]
        run.finish({"report": "report.html", "megabytes": round(len(text.encode()) / 1e6, 2), "not_run": missing})
    return run


def newest(runs: Path, stage: str, sae: str) -> Run | None:
    """The newest finished run of a stage for an SAE; what it has lost since then is an error when it is read."""
    candidates = []
    for path in runs.glob(f"{stage}-*"):
        if (path / "DONE").exists():
            run = Run.at(path)
            if run.asked["inputs"].get("sae") == sae:
                candidates.append(run)
    return max(candidates, key=lambda run: (run.path / "DONE").stat().st_mtime) if candidates else None


def training_run(sae: Path) -> Run | None:
    """The training run that an SAE's folder lies in."""
    for folder in (sae.parent, sae.parent.parent):
        if folder.name.startswith("train-") and (folder / "DONE").exists():
            return Run.at(folder)
    return None


def gather(spec: ReportSpec, found: dict[str, Run | None]) -> page.ReportData:
    """Everything on the page, from files alone: no model is loaded."""
    sae = SAE.load(spec.sae)  # refuses one that is damaged
    about, site = sae.provenance, str(sae.read or "")
    trained = training_run(Path(spec.sae).resolve())
    evaluation = found["eval"].result if found["eval"] else None
    records_run = found["latents"]
    records = Records.load(records_run.path / "records") if records_run else None
    if evaluation is not None and records_run is not None:
        evaluation |= {
            "alive_fraction": records_run.result["alive_fraction"],
            "alive_tokens": records_run.result["tokens"],
        }
    density = evaluation.pop("density", None) if evaluation else None
    model = about.get("model", {})
    return page.ReportData(
        title=spec.title,
        model=model.get("name", "unknown"),
        model_note=model.get("note", ""),
        site=site,
        sae=_summary(sae, trained),
        evaluation=_measures(evaluation),
        density=page.DensityHistogram(**density) if density else None,
        training=_curve(trained, sae.d_sae, site),
        latents=[entry_of(records.latent(j)) for j in _shown(records, spec.latents, found)] if records else None,
        recorded=len(records) if records else None,
        attribution=_attribution(found["trace"]),
        steering=_steering(found["steer"]),
        settings={stage: one.spec for stage, one in {"train": trained, **found}.items() if one is not None},
        provenance=_provenance(spec, about, found, trained),
        timings=[(stage, one.seconds) for stage, one in {"train": trained, **found}.items() if one is not None],
        notes=_notes(model, found),
    )


_NOT_MEASURES = ("model", "model_note", "drift", "accepted", "metric_set", "site")


def _measures(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if evaluation is None else {k: v for k, v in evaluation.items() if k not in _NOT_MEASURES}


def _summary(sae: SAE, trained: Run | None) -> page.SAESummary:
    about = sae.provenance
    return page.SAESummary(
        kind=about.get("train", {}).get("sae", {}).get("kind", sae.kind),
        d_in=sae.d_in,
        latents=sae.d_sae,
        k=sae.activation.k if isinstance(sae.activation, TopK) else None,
        tokens_trained=about.get("tokens"),
        distinct_tokens=about.get("distinct_tokens"),
        epochs=trained.result["epochs"] if trained else None,
    )


def _curve(trained: Run | None, latents: int, site: str) -> page.TrainingCurve | None:
    """Lines that a crash made the run log twice count once; damaged ones are passed over."""
    if trained is None:
        return None
    logged = [e for e in trained.events("train") if e.get("site") == site]
    lines = {e["tokens"]: e for e in logged if all(map(_is_number, map(e.get, ("tokens", "fvu", "dead"))))}
    if not lines:
        return None
    ordered = [lines[tokens] for tokens in sorted(lines)]
    return page.TrainingCurve(
        tokens=[e["tokens"] for e in ordered],
        loss=[e["fvu"] for e in ordered],
        dead_fraction=[e["dead"] / latents for e in ordered],
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(records: Records, limit: int | None, found: Mapping[str, Run | None]) -> list[int]:
    """The first ``limit`` latents (None: all), and those that other parts of the page name."""
    shown = set(range(len(records) if limit is None else min(limit, len(records))))
    if (traced := found["trace"]) is not None:
        shown |= {row["latent"] for row in traced.result["rows"]}
    if (steered := found["steer"]) is not None:
        shown.add(steered.result["latent"])
    return sorted(shown)


def _attribution(run: Run | None) -> page.Attribution | None:
    if run is None:
        return None
    found = run.result
    return page.Attribution(
        task=found["task"],
        pairs=found["pairs"],
        rows=[page.AttributionRow(**row) for row in found["rows"]],
        correlations=found["correlations"],
        example=[tuple(line) for line in found["example"]],
        metric=found["metric"],
        finding=found["finding"],
        share=found.get("share"),
    )


def _steering(run: Run | None) -> page.Steering | None:
    if run is None:
        return None
    found = run.result
    return page.Steering(
        latent=found["latent"],
        prompt=found["prompt"],
        samples=[tuple(sample) for sample in found["samples"]],
        label=found["label"],
        note=found["note"],
    )


def _provenance(
    spec: ReportSpec, about: dict[str, Any], found: dict[str, Run | None], trained: Run | None
) -> dict[str, Any]:
    named = {"train": trained, **found}
    runs = {f"{stage} run": one.path.name for stage, one in named.items() if one is not None}
    accepted = about.get("accepted")
    data = {f"data: {k}": v for k, v in about.get("data", {}).items()}
    environment = trained.environment if trained else {}
    own = {"SAE": sae_digest(spec.sae), "settings": digest(about.get("train", {}))}
    return own | runs | environment | data | ({"accepted mismatch": accepted} if accepted else {})


def _notes(model: dict[str, Any], found: dict[str, Run | None]) -> list[str]:
    notes = []
    if model.get("note"):
        notes.append(
            f"The model's weights are {model['note']}: results are of these weights, not of the original ones."
        )
    if found["eval"] is not None:
        notes += found["eval"].result.get("drift", [])
    for stage, one in found.items():
        if one is not None and "accepted" in one.result:
            notes.append(f"{stage}: the SAE was used in another model than it was trained on: {one.result['accepted']}")
    return notes
