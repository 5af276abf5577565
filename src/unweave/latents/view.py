"""Latents' records as rows, as a list to look around in, and one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unweave.core.result import Row
from unweave.latents.result import LatentRecords, SiteRecords
from unweave.show.explorer import explorer_html, payload
from unweave.show.model import ContextEntry, LatentEntry
from unweave.show.page import ALONE, Around, Section, Tile
from unweave.show.pieces import esc, percent, table
from unweave.show.theme import asset

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


def rows(result: LatentRecords) -> list[Row]:
    """How many latents fire, on how much text."""
    lines: list[Row] = [("model", result.subject.named_model, "")]
    for one in result.saes:
        about = "" if len(result.saes) == 1 else f"{one.site}: "
        lines += [
            (f"{about}latents", one.latents, f"{one.alive:,} of them fire"),
            (f"{about}alive latents", one.alive_fraction, f"fire somewhere in {one.tokens:,} tokens"),
            (f"{about}special tokens", one.special_share, "share of the tokens that latents fire most strongly on"),
        ]
    return lines


def section(result: LatentRecords, around: Around = ALONE) -> Section:
    """How many latents fire; of one SAE, a list of those in ``around.entries`` to look around in."""
    if len(result.saes) != 1 or not around.entries:
        return Section("Latents", "Latents", _summary(result), notes=result.subject.notes)
    words = (
        "<p>Each latent is a direction that the SAE found useful. What it means shows in the text it fires on: the "
        "deeper a token's colour, the stronger the latent there, and the underlined token is the one the passage was "
        "chosen for. <i>Raises</i> and <i>lowers</i> name the next tokens that its direction makes more and less "
        "likely. Search for a word, or follow a latent's number from anywhere on this page.</p>"
    )
    shown, latents = _shown(around), result.only.latents
    if latents > len(shown):
        words += (
            f"<p>These are {len(shown):,} of {latents:,} latents, the first by number and those that this "
            "page names elsewhere, so that the page stays small. <code>unweave report --latents none</code> shows all "
            "of them, and <code>Records.load(folder).latent(number)</code> any one.</p>"
        )
    explorer = explorer_html(payload(shown, around.tags), around.name)
    body = f'{words}<div class="uw-wide">{explorer}</div>'
    scripts = (asset("explorer.js"),)
    return Section("Latents", "Every latent", body, (asset("explorer.css"),), scripts, _tiles(result.only))


def _summary(result: LatentRecords) -> str:
    lines = []
    for one in result.saes:
        shares = percent(one.alive_fraction), percent(one.special_share)
        lines.append((esc(one.site), f"{one.latents:,}", *shares, f"{one.tokens:,}"))
    head = ("SAE", "Latents", "Alive", "Strongest on special tokens", "Tokens read")
    words = "<p><code>Records.load(folder).latent(number)</code> shows any one.</p>"
    return words + table(head, lines, (1, 2, 3, 4))


def _shown(around: Around) -> list[LatentEntry]:
    named = {latent for latents in around.tags.values() for latent in latents}
    first = set(sorted(around.entries)[: around.limit])
    return [around.entries[j] for j in sorted(first | (named & set(around.entries)))]


def _tiles(one: SiteRecords) -> tuple[Tile, ...]:
    share = percent(one.alive_fraction)
    words = f"{share} of the latents fired somewhere in {one.tokens:,} tokens; 1 means that none is wasted."
    return (Tile(share, "of latents alive", words),)
