"""The browsable list of latents: its data as compact JSON, and the markup that ``explorer.js`` brings to life.

Format 1 of the data::

    tokens   the distinct token strings, most frequent first; elsewhere a token is its position here
    kinds    [kind, label] pairs of the contexts
    tags     [name, [latent, ...]] sets of latents to filter by, in the order given
    latents  [index, firing rate, largest activation, promoted, suppressed, contexts, note] each, where
             promoted and suppressed are [token, value, token, value, ...] and
             a context is [kind, tokens in base 36 separated by blanks, one digit 0-9 per token, peak, activation there]

A digit is the activation over the latent's largest in ninths, never 0 where the latent fired.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from unweave.show.model import ContextEntry, LatentEntry
from unweave.show.pieces import clean, esc, level

FORMAT = 1
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def _base36(value: int) -> str:
    text = ""
    while True:
        value, digit = divmod(value, 36)
        text = _DIGITS[digit] + text
        if not value:
            return text


def _significant(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _token_table(latents: Sequence[LatentEntry]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for entry in latents:
        counts.update(token for token, _ in (*entry.promoted, *entry.suppressed))
        for context in entry.contexts:
            counts.update(context.tokens)
    # ties in alphabetical order, so that equal input gives equal bytes
    return {token: place for place, token in enumerate(sorted(counts, key=lambda token: (-counts[token], token)))}


def payload(latents: Sequence[LatentEntry], tags: Mapping[str, Sequence[int]]) -> dict[str, object]:
    """Return the explorer's data (format 1, above) for ``latents``; ``tags`` names sets of them to filter by."""
    table = _token_table(latents)
    codes = {token: _base36(place) for token, place in table.items()}
    kinds: dict[tuple[str, str], int] = {}

    def pack(context: ContextEntry, scale: float) -> list[object]:
        kind = kinds.setdefault((context.kind, context.label), len(kinds))
        digits = "".join(str(level(a, scale)) if a > 0 else "0" for a in context.activations)
        peak = _significant(max(context.activations[context.peak], 0.0))
        return [kind, " ".join(codes[token] for token in context.tokens), digits, context.peak, peak]

    def pairs(weights: Sequence[tuple[str, float]]) -> list[float | None]:
        return [part for token, value in weights for part in (table[token], _significant(value))]

    rows = [
        [
            entry.index, _significant(entry.firing_rate), _significant(entry.max_activation),
            pairs(entry.promoted), pairs(entry.suppressed),
            [pack(context, entry.max_activation) for context in entry.contexts], clean(entry.note),
        ]
        for entry in latents
    ]  # fmt: skip
    return {
        "format": FORMAT,
        "tokens": [clean(token) for token in table],
        "kinds": [list(kind) for kind in kinds],
        "tags": [[name, list(members)] for name, members in tags.items() if members],
        "latents": rows,
    }


def script_json(data: object) -> str:
    """Return ``data`` as JSON that is safe inside a <script> element: nothing in it can close the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def explorer_html(data: Mapping[str, object], name: str = "latents") -> str:
    """Return the explorer's element and its data; the page adds the style sheets and ``explorer.js``."""
    return (
        f'<div class="uw-explorer" data-uw-explorer="{esc(name)}-data"><noscript><p class="uw-missing">'
        "The list of latents needs JavaScript; the rest of the page does not.</p></noscript></div>"
        f'<script type="application/json" id="{esc(name)}-data">{script_json(data)}</script>'
    )
