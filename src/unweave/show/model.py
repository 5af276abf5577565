"""A latent as pages and notebooks show it: plain dataclasses, so that any method or test can fill them in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
