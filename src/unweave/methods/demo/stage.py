"""The main job: from a real language model to features one can see, trust and use, in one command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unweave.core.run import Run
from unweave.latents import stage as latents
from unweave.latents.spec import LatentsSpec
from unweave.methods.demo.spec import DemoSpec
from unweave.methods.evaluate import stage as evaluation
from unweave.methods.evaluate.spec import EvalSpec
from unweave.methods.report import stage as report
from unweave.methods.report.spec import ReportSpec
from unweave.methods.steer import stage as steer
from unweave.methods.steer.spec import SteerSpec
from unweave.methods.trace import stage as trace
from unweave.methods.trace.spec import TraceSpec
from unweave.methods.train import stage as train
from unweave.methods.train.spec import TrainSpec

VERSION = 2


@dataclass(frozen=True)
class Scale:
    """How much of everything a scale asks for."""

    train: TrainSpec
    pairs: int
    random: int


def scale_of(spec: DemoSpec) -> Scale:
    """The settings of each scale; all of them train a TopK SAE with k 32 at resid_post.9."""
    base = TrainSpec(device=spec.device)
    sae = base.sae
    match spec.scale:
        case "smoke":
            small = replace(
                base, data=replace(base.data, tokens=40_000, heldout_tokens=5_000), sae=replace(sae, tokens=120_000)
            )
            return Scale(small, pairs=32, random=8)
        case "demo":
            return Scale(base, pairs=128, random=20)
        case "long":
            more = replace(base, data=replace(base.data, tokens=1_000_000), sae=replace(sae, tokens=3_000_000))
            return Scale(more, pairs=256, random=40)


def run(spec: DemoSpec, runs: Path) -> Run:
    """Trains, measures, collects, traces, steers and writes the report; each stage is a run of its own."""
    scale = scale_of(spec)
    with Run.open(runs, "demo", spec, version=VERSION, inputs={"train": scale.train.digest()}) as run:
        if run.done and _still_there(run, runs):
            return run
        run.reused = False
        trained = train.run(scale.train, runs)
        sae, device = train.sae_folder(trained), spec.device
        stages: dict[str, Callable[[], Run]] = {
            "eval": lambda: evaluation.run(EvalSpec(sae=sae, device=device), runs),
            "latents": lambda: latents.run(LatentsSpec(sae=sae, device=device), runs),
            "trace": lambda: trace.run(TraceSpec(sae=sae, device=device, pairs=scale.pairs, random=scale.random), runs),
            "steer": lambda: steer.run(SteerSpec(sae=sae, device=device), runs),
            "report": lambda: report.run(ReportSpec(sae=sae), runs),
        }
        done = {"train": trained}
        for name, stage in stages.items():
            done[name] = stage()
        run.finish(_found(done))
    return run


def _still_there(run: Run, runs: Path) -> bool:
    """Whether every stage's run still holds what it found."""
    folders = [Path(runs) / name for name in run.result["runs"].values()]
    return all((folder / "DONE").exists() and Run.at(folder).done for folder in folders)


def _recovered(measured: dict[str, Any], ablation: str, words: str) -> tuple[float | None, str]:
    """The share recovered and what it says, or why there is none."""
    share = measured[f"recovered_vs_{ablation}"]
    reasons = [note for note in measured["notes"] if f"{ablation} ablation" in note]
    return share, words if share is not None or not reasons else reasons[0]


def _found(done: dict[str, Run]) -> dict[str, Any]:
    """What the demo found, by name, and ``summary``: the rows that the terminal shows at the end."""
    trained, measured, records, traced, steered, page = (
        done[stage].result for stage in ("train", "eval", "latents", "trace", "steer", "report")
    )
    model = f"{measured['model']} ({measured['model_note']})" if measured["model_note"] else measured["model"]
    rows = [
        ("model", model, ""),
        ("training tokens", trained["tokens"], f"{trained['distinct_tokens']:,} distinct ones"),
        ("unexplained variance", measured["unexplained_variance"], "0 is perfect, 1 is guessing the mean"),
        ("active latents per token (L0)", measured["l0"], f"of {records['latents']:,}"),
        ("cross-entropy recovered", *_recovered(measured, "mean", "against mean ablation; 1 is the unedited model")),
        ("... against zero ablation", *_recovered(measured, "zero", "an easier comparison")),
        ("alive latents", records["alive_fraction"], f"fire somewhere in {records['tokens']:,} tokens"),
        (
            "effect found",
            traced["share"],
            "of the change in agreement is what its strongest latents make together",
        ),
        (
            "attribution, Spearman",
            traced["correlations"].get("weaker_ig_spearman"),
            "integrated gradients with measured effects of the strongest latents, without the first",
        ),
        ("steered latent", steered["latent"], " ".join(token.strip() for token in steered["label"][:6])),
        ("SAE", f"{done['train'].path.name}/sae", ""),
    ]
    names = ("unexplained_variance", "l0", "recovered_vs_mean", "recovered_vs_zero")
    return {
        "summary": [list(row) for row in rows],
        **{name: measured[name] for name in names},
        "alive_fraction": records["alive_fraction"],
        "correlations": traced["correlations"],
        "tokens": trained["tokens"],
        "runs": {stage: run.path.name for stage, run in done.items()},
        "report": f"../{done['report'].path.name}/{page['report']}",
    }
