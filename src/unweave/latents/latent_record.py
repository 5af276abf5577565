"""One latent's record, with the stretches of text that show what it does."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from unweave.latents.contexts import KINDS
from unweave.lm.chat import Role

_FEWEST = 10


class Shown(NamedTuple):
    """A token, or several that share a character, as a display shows them: one text, one value."""

    text: str
    value: float
    counted: bool
    focus: bool


@dataclass(frozen=True)
class Context:
    """A stretch of text and one latent's value at each of its tokens."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    """Each token's piece of the text, which they are when joined (see ``lm/shown.py``); its id in angle brackets where
    no tokenizer was at hand."""
    values: tuple[float, ...]
    """The latent at each token; 0 where it does not fire."""
    counted: tuple[bool, ...]
    """False at tokens that the SAE did not see (special tokens, norm outliers): their value says nothing."""
    focus: int
    """The place of the token that the context was chosen for."""
    token: int
    """That token's index in the token store."""
    document: int
    role: Role
    """That token's role."""
    band: int | None
    """For quantile contexts: 0 is the strongest band."""
    goes_on: tuple[bool, ...] = ()
    """True at tokens that hold only the rest of a character, whose text is empty; nothing where there are none."""

    @property
    def value(self) -> float:
        """The latent at the chosen token."""
        return self.values[self.focus]

    def shown(self) -> tuple[Shown, ...]:
        """The tokens as they are shown: those that share a character together, with the largest value among them."""
        found: list[Shown] = []
        goes_on = self.goes_on or (False,) * len(self.texts)
        for place, (text, value, counted) in enumerate(zip(self.texts, self.values, self.counted, strict=True)):
            focus = place == self.focus
            if goes_on[place] and found:
                before = found.pop()
                value, counted = max(value, before.value), counted or before.counted
                text, focus = before.text + text, focus or before.focus
            found.append(Shown(text, value, counted, focus))
        return tuple(found)

    def __str__(self) -> str:
        words = [f"[{one.text}]" if one.focus else one.text for one in self.shown()]
        return f"{self.value:8.3f}  {''.join(words)!r}"


@dataclass(frozen=True, repr=False)
class LatentRecord:
    """One latent's record; printing it shows everything."""

    latent: int
    count: int
    """On how many tokens it fires."""
    rate: float
    """On what share of the tokens it fires."""
    maximum: float
    """Its largest value; 0 when it never fires."""
    mean_active: float
    """Its mean over the tokens on which it fires; 0 when it never does."""
    special_share: float | None
    """Share of special and template tokens among the top contexts' chosen tokens (trap 4); None without any."""
    promoted: tuple[tuple[str, float], ...]
    """Tokens whose logit its direction raises most, and by how much, relative to each other (see ``LM.logit_lens``)."""
    suppressed: tuple[tuple[str, float], ...]
    """Tokens whose logit it lowers most."""
    top: tuple[Context, ...]
    quantile: tuple[Context, ...]
    random: tuple[Context, ...]

    def input_score(self, tokens: Collection[int]) -> float | None:
        """Share of its contexts (top and quantile) whose chosen token, where it fires most, is among ``tokens``: with
        the tokens that its direction promotes, whether it fires on what it writes (Arad et al. 2025). None for fewer
        than 10 contexts."""
        fired = [context.ids[context.focus] for context in (*self.top, *self.quantile)]
        return sum(one in tokens for one in fired) / len(fired) if len(fired) >= _FEWEST else None

    def __repr__(self) -> str:
        lines = [
            f"latent {self.latent}: fires on {self.rate:.3%} of tokens ({self.count:,}), "
            f"largest {self.maximum:.3f}, mean when active {self.mean_active:.3f}"
        ]
        for name, pairs in (("promotes", self.promoted), ("suppresses", self.suppressed)):
            if pairs:
                lines.append(f"  {name}: " + " ".join(repr(text) for text, _ in pairs))
        for name, contexts in zip(KINDS, (self.top, self.quantile, self.random), strict=True):
            if contexts:
                lines += [f"  {name}:", *(f"  {context}" for context in contexts)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What a notebook shows: the latent as a card."""
        from unweave.latents.view import entry_of
        from unweave.show.pieces import latent_html

        return latent_html(entry_of(self))
