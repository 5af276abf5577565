"""What SAEBench's measures can be asked. Knows no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.refs import Content, FileRef
from unweave.core.rules import above, at_least, below, not_empty, rule
from unweave.core.spec import Spec, operational
from unweave.data.spec import DataSpec, ModelRef
from unweave.inputs.spec import OfSAEsSpec, SAERefs
from unweave.judge.spec import JudgeSpec
from unweave.methods.saebench.result import SaebenchResult

TaskName = Literal["core", "sparse_probing", "absorption", "scr", "tpp", "ravel", "unlearning", "autointerp"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
ASKING = ("autointerp",)
"""tasks that ask a chat model, and are run only where they are named"""
Form = Literal["correct", "compatible"]
Baseline = Literal["random directions", "neurons"]
_ASCENDING = rule("ascending numbers from 1", lambda ks: all(a < b for a, b in zip((0, *ks), ks, strict=False)))
_SOURCES = Content("unweave.tasks.tagged.texts:contents_of", named=True)
_PAIR = re.compile(r"([^/]+)/([^/]+) by ([^/]+)/([^/]+)")
_PAIRS = rule("each CLASS/CLASS by CUE/CUE", lambda pairs: all(map(_PAIR.fullmatch, pairs)))
Pair = tuple[str, str, str, str]
_DISTINCT = rule("named once each", lambda values: len(set(values)) == len(values))


@dataclass(frozen=True, kw_only=True)
class CoreSpec(Spec):
    """Reconstruction, sparsity, and what the model loses."""

    data: DataSpec | None = None
    """Other text to measure on; by default held-out documents of the SAE's training text."""
    tokens: Annotated[int, at_least(2)] = 16_384
    """How many tokens to measure on, special tokens included."""
    context: Annotated[int, at_least(2)] = 128
    """Compatible form: the length of a row; documents follow one another."""
    batch_rows: Annotated[int, at_least(1)] = 16
    """Compatible form: rows in a batch. Some of SAEBench's numbers depend on it."""
    splice_special: bool = True
    """Compatible form: put the reconstruction in place of special tokens too, as SAEBench does unless told not to."""


@dataclass(frozen=True, kw_only=True)
class ProbingSpec(Spec):
    """Probes on a few latents for what texts are about."""

    sources: Annotated[tuple[str, ...], not_empty(), _DISTINCT, _SOURCES] = (
        "topics",
        "occupations",
        "code",
        "sentiment",
    )
    """Sets of texts with tags: names or files, as texts.source of `unweave labels`."""
    per_label: Annotated[int, at_least(40)] = 300
    """Texts drawn of each label."""
    labels: Annotated[int, at_least(2)] = 5
    """At most so many labels of a set, those with the most texts."""
    context: Annotated[int, at_least(4)] = 64
    """Texts are cut off at so many tokens."""
    ks: Annotated[tuple[int, ...], not_empty(), _ASCENDING] = (1, 2, 5)
    """How many latents a sparse probe may use."""
    strengths: Annotated[tuple[float, ...], not_empty()] = (0.01, 0.1, 1.0)
    """Inverse penalties C of a probe; which one is chosen on validation texts (correct form)."""


@dataclass(frozen=True, kw_only=True)
class AbsorptionSpec(Spec):
    """Whether latents for a word's first letter go silent where others take their part."""

    words_per_letter: Annotated[int, at_least(20)] = 100
    """At most so many words of the tokenizer for each letter."""
    examples: Annotated[int, at_least(0)] = 10
    """Words with their answers before each prompt."""
    max_k: Annotated[int, at_least(1)] = 10
    """The most latents that one letter may be split into."""
    f1_jump: Annotated[float, above(0), below(1)] = 0.03
    """How much a further latent must raise F1 to count as a part of the letter."""
    least_f1: Annotated[float, at_least(0), below(1)] = 0.6
    """Letters that the model's own probe tells less well are left out."""
    least_letters: Annotated[int, at_least(2)] = 20
    """With fewer letters left, the task is not run."""


