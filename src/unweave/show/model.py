"""What a report shows: plain dataclasses, so that any job, notebook or test can fill them in.

Every part of ``ReportData`` except the title and the model may be ``None``; the page then says that the step was
not run and names the command that runs it. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Number = float | int | None


@dataclass(frozen=True)
class ContextEntry:
    """A stretch of text on which one latent was read."""

    kind: str
    """"top", "quantile" or "random"; any other kind is shown under its own name."""
    tokens: Sequence[str]
    """The tokens as text, in order; joined they are the text. Whitespace and byte fragments are allowed."""
    activations: Sequence[float]
    """The latent's activation at each token, unscaled; same length as ``tokens``. Below zero counts as zero."""
    peak: int
    """Position in ``tokens`` that the context was chosen for."""
    label: str = ""
    """What sets it apart within its kind, e.g. "90-95 %"; may be empty."""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.activations) or not 0 <= self.peak < len(self.tokens):
            raise ValueError(
                f"a context needs one activation per token and its peak among them; it has {len(self.tokens)} tokens, "
                f"{len(self.activations)} activations and its peak at {self.peak}"
            )


@dataclass(frozen=True)
class LatentEntry:
    """One latent: how often it fires, on what, and what it writes to the logits."""

    index: int
    firing_rate: float
    """Fraction of the tokens read on which the activation is above zero, 0 to 1."""
    max_activation: float
    """The largest activation seen; 0 for a latent that never fired."""
    promoted: Sequence[tuple[str, float]] = ()
    """Tokens whose logit its decoder direction raises most, with its strength relative to the others."""
    suppressed: Sequence[tuple[str, float]] = ()
    """Tokens whose logit it lowers most."""
    contexts: Sequence[ContextEntry] = ()
    note: str = ""
    """A label or explanation in words, when there is one."""


@dataclass(frozen=True)
class SAESummary:
    """What was trained, in the words of the page's first section."""

    kind: str
    d_in: int
    latents: int
    k: int | None = None
    """Latents kept per token (TopK, BatchTopK); None where sparsity comes from a penalty."""
    tokens_trained: int | None = None
    """Training steps times batch: tokens seen, repeats counted."""
    distinct_tokens: int | None = None
    """Different tokens in the training text."""
    epochs: float | None = None


@dataclass(frozen=True)
class DensityHistogram:
    """How many latents fire how often."""

    edges: Sequence[float]
    """Bin edges in log10 of the firing frequency, e.g. -5 for once in 100,000 tokens; one more than ``counts``."""
    counts: Sequence[int]
    never: int = 0
    """Latents that never fired, which no logarithm can place."""


@dataclass(frozen=True)
class TrainingCurve:
    """The course of training; the lists are equally long."""

    tokens: Sequence[float]
    loss: Sequence[float]
    dead_fraction: Sequence[float] | None = None
    """Share of latents that have not fired for a while, 0 to 1."""
    loss_name: str = "unexplained variance"


@dataclass(frozen=True)
class AttributionRow:
    """One latent's measured effect beside the estimates of it, all in the task metric's units."""

    latent: int
    exact: float | None
    """The change of the metric when this latent alone takes its patch value; None where it was not measured."""
    ig: float | None = None
    """Integrated gradients."""
    ap: float | None = None
    """Attribution patching."""
    chosen: bool = True
    """True for the strongest by estimate, False for latents drawn at random for comparison."""
    exact_patch: float | None = None
    """As ``exact`` from the other end: what its going back takes away when all others have their patch value."""

    @property
    def measured(self) -> float | None:
        """The mean of the effects from both ends; that from the clean end where it alone was measured."""
        if self.exact is None or self.exact_patch is None:
            return self.exact
        return (self.exact + self.exact_patch) / 2


@dataclass(frozen=True)
class Attribution:
    """Which latents cause a behaviour, and how well the cheap estimates agree with the measured effect."""

    task: str
    pairs: int
    rows: Sequence[AttributionRow]
    correlations: Mapping[str, float] = field(default_factory=dict)
    """``ig_spearman``, ``ig_pearson`` and the same of ``ap`` and ``exact``, with the mean of both ends, over the chosen
    latents; with ``random_`` in front over the random ones, ``weaker_`` over the chosen ones but the strongest; other
    keys are listed as they are."""
    example: Sequence[tuple[str, str]] = ()
    """One pair of the task as (label, text) lines, e.g. ("clean", "The keys to the cabinet")."""
    metric: str = ""
    """The metric in one sentence."""
    finding: str = ""
    """What explains a disagreement between estimate and measurement, in a sentence or two."""
    share: float | None = None
    """What share of the metric's whole change the chosen latents make together."""


@dataclass(frozen=True)
class Steering:
    """The same prompt answered at several strengths of one latent."""

    latent: int
    prompt: str
    samples: Sequence[tuple[float | str, str]]
    """(strength or "unedited", text), in the order shown."""
    label: Sequence[str] = ()
    """Tokens that stand for the latent; they are marked where they occur in the texts."""
    note: str = ""
    """What a strength of 1 means, e.g. "times the largest activation seen"."""


@dataclass(frozen=True)
class ReportData:
    """Everything on the page. ``report.render`` turns it into one HTML file."""

    title: str
    model: str
    model_note: str = ""
    """What the reader must know about the weights, e.g. "dequantised from Q4_1"."""
    site: str = ""
    sae: SAESummary | None = None
    evaluation: Mapping[str, object] | None = None
    """Numbers by name: unexplained_variance, explained_variance, mse, cosine, l0, l1, norm_ratio, alive_fraction,
    ce_clean, ce_sae, ce_mean, ce_zero, recovered_vs_mean, recovered_vs_zero, kl_sae, kl_mean, kl_zero, tokens,
    alive_tokens (over how many tokens a latent had the chance to fire; else tokens), predictions (over how many next
    tokens the losses are means), excluded ({reason: tokens}), notes (sentences). Missing ones are left out, others
    are listed as they are."""
    density: DensityHistogram | None = None
    training: TrainingCurve | None = None
    latents: Sequence[LatentEntry] | None = None
    recorded: int | None = None
    """Of how many latents there are records, where ``latents`` may be only some of them."""
    attribution: Attribution | None = None
    steering: Steering | None = None
    settings: Mapping[str, Mapping[str, object]] | None = None
    """Settings by stage: {"train": {"lr": 0.001}}."""
    provenance: Mapping[str, object] | None = None
    """Where it all came from: data, checksums, versions, run directories."""
    timings: Sequence[tuple[str, float]] | None = None
    """(stage, seconds), in the order run."""
    notes: Sequence[str] = ()
    """Caveats for the reader, one sentence each."""
