"""The main job: from a real language model to features one can see, trust and use, in one command."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from unweave.core.run import Run
from unweave.core.stage import Context, stage
from unweave.latents import stage as latents
from unweave.latents.result import LatentRecords
from unweave.latents.spec import LatentsSpec
from unweave.methods.demo.result import Demo, Step
from unweave.methods.demo.spec import DemoSpec
from unweave.methods.evaluate import stage as evaluation
from unweave.methods.evaluate.result import Evaluation
from unweave.methods.evaluate.spec import EvalSpec
from unweave.methods.report import stage as report
from unweave.methods.report.result import Report
from unweave.methods.report.spec import ReportSpec
from unweave.methods.steer import stage as steer
from unweave.methods.steer.result import Steering
from unweave.methods.steer.spec import SteerSpec
from unweave.methods.trace import stage as trace
from unweave.methods.trace.result import Trace
from unweave.methods.trace.spec import TraceSpec
from unweave.methods.train import stage as train
from unweave.methods.train.result import Training
from unweave.methods.train.spec import TrainSpec


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


def run(spec: DemoSpec, runs: Path) -> Run[Demo]:
    """Trains, measures, collects, traces, steers and writes the report; each stage is a run of its own.

    A finished demo repeats runs that were deleted.
    """
    done = main_job(spec, runs)
    if done.reused and not _still_there(done, runs):
        _steps(spec, Path(runs))
    return done


def _train_digest(spec: DemoSpec, handle: object) -> dict[str, str]:
    return {"train": scale_of(spec).train.digest()}


@stage("demo", version=3, also=_train_digest)
def main_job(spec: DemoSpec, ctx: Context) -> Demo:
    """The main job on the default model and text."""
    steps = _steps(spec, ctx.runs)
    trained, measured, records, traced, steered, page = (
        steps.train.result, steps.eval.result, steps.latents.result, steps.trace.result, steps.steer.result,
        steps.report.result,
    )  # fmt: skip
    m = measured.metrics
    return Demo(
        model=measured.subject.named_model,
        tokens=trained.tokens,
        distinct_tokens=trained.distinct_tokens,
        unexplained_variance=m.unexplained_variance,
        l0=m.l0,
        latents=records.only.latents,
        recovered_vs_mean=m.recovered_vs_mean,
        recovered_vs_zero=m.recovered_vs_zero,
        recovery_notes=m.notes,
        alive_fraction=records.only.alive_fraction,
        read_tokens=records.only.tokens,
        share=traced.share,
        spearman=traced.spearman("ig", "weaker") if traced.agreements else None,
        pearson=traced.pearson("ig", "chosen") if traced.agreements else None,
        steered=steered.latent,
        label=steered.label,
        steps=tuple(Step(f.name, getattr(steps, f.name).path.name) for f in fields(steps)),
        sae=Path("..", steps.train.path.name, trained.sae().folder),
        report=Path("..", steps.report.path.name, page.report),
    )


@dataclass(frozen=True)
class _Steps:
    train: Run[Training]
    eval: Run[Evaluation]
    latents: Run[LatentRecords]
    trace: Run[Trace]
    steer: Run[Steering]
    report: Run[Report]


def _steps(spec: DemoSpec, runs: Path) -> _Steps:
    scale, device = scale_of(spec), spec.device
    trained = train.run(scale.train, runs)
    sae = train.sae_folder(trained)
    measured = evaluation.run(EvalSpec(sae=sae, device=device), runs)
    records = latents.run(LatentsSpec(sae=sae, device=device), runs)
    traced = trace.run(TraceSpec(sae=sae, device=device, pairs=scale.pairs, random=scale.random), runs)
    steered = steer.run(SteerSpec(sae=sae, device=device), runs)
    of = tuple(one.path for one in (trained, measured, records, traced, steered))
    return _Steps(trained, measured, records, traced, steered, report.run(ReportSpec(of=of), runs))


def _still_there(run: Run[Demo], runs: Path) -> bool:
    """Whether every stage's run still has its result."""
    folders = [Path(runs) / step.run for step in run.result.steps]
    return all((folder / "DONE").exists() and Run.at(folder).done for folder in folders)
