"""What ``unweave paper labelled-steering`` can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.rules import at_least, not_empty
from unweave.core.spec import Spec, operational
from unweave.judge.spec import JudgeSpec
from unweave.papers.labelled_steering.result import LabelledSteering
from unweave.tasks.tagged.spec import TaggedSpec

FORA = (
    "academia", "biology", "chemistry", "cooking", "cs", "history", "law", "literature", "physics", "politics",
    "sports",
)  # fmt: skip
"""The paper's Stack Exchange fora."""


@dataclass(frozen=True, kw_only=True)
class LabelledSteeringSpec(Spec):
    """Labelled steering: latents labelled by tagged texts, steered on AxBench."""

    scale: Literal["smoke", "paper"] = "smoke"
    """smoke: SmolLM2-135M with SAEs that are trained first, under an hour on two cores; paper: Gemma-2-9B-it with Gemma
    Scope, layers 17 and 32, and the eleven fora."""
    stackexchange: Path | None = None
    """paper scale: the folder of the Stack Exchange dumps, each as published (academia.stackexchange.com.7z) or as a
    folder with Posts.xml."""
    instructions: Path | None = None
    """AlpacaEval's instructions as JSON lines, or one a line; by default this package's own."""
    judge: JudgeSpec | None = None
    """The chat model that rates; the paper's is GPT-4o-mini behind a server. The smoke scale has scripted truth rate as
    well; the paper scale needs a judge."""
    device: str | None = operational(None)
    """cpu, cuda, cuda:1...; by default a GPU where there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale == "smoke" and self.stackexchange is not None:
            raise UnweaveError(
                "the smoke scale has its own texts", where="stackexchange", remedy="leave it out, or give scale: paper"
            )
        if self.scale == "paper" and self.stackexchange is None:
            raise UnweaveError(
                "the paper scale labels with Stack Exchange dumps, which are not given",
                where="stackexchange",
                remedy=f"download the .7z of {', '.join(FORA)} from archive.org/details/stackexchange into one folder "
                "and name it, or use scale: smoke",
            )
        if self.scale == "paper" and self.judge is None:
            raise UnweaveError(
                "the paper scale has a chat model rate, and none is given",
                where="judge",
                remedy="give judge.model, judge.base_url and judge.api_key_env (the paper's is gpt-4o-mini)",
            )


@dataclass(frozen=True, kw_only=True)
class MixSpec(Spec):
    """Tagged texts of several sources as one file of rows."""

    sources: Annotated[tuple[TaggedSpec, ...], not_empty()]
    """Where the texts come from, all of whose labels are told apart from each other's."""
    facets: tuple[str, ...] = ()
    """Of labels like facet::name only those that begin so; others are left out."""
    support: Annotated[int, at_least(1)] = 80
    """Labels on fewer of a source's texts are left out."""
    per_label: Annotated[int, at_least(1)] = 80
    """A text is taken while one of its labels has fewer texts than this."""
    characters: Annotated[int, at_least(1)] = 400
    """Texts are cut off here."""


COMMAND = Command(
    words="paper labelled-steering",
    spec=LabelledSteeringSpec,
    result=LabelledSteering,
    stage="unweave.papers.labelled_steering.recipe:run",
    summary="Label SAE latents by texts with tags, and steer with them on AxBench.",
    about=(
        "Trains SAEs at two layers, sparse and less so, from two seeds; labels latents by calibrated F1 and output "
        "score, beside ordinary F1; tests the labels on texts held out, with labels shuffled, and from seed to seed; "
        "steers with the pairs as AxBench does, beside random latents, difference of means and prompts. Writes tables, "
        "figures and report.html. Finished parts are kept: after an interruption the same command goes on."
    ),
    examples=(
        "unweave paper labelled-steering --scale smoke    # under an hour on two cores",
        "unweave paper labelled-steering --scale paper --stackexchange dumps --device cuda --judge.model gpt-4o-mini "
        "--judge.base-url https://api.openai.com/v1 --judge.api-key-env OPENAI_API_KEY",
    ),
)
