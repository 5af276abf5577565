"""What labelling can be asked. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from unweave.core.command import Command
from unweave.core.rules import above, at_least, at_most, below, not_empty, rule
from unweave.core.spec import Spec, operational
from unweave.inputs.spec import OfSAEsSpec
from unweave.methods.labels.result import LabelsResult
from unweave.tasks.tagged.spec import TaggedSpec

_SHARES = rule("shares from above 0 to below 1", lambda values: all(0 < value < 1 for value in values))


@dataclass(frozen=True, kw_only=True)
class MatchSpec(Spec):
    """How labels are matched with latents. Support and the output score are the paper's; it leaves quantiles and top
    open, and its prior of 0.001 is for far more texts than most have."""

    prior: Annotated[float | None, above(0), below(1)] = 0.1
    """The reference prior of the calibrated F1: the lower, the heavier false positives weigh. The paper's is 0.001.
    null: every label's own prevalence, which is the ordinary F1."""
    quantiles: Annotated[tuple[float, ...], not_empty(), _SHARES] = (0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995)
    """Candidate thresholds of a latent: these quantiles of its frequencies above 0, and 0."""
    support: Annotated[int, at_least(1)] = 50
    """Labels on fewer of the texts are left out."""
    output_score: Annotated[float | None, at_least(0), at_most(1)] = 1e-3
    """Latents with a lower output score are left out. null: not asked for, as where an SAE does not write into the
    residual stream."""
    top: Annotated[int, at_least(1)] = 100
    """How many pairs of each SAE to keep, the best first."""
    per_label: Annotated[int | None, at_least(1)] = None
    """At most so many of them of one label. null: any number."""


@dataclass(frozen=True, kw_only=True)
class LabelsSpec(OfSAEsSpec):
    """Labelling latents by texts that have tags."""

    texts: TaggedSpec = TaggedSpec()
    """The texts with tags."""
    match: MatchSpec = MatchSpec()
    """How labels are matched."""
    context: Annotated[int, at_least(2)] = 128
    """Texts are cut off at so many tokens."""
    batch_tokens: Annotated[int, at_least(1)] = operational(2048)
    """Tokens that go through the model at once."""
    seed: int = 0
    """Bootstraps and shuffled labels."""


COMMAND = Command(
    words="labels",
    spec=LabelsSpec,
    result=LabelsResult,
    stage="unweave.methods.labels.stage:run",
    summary="Label latents by texts with tags, and test the labels on texts held out.",
    about=(
        "A latent gets a label if how often it fires in a text tells whether the text has it: calibrated F1 over "
        "thresholds, labels with enough support, latents with an output score, the best pairs. Texts come "
        "from Debian's descriptions, labelled sets, Stack Exchange dumps, or rows with tags; all SAEs share one pass "
        "of the model. labels.jsonl in the run directory is a file of annotations."
    ),
    examples=(
        "unweave labels --saes runs/train-0123456789ab/sae",
        "unweave labels --saes runs/train-0123456789ab/sae --texts.source academia.stackexchange.com.7z",
        "unweave labels --saes runs/train-0123456789ab/sae --texts.source topics --match.prior 0.001",
    ),
)
