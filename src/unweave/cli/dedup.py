"""``unweave dedup``: texts without near duplicates, as a file of JSON lines that every source field takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from unweave.cli.output import JSON

HELP = (
    "Write the documents that share no n words in a row with an earlier one, as JSON lines.\n\n"
    "Sources are read one after the other, as they stand. A document is dropped if any n words in a row of one of its "
    "messages occurred in a document that was kept before; shorter texts are always kept. Any amount of text goes "
    "through in the memory that is given. 'unweave train --data.dedup 20' does the same without a file.\n\n"
    "For example:\n\n    unweave dedup chitchat alpaca --out kept.jsonl\n"
    "    unweave dedup logs/ hub:org/name --out kept.jsonl --n 20 --memory-mb 4096"
)

_SOURCES = Parameter(help="Catalogue texts, files, folders, or hub:org/name; see 'unweave models'.")
_OUT = Parameter(help="The file to write.")
_N = Parameter(help="How many words in a row make a duplicate.")
_MESSAGES = Parameter(help="The field of a row that holds a conversation.")
_TEXT = Parameter(help="The field of a row that holds a plain document.")
_MEMORY = Parameter(help="Memory for what earlier documents said; the rest lies beside --out meanwhile.")


def dedup(
    *sources: Annotated[str, _SOURCES],
    out: Annotated[Path, _OUT],
    n: Annotated[int, _N] = 20,
    messages_field: Annotated[str, _MESSAGES] = "messages",
    text_field: Annotated[str, _TEXT] = "text",
    memory_mb: Annotated[int, _MEMORY] = 512,
    json: Annotated[bool, JSON] = False,
) -> dict[str, Any] | None:
    """Writes the documents of the sources that are kept; says how many were read, kept and dropped."""
    from unweave.cli.progress import show_progress
    from unweave.core.errors import UnweaveError
    from unweave.core.shown import plain
    from unweave.data.corpus import Source
    from unweave.data.dedup import write_deduplicated

    if memory_mb < 1:
        raise UnweaveError(f"{memory_mb} MB of memory make no sense", where="--memory-mb", remedy="give at least 1")
    places = [Source(path=source, messages_field=messages_field, text_field=text_field) for source in sources]
    with show_progress(json):
        counts = write_deduplicated(places, out, n, memory_bytes=memory_mb << 20)
    if json:
        return {"out": str(out), "counts": counts}
    print(
        f"{counts['documents']:,} documents read, {counts['kept']:,} kept, {counts['dropped']:,} dropped; "
        f"{counts['grams']:,} different {n}-grams"
    )
    print(plain(f"kept documents: {out}"))
    return None
