"""Latents' records as the page and notebooks show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unweave.show.model import ContextEntry, LatentEntry

if TYPE_CHECKING:
    from unweave.latents.records import Context, LatentRecord

KINDS = ("top", "quantile", "random")


def entry_of(record: LatentRecord, note: str = "", kinds: Sequence[str] = KINDS) -> LatentEntry:
    """A latent's record with the contexts of these kinds; ``note`` is an explanation in words."""
    return LatentEntry(
        index=record.latent,
        firing_rate=record.rate,
        max_activation=record.maximum,
        promoted=record.promoted,
        suppressed=record.suppressed,
        contexts=[_context(kind, context) for kind in kinds for context in getattr(record, kind)],
        note=note,
    )


def _context(kind: str, context: Context) -> ContextEntry:
    label = "" if context.band is None else f"band {context.band + 1}, strongest first"
    shown = context.shown()
    peak = next(place for place, one in enumerate(shown) if one.focus)
    return ContextEntry(kind, [one.text for one in shown], [one.value for one in shown], peak, label)