@dataclass(frozen=True, kw_only=True)
class AblationSpec(Spec):
    """What SCR and TPP share."""

    ns: Annotated[tuple[int, ...], not_empty(), _ASCENDING] = (2, 5, 10, 20, 50, 100, 500)
    """How many latents are ablated."""
    context: Annotated[int, at_least(4)] = 64
    """Texts are cut off at so many tokens."""
    strengths: Annotated[tuple[float, ...], not_empty()] = (0.01, 0.1, 1.0)
    """Inverse penalties C of a probe; which one is chosen on validation texts (correct form)."""


@dataclass(frozen=True, kw_only=True)
class ScrSpec(AblationSpec):
    """Whether ablating latents takes a spurious cue out of a biased probe."""

    sources: Annotated[tuple[str, ...], not_empty(), _DISTINCT, _SOURCES] = ("reviews",)
    """Sets of texts with tags, as of sparse probing, which hold all labels of the pairs."""
    pairs: Annotated[tuple[str, ...], not_empty(), _DISTINCT, _PAIRS] = (
        "film review/restaurant review by positive/negative",
        "film review/product review by positive/negative",
        "restaurant review/product review by positive/negative",
    )
    """Two classes and two cues, as CLASS/CLASS by CUE/CUE. The biased probe sees the first class with the first cue and
    the second with the second."""
    per_group: Annotated[int, at_least(60)] = 400
    """Texts drawn of each class with each cue."""


@dataclass(frozen=True, kw_only=True)
class TppSpec(AblationSpec):
    """Whether ablating a class's latents hurts that class's probe and no other's."""

    sources: Annotated[tuple[str, ...], not_empty(), _DISTINCT, _SOURCES] = ("topics", "occupations", "code")
    """Sets of texts with three tags or more, as of sparse probing."""
    per_label: Annotated[int, at_least(40)] = 300
    """Texts drawn of each label."""
    labels: Annotated[int, at_least(3)] = 5
    """At most so many labels of a set, those with the most texts."""


@dataclass(frozen=True, kw_only=True)
class RavelSpec(Spec):
    """Whether some latents hold one attribute of an entity, and no other."""

    facts: FileRef | None = None
    """JSON lines of facts (docs/saebench.md); by default our own."""
    classes: Annotated[tuple[str, ...], not_empty(), _DISTINCT] = ("city", "nobel_prize_winner")
    """Classes of entities; one of which the model knows too little is left out."""
    pairs: Annotated[int, at_least(40)] = 96
    """Pairs of sentences drawn for each attribute, of either kind (cause, isolation); 0.7 of them to train on."""
    epochs: Annotated[int, at_least(1)] = 2
    """How often masks see each training pair."""
    batch: Annotated[int, at_least(2)] = 16
    """Pairs of an attribute in a training step."""
    rate: Annotated[float, above(0)] = 1e-3
    """Adam's learning rate."""
    new_tokens: Annotated[int, at_least(2)] = 6
    """Tokens of a completion that are read."""
    keep_error: bool | None = None
    """Keep what the SAE does not explain; by default so in the correct form, and not in the compatible one."""


def pair_of(text: str) -> Pair:
    """Classes and cues of a pair."""
    match = _PAIR.fullmatch(text)
    assert match is not None, "the field's rule"
    one, other, cue, counter = map(str.strip, match.groups())
    return one, other, cue, counter


@dataclass(frozen=True, kw_only=True)
class UnlearningSpec(Spec):
    """Whether clamping latents makes a model forget a subject and keep the rest."""

    material: FileRef | None = None
    """A file of questions and texts to forget and to retain (docs/saebench.md); by default ours, of sports."""
    questions: Annotated[int, at_least(4)] = 60
    """At most so many questions of each side are put to the model, each in 24 orders of its options."""
    least: Annotated[int, at_least(2)] = 10
    """With fewer of a side answered rightly in all orders, the task is not run."""
    texts: Annotated[int, at_least(1)] = 300
    """Texts of each side that our own material has."""
    context: Annotated[int, at_least(4)] = 128
    """Texts are cut off at so many tokens."""


