"""Options for steering. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from unweave.core.command import Command
from unweave.core.errors import UnweaveError
from unweave.core.rules import at_least, not_empty, only_where, rule
from unweave.core.spec import Spec
from unweave.inputs.spec import SAERefs, UseSpec
from unweave.methods.steer.result import Steering

_OF_WORDS = rule("of words, each of them", lambda prompts: all(prompt.strip() for prompt in prompts))
_ROLE = "(system|user|assistant|text|special)"
_PLACE = rule(
    "policy, all, prompt, answer, answer:N or roles joined by + (system, user, assistant, text, special)",
    lambda where: re.fullmatch(rf"policy|all|prompt|answer(:[1-9]\d*)?|{_ROLE}(\+{_ROLE})*", where) is not None,
)
_CONDITION = rule(
    "of the form SITE/LATENT>NUMBER, as resid_post.9/123>0.5, or SITE/LATENT",
    lambda when: re.fullmatch(r"[^<>=]+(>\s*-?[0-9.]+(e-?[0-9]+)?)?", when) is not None,
)
_LATENT = only_where("no edits are named", lambda spec: not spec.edits, "put it in edits")

Mode = Literal["clamp", "add", "multiply", "project", "cap", "min-clamp"]


@dataclass(frozen=True, kw_only=True)
class EditSpec(Spec):
    """What is done to one latent."""

    latent: Annotated[str, not_empty()]
    """Its name, such as resid_post.9/123; the number alone where there is one SAE."""
    mode: Mode = "clamp"
    """Set it to a value; add so much; multiply it; project out its direction (1: wholly); keep it at most (cap) or at
    least (min-clamp) at a value."""
    value: float | None = None
    """The strength in the latent's own units; of multiply and project the factor."""
    strength: Annotated[float | None, only_where("value is not given", lambda s: s.value is None, "drop value")] = None
    """The strength as a multiple of the latent's largest activation; 1 where neither is given."""
    where: Annotated[str, _PLACE] = "policy"
    """Which tokens: those that the SAE was trained on (policy), of these the prompt, the answer, or the answer from its
    N-th token on (answer:5); all; or those of a role."""
    when: Annotated[str | None, _CONDITION] = None
    """Only while this latent fires at the same token: resid_post.9/12>0.5, of the same site or of an earlier one."""

    @property
    def relative(self) -> bool:
        """Whether the strength is measured by the latent's largest activation."""
        return self.value is None and self.mode not in ("multiply", "project")


@dataclass(frozen=True, kw_only=True)
class SteerSpec(UseSpec):
    """Generating text with latents changed."""

    latent: Annotated[int | None, _LATENT] = None
    """Which latent; by default one with a clear theme that shows in what the model then writes."""
    prompts: Annotated[tuple[str, ...], not_empty(), _OF_WORDS] = ("Tell me about the sea.",)
    """What to ask the model."""
    strengths: Annotated[tuple[float, ...], not_empty()] = (0.5, 1.0, 2.0)
    """Strengths, as multiples of the latent's largest activation in the records; of multiply and project, factors."""
    mode: Annotated[Mode, _LATENT] = "clamp"
    """What to do to the latent: set it to that value, add so much of its direction, multiply it, project its direction
    out, keep it at most (cap) or at least (min-clamp) at that value."""
    where: Annotated[str, _PLACE, _LATENT] = "policy"
    """Which tokens: those that the SAE was trained on (policy), of these the prompt, the answer, or the answer from its
    N-th token on (answer:5); all; or those of a role."""
    when: Annotated[str | None, _CONDITION, _LATENT] = None
    """Only while this latent fires at the same token: resid_post.9/12>0.5, of the same site or of an earlier one."""
    edits: tuple[EditSpec, ...] = ()
    """Latents to change together, in place of one: each by its own value or strength times the strengths above."""
    more: SAERefs = ()
    """More SAEs, whose latents are named in edits and when."""
    persist: bool = True
    """Whether later tokens attend to what was edited; without, edits change what the model says next and nothing that
    it remembers (docs/steer.md)."""
    max_new_tokens: Annotated[int, at_least(1)] = 60
    """Length of the generated text."""
    latents_tokens: int | None = None
    """How many tokens the latents' records are taken from; as in `unweave latents`, whose run is shared."""


def condition(when: str) -> tuple[str, float]:
    """(name of a latent, bound) of ``resid_post.9/12>0.5``; without a bound it is 0."""
    name, _, bound = when.partition(">")
    try:
        return name.strip(), float(bound) if bound.strip() else 0.0
    except ValueError:
        raise UnweaveError(f"{bound!r} is not a number", where=when, remedy="write resid_post.9/12>0.5") from None


COMMAND = Command(
    words="steer",
    spec=SteerSpec,
    result=Steering,
    stage="unweave.methods.steer.stage:run",
    summary="Generate text with latents changed, at several strengths, beside the unchanged model.",
    about=("Only the latents' own part of the activation changes; what the SAE does not explain stays."),
    examples=(
        "unweave steer --sae runs/train-0123456789ab/sae --latent 1234",
        "unweave steer --sae SAE --latent 1234 --mode add --where answer:3 --when 'resid_post.9/77>0.5'",
        "unweave steer --sae SAE --edits '{latent: 12, mode: cap, value: 2}' '{latent: 1234, strength: 1}'",
    ),
)
