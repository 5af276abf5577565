"""The main job: from a real language model to features one can see, trust and use, in one command."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unweave.core.run import Run
from unweave.jobs import eval as evaluation
from unweave.jobs import latents, report, steer, trace, train
from unweave.jobs.specs import (
    DataSpec,
    DemoSpec,
    EvalSpec,
    LatentsSpec,
    ReportSpec,
    SteerSpec,
    TraceSpec,
    TrainSpec,
)

VERSION = 1


@dataclass(frozen=True)
class Scale:
    """How much of everything a scale asks for."""

    train: TrainSpec
    latents_tokens: int
    pairs: int
    random: int


def scale_of(spec: DemoSpec) -> Scale:
    """The settings of each scale; all of them train a TopK SAE with k 32 at resid_post.9."""
    base = TrainSpec(device=spec.device)
    sae = base.sae
    match spec.scale:
        case "smoke":
            small = replace(base, data=DataSpec(tokens=40_000, heldout_tokens=5_000), sae=replace(sae, tokens=120_000))
            return Scale(small, latents_tokens=30_000, pairs=32, random=8)
        case "demo":
            return Scale(base, latents_tokens=200_000, pairs=128, random=20)
        case "long":
            more = replace(base, data=DataSpec(tokens=2_000_000), sae=replace(sae, tokens=8_000_000))
            return Scale(more, latents_tokens=200_000, pairs=256, random=40)


def run(spec: DemoSpec, runs: Path) -> Run:
    """Trains, measures, collects, traces, steers and writes the report; each stage is a run of its own."""
    with Run.open(runs, "demo", spec, version=VERSION) as run:
        if run.done and Path(run.result["report"]).exists():
            return run
        run.reused = False
        started = time.monotonic()
        scale = scale_of(spec)
        trained = train.run(scale.train, runs)
        sae, device = train.sae_folder(trained, scale.train, scale.train.sites[0]), spec.device
        stages: dict[str, Callable[[], Run]] = {
            "eval": lambda: evaluation.run(EvalSpec(sae=sae, device=device), runs),
            "latents": lambda: latents.run(LatentsSpec(sae=sae, device=device, tokens=scale.latents_tokens), runs),
            "trace": lambda: trace.run(TraceSpec(sae=sae, device=device, pairs=scale.pairs, random=scale.random), runs),
            "steer": lambda: steer.run(SteerSpec(sae=sae, device=device, latents_tokens=scale.latents_tokens), runs),
            "report": lambda: report.run(ReportSpec(sae=sae), runs),
        }
        done = {"train": trained}
        for name, stage in stages.items():
            done[name] = stage()
        run.finish(_table(done) | {"minutes": round((time.monotonic() - started) / 60, 1)})
    return run


def _table(done: dict[str, Run]) -> dict[str, Any]:
    """What the terminal shows at the end."""
    measured, records, traced = done["eval"].result, done["latents"].result, done["trace"].result
    return {
        "model": f"{measured['model']} ({measured['model_note']})",
        "tokens trained": done["train"].result["tokens"],
        "distinct tokens": done["train"].result["distinct_tokens"],
        "unexplained variance": measured["unexplained_variance"],
        "L0": measured["l0"],
        "cross-entropy recovered (mean ablation)": measured["recovered_vs_mean"],
        "cross-entropy recovered (zero ablation)": measured["recovered_vs_zero"],
        "alive latents": records["alive_fraction"],
        "attribution Pearson (integrated gradients)": traced["correlations"]["ig_pearson"],
        "steered latent": done["steer"].result["latent"],
        "SAE": str(done["train"].path / "sae"),
        "report": done["report"].result["report"],
    }