@dataclass(frozen=True, kw_only=True)
class AutointerpSpec(Spec):
    """Whether a chat model's explanations of latents tell texts in which they fire."""

    judge: JudgeSpec = JudgeSpec()
    """The chat model that explains and judges."""
    latents: Annotated[int, at_least(2)] = 20
    """How many latents, all seeds together; drawn at random of those that fire often enough."""
    tokens: Annotated[int, at_least(1)] = 100_000
    """How many tokens of text windows are taken from."""
    data: DataSpec | None = None
    """Other text to take windows from; by default the SAE's training text."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Spec):
    """How each task measures, by its name."""

    core: CoreSpec = CoreSpec()
    """How core is measured."""
    sparse_probing: ProbingSpec = ProbingSpec()
    """How sparse probing is measured."""
    absorption: AbsorptionSpec = AbsorptionSpec()
    """How absorption is measured."""
    scr: ScrSpec = ScrSpec()
    """How spurious correlation removal is measured."""
    tpp: TppSpec = TppSpec()
    """How targeted probe perturbation is measured."""
    ravel: RavelSpec = RavelSpec()
    """How RAVEL is measured."""
    unlearning: UnlearningSpec = UnlearningSpec()
    """How unlearning is measured."""
    autointerp: AutointerpSpec = AutointerpSpec()
    """How automated interpretability is measured."""


@dataclass(frozen=True, kw_only=True)
class SaebenchSpec(TaskOptions):
    """SAEBench's measures of any number of SAEs in one model; several may be of one site."""

    saes: Annotated[SAERefs, not_empty()]
    """SAEs: folders as `train` writes them, any that can be read (docs/formats.md), or SITE=NAME."""
    controls: SAERefs = ()
    """SAEs that count as baselines of those at the same site, such as one trained alike with a frozen decoder."""
    tasks: Annotated[tuple[TaskName, ...], not_empty(), _DISTINCT] = tuple(one for one in TASKS if one not in ASKING)
    """Which measures; by default all but autointerp, which asks a chat model."""
    form: Form = "correct"
    """correct: as they should be; compatible: SAEBench's numbers. docs/saebench.md says how they differ."""
    seeds: Annotated[int, at_least(2)] = 5
    """How often data and probes are drawn anew, for the spread."""
    baselines: Annotated[tuple[Baseline, ...], _DISTINCT] = ("random directions", "neurons")
    """What SAEs are compared with, beside controls."""
    model: ModelRef | None = None
    """The model; by default the one that the SAEs were trained on."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""
    accept_mismatch: str | None = None
    """Use SAEs in a model that they were not trained on, for this reason; the difference measured is recorded."""
    batch_tokens: Annotated[int, at_least(1)] = operational(2048)
    """Tokens that go through the model at once."""
    seed: int = 0
    """The first of the seeds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in TASKS:
            if name not in self.tasks and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UnweaveError(
                    f"the options of {name} would have no effect", where=name, remedy=f"add {name} to tasks"
                )
        if "autointerp" in self.tasks and self.autointerp.latents < self.seeds:
            raise UnweaveError(f"{self.autointerp.latents} latents leave none for some of {self.seeds} seeds",
                               where="autointerp.latents", remedy="ask for more latents, or fewer seeds")  # fmt: skip

    def one(self, name: str) -> OfSAEsSpec:
        """The question about one of the SAEs alone."""
        return OfSAEsSpec(saes=(name,), model=self.model, device=self.device, accept_mismatch=self.accept_mismatch)


COMMAND = Command(
    words="saebench",
    spec=SaebenchSpec,
    result=SaebenchResult,
    stage="unweave.methods.saebench.stage:run",
    positional="saes",
    summary="SAEBench's measures of SAEs, with their spread, baselines, and what they can tell apart.",
    about=(
        "Core measures, sparse probing, first-letter absorption, spurious correlation removal (SCR), targeted probe "
        "perturbation (TPP) and RAVEL, on texts that a package registry carries. Every number comes with its spread "
        "over reseeded data and probes, the smallest difference that it can detect, and random directions and neurons "
        "measured alike. Results lie in the run directory, also as SAEBench's own files; "
        "a task that cannot run says why, and the others finish."
    ),
    examples=(
        "unweave saebench runs/train-0123456789ab/sae",
        "unweave saebench first/sae second/sae --tasks core --form compatible",
        "unweave saebench runs/train-0123456789ab/sae --controls frozen-decoder/sae",
    ),
)
