"""One page from the results of finished runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unweave.core.run import Run
from unweave.core.stage import Context, stage
from unweave.core.writing import write_file
from unweave.methods.report import runs as reading
from unweave.methods.report.page import render
from unweave.methods.report.result import Report
from unweave.methods.report.spec import ReportSpec


def run(spec: ReportSpec, runs: Path) -> Run[Report]:
    """Writes ``report.html`` of the runs that are named, and of the newest ones about ``spec.sae``."""
    named = list(spec.of) if spec.sae is None else [*spec.of, *reading.of_sae(spec.sae, runs)]
    distinct = list({path.resolve(): path for path in named}.values())
    return written(replace(spec, of=tuple(distinct)), runs)


@stage("report", version=5)
def written(spec: ReportSpec, ctx: Context) -> Report:
    """The page of exactly these runs."""
    shown = [reading.opened(folder) for folder in spec.of]
    names = {part.command.name for part in shown}
    missing = () if spec.sae is None else tuple(name for name in reading.ABOUT_AN_SAE if name not in names)
    text = render(spec.title, shown, missing, spec.latents)
    write_file(ctx.path / "report.html", text)
    runs = tuple(part.run.path.name for part in shown)
    return Report(Path("report.html"), round(len(text.encode()) / 1e6, 2), runs, missing)
