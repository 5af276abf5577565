"""The result of steering. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from unweave.core.result import Result
from unweave.inputs.subject import Subject


@dataclass(frozen=True)
class Candidate:
    """A latent to steer with."""

    latent: int
    words: tuple[str, ...]
    """its theme, strongest word first"""
    expression: float
    """how much turning it up brings these words out, in nats"""
    trial: float
    """in [0, 1]: how well a few words show it"""
    score: float
    """its output score"""
    tokens: tuple[str, ...]
    """its first ten lens tokens, as text"""


@dataclass(frozen=True)
class Sample:
    """One prompt's answer at one strength."""

    prompt: str
    strength: float | None
    """multiples of the latent's largest activation; None: unedited"""
    text: str
    on_theme: float | None
    """share of the new tokens that are among the 20 the latent's direction promotes most"""
    distinct: float
    """distinct 3-grams of new tokens over all of them"""
    perplexity: float | None
    """of the new tokens, under the unedited model"""
    log_prob: float | None = None
    """mean log-probability of the new tokens under the model that wrote them, in nats; None as below"""
    kl: float | None = None
    """from the unedited model's next token, in nats a token; None where edits do not persist"""


@dataclass(frozen=True)
class Edited:
    """What strength 1 does to a latent."""

    name: str
    """resid_post.9/123"""
    mode: str
    amount: float
    """in the latent's own units; a factor for multiply and project"""
    where: str
    when: str | None
    held: bool | None
    """whether the condition held at some token that was to be edited, at any strength; None without one"""


@dataclass(frozen=True)
class Steering(Result):
    """The same prompts answered at several strengths of one latent."""

    subject: Subject
    latent: int
    label: tuple[str, ...]
    """tokens that stand for the latent"""
    output_score: float | None
    """None where the SAE does not write to the residual stream"""
    candidates: tuple[Candidate, ...]
    """what it was chosen from, the best first; empty where it was named"""
    mode: str
    largest_activation: float
    """strength 1, over ``read_tokens`` tokens"""
    read_tokens: int
    samples: tuple[Sample, ...]
    edits: tuple[Edited, ...] = ()
    """everything that is changed together, the latent first"""
    persist: bool = True
    input_score: float | None = None
    """share of the latent's contexts that fire on a token it promotes; None for too few, or where it promotes none"""
    confidence_change: float | None = None
    """of the next token at a neutral prompt, in nats, at strength 1"""
