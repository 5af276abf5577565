"""SAEBench's measures: SAEs by site, tasks over them, baselines beside them; a task that cannot run says why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from unweave.core.errors import UnweaveError
from unweave.core.pieces import Pieces
from unweave.core.site import Site
from unweave.core.stage import Context, stage
from unweave.data.policy import TokenPolicy
from unweave.inputs.identity import texts_of
from unweave.inputs.saes import Opened, named_saes, open_saes
from unweave.inputs.spec import OfSAEsSpec
from unweave.lm.model import LM
from unweave.methods.saebench import schema
from unweave.methods.saebench.baselines import active, own_neurons, random_directions
from unweave.methods.saebench.result import NotRun, SaebenchResult, Scores
from unweave.methods.saebench.spec import SaebenchSpec
from unweave.methods.saebench.spread import Scored, measure
from unweave.methods.saebench.task import Bench, Prepared, Task
from unweave.sae.module import SAE


@dataclass(frozen=True)
class Subject:
    """An SAE that is measured."""

    name: str
    opened: Opened
    control: bool

    @property
    def sae(self) -> SAE:
        return self.opened.sae


def _also(spec: SaebenchSpec, handle: object) -> dict[str, str]:
    del handle
    asked = OfSAEsSpec(saes=spec.saes, model=spec.model)
    read = [texts_of(asked, getattr(spec, name).data) for name in ("core", "autointerp") if name in spec.tasks]
    return {name: content for contents in read for name, content in contents.items()}


@stage("saebench", version=2, also=_also)
def run(spec: SaebenchSpec, ctx: Context) -> SaebenchResult:
    """Every task on every SAE, site by site; files in SAEBench's form lie in the run's folder."""
    subjects = opened(spec)
    scores: list[Scores] = []
    not_run: list[NotRun] = []
    for site in sorted({subject.sae.read for subject in subjects if subject.sae.read}):
        here = [subject for subject in subjects if subject.sae.read == site]
        if all(subject.control for subject in here):
            raise UnweaveError(f"only controls are at {site}", where="controls", remedy="give SAEs of the same site")
        for name in spec.tasks:
            task: Task = import_module(f"unweave.methods.saebench.{name}").TASK
            for one in measured(task, site, here, spec, ctx):
                if isinstance(one, Scores):
                    scores.append(one)
                else:
                    not_run.append(one)
    if not scores:
        first = not_run[0]
        raise UnweaveError(f"no task could run; {first.task}: {first.reason}", where=str(first.site))
    of = [one.opened.subject for one in subjects if not one.control]
    accepted = {site: evidence for one in of for site, evidence in one.accepted.items()}
    subject = replace(of[0], saes=tuple(info for one in of for info in one.saes), accepted=accepted)
    return SaebenchResult(subject, spec.form, spec.seeds, tuple(scores), tuple(not_run))


def opened(spec: SaebenchSpec) -> list[Subject]:
    """The SAEs and controls in one model. UnweaveError for one named twice, of another model, and for transcoders."""
    subjects: list[Subject] = []
    lm: LM | None = None
    for names, control in ((spec.saes, False), (spec.controls, True)):
        for site, name in named_saes(names):
            one = open_saes(spec.one(name if site is None else f"{site}={name}"), lm)
            lm = one.lm
            if one.sae.is_transcoder or one.sae.encode_only:
                raise UnweaveError("SAEBench's measures are of SAEs that write where they read", where=name,
                                   remedy="measure it with unweave eval")  # fmt: skip
            if any(one.sae.digest() == other.sae.digest() and one.sae.read == other.sae.read for other in subjects):
                raise UnweaveError("this SAE is named twice", where=name, remedy="name each once")
            subjects.append(Subject(name, one, control))
    return subjects


def measured(
    task: Task, site: Site, subjects: list[Subject], spec: SaebenchSpec, ctx: Context
) -> Iterator[Scores | NotRun]:
    """A task's scores at a site: of every SAE, next to baselines and controls."""
    parts = ctx.path / "parts" / str(site)
    folder = parts / task.name
    first = subjects[0].opened
    policy = _policy(spec, first.lm, [subject.sae for subject in subjects])
    for subject in subjects:
        subject.sae.policy = policy
    saes = tuple(subject.sae for subject in subjects)
    pieces, common = Pieces(folder / "shared"), Pieces(parts / "common")
    bench = Bench(first.lm, first.model, site, saes, policy, spec, pieces, ctx.runs, common)
    try:
        prepared = task.prepare(bench)
    except UnweaveError as error:
        yield NotRun(task.name, site, "", _words(error))
        return
    ctx.log("prepared", {"task": task.name, "site": str(site)})
    controls: dict[str, Scored] = {}
    for subject in sorted(subjects, key=lambda one: not one.control):
        try:
            scored = _scored(task, prepared, subject.sae, folder / subject.sae.digest()[:12])
            if subject.control:
                controls[f"control {subject.name}"] = scored
                continue
            baselines = controls | _baselines(task, prepared, subject, spec, folder)
        except UnweaveError as error:
            yield NotRun(task.name, site, subject.name, _words(error))
            continue
        yield _written(task, prepared, subject, scored, baselines, spec, ctx)
        ctx.log("measured", {"task": task.name, "sae": subject.name})


def _words(error: UnweaveError) -> str:
    return "; ".join(filter(None, (error.what, error.where, error.remedy)))


def _policy(spec: SaebenchSpec, lm: LM, saes: list[SAE]) -> TokenPolicy:
    """Correct: what any of the SAEs was not trained on does not count. Compatible: BOS, EOS and padding do not."""
    if spec.form == "compatible":
        ids = (getattr(lm.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
        return TokenPolicy(tuple(sorted({int(i) for i in ids if i is not None})))
    return TokenPolicy.common([TokenPolicy(tuple(lm.special_ids)), *(sae.policy for sae in saes)])


def _scored(task: Task, prepared: Prepared, sae: SAE, folder: Path) -> Scored:
    pieces = Pieces(folder)
    return pieces.value("scored", Scored, lambda: prepared.score(sae, pieces))


def _baselines(task: Task, prepared: Prepared, subject: Subject, spec: SaebenchSpec, folder: Path) -> dict[str, Scored]:
    made = {}
    for name in (one for one in spec.baselines if one in task.baselines):
        own = name == "neurons"
        sae = (own_neurons(subject.opened.lm, subject.sae, subject.sae.policy) if own
               else random_directions(subject.sae, prepared.about.sample, spec.seed))  # fmt: skip
        place = name.replace(" ", "-") + ("" if own else f"-{subject.sae.digest()[:12]}")
        made[name] = _scored(task, prepared, sae, folder / place)
    return made


def _written(
    task: Task, prepared: Prepared, subject: Subject, scored: Scored, baselines: dict[str, Scored],
    spec: SaebenchSpec, ctx: Context,
) -> Scores:  # fmt: skip
    sae, site, about = subject.sae, subject.sae.read, prepared.about
    assert site is not None
    measures = tuple(measure(scored, key, task.headlines.get(key, 0), baselines) for key in scored.draws)
    scores = Scores(
        task=task.name, version=task.version, site=site, sae=subject.name, digest=sae.digest(),
        l0=active(sae, about.sample), data=about.data, source=about.source, notes=about.notes, overlap=scored.overlap,
        measures=measures, file=schema.path_of(task, sae.digest(), str(site)),
    )  # fmt: skip
    schema.write(ctx.path, task, spec, subject.opened.lm, sae, scored, scores)
    return scores
