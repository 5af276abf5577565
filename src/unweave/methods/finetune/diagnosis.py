"""What can be said of an ablation before anything is trained. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass

from unweave.core.site import Site


@dataclass(frozen=True)
class DirectionCheck:
    """One chosen latent, or direction, on the base model, over the task's training tokens that count."""

    site: Site
    number: int
    activation: float
    """mean of the latent (of a direction: of the projection)"""
    frequency: float
    """on what share of the tokens it is not zero"""
    projection: float
    """mean of x . d / |d|: where the base model lies on the direction"""
    deviation: float
    """standard deviation of it"""
    share: float
    """its share of the variance of x at the site; 1 / D is that of an ordinary direction"""
    span_adds: bool
    """whether projecting the direction out moves the model towards the concept: x lies on the far side of zero by more
    than one deviation"""
    zero_shift: float
    """how far zeroing the latent moves x along the direction on average, in deviations; about 0 for sparse latents"""


@dataclass(frozen=True)
class EditCheck:
    """The untrained model on the task's items, with an edit and without."""

    edit: str
    """zero, span, mean"""
    before: float
    """mean of logit(correct) - logit(incorrect)"""
    change: float
    """how the edit changes it, in pairs"""
    margin: float
    """half of the change's 95 % interval over items"""
    right_before: float
    """share of items whose right answer is ahead of the wrong one"""
    right_after: float
    cost: float
    """multiply-adds that the edit adds to a pass, as a share of those of the model's blocks"""

    @property
    def breaks(self) -> bool:
        """Whether the edit takes away more than half of what the model can do above chance (half of the answers)."""
        return self.right_before > 0.6 and self.right_after - 0.5 < 0.5 * (self.right_before - 0.5)


@dataclass(frozen=True)
class Diagnosis:
    """What to know before training under a selection."""

    items: int
    tokens: int
    directions: tuple[DirectionCheck, ...]
    span_share: dict[str, float]
    """share of the variance that all chosen directions of a site have together"""
    edits: tuple[EditCheck, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should see first, of the ablations that were tried."""
        said, kinds = [], {one.edit for one in self.edits}
        adding = [f"{one.site}/{one.number}" for one in self.directions if one.span_adds and "span" in kinds]
        if adding:
            said.append(
                f"The base model lies on the far side of {len(adding)} of {len(self.directions)} directions "
                f"({', '.join(adding[:3])}{', ...' if len(adding) > 3 else ''}): projecting them out adds the concept. "
                "Set them to their mean instead (condition mean)."
            )
        dense = [f"{one.site}/{one.number}" for one in self.directions if one.zero_shift < -1 and "zero" in kinds]
        if dense:
            said.append(
                f"Firing nearly everywhere: {', '.join(dense[:3])}{', ...' if len(dense) > 3 else ''}. Zeroing them "
                "moves all activations by more than a deviation. Set them to their mean instead (condition mean)."
            )
        said += [
            f"Ablation ({one.edit}) breaks the task on the untrained model: {one.right_after:.0%} right instead of "
            f"{one.right_before:.0%}. Choose fewer latents, or expect it to be learnt in another way."
            for one in self.edits
            if one.breaks
        ]
        return tuple(said)
