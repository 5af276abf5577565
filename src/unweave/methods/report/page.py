"""The page: a section for every run, each made by the view of its method, and how all this was made.

Runs about one SAE know of one another: a list of all latents marks those that other sections name, and these show what
their latents fire on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from unweave.core.result import flat
from unweave.latents.result import LatentRecords
from unweave.methods import commands
from unweave.methods.report.runs import Shown
from unweave.show.model import LatentEntry
from unweave.show.page import Around, Section, page
from unweave.show.pieces import duration, esc, missing, number, table


def render(title: str, shown: Sequence[Shown], not_run: Sequence[str] = (), limit: int | None = None) -> str:
    """A complete HTML document; equal runs give an equal string. ``limit``: how many latents to list of an SAE."""
    order = {command.name: place for place, command in enumerate(commands())}
    ordered = sorted(shown, key=lambda part: (order[part.command.name], part.run.path.name))
    around = {sae: _around(sae, ordered, limit) for sae in {part.sae for part in ordered}}
    sections = [part.view.section(part.result, replace(around[part.sae], folder=part.run.path)) for part in ordered]
    return page(title, _deck(ordered), [*sections, *map(_not_run, not_run), _making(ordered, sections)])


def _around(sae: str, shown: Sequence[Shown], limit: int | None) -> Around:
    """What sections about one SAE know of one another."""
    same = [part for part in shown if sae and part.sae == sae]
    tags: dict[str, list[int]] = {}
    for part in same:
        if hasattr(part.view, "named"):
            tags |= part.view.named(part.result)
    tagged = {latent for latents in tags.values() for latent in latents}
    entries: dict[int, LatentEntry] = {}
    for part in same:
        if isinstance(part.result, LatentRecords):
            entries |= _entries(part, tagged, limit)
    return Around(None, entries, tags, limit, f"latents-{sae}" if sae else "latents")


def _entries(part: Shown, tagged: set[int], limit: int | None) -> dict[int, LatentEntry]:
    """The first records, and those of the latents that are named elsewhere."""
    from unweave.latents.stage import load  # needs torch, which a page without latents does not
    from unweave.latents.view import entry_of

    records = load(part.run)
    there = list(range(len(records))) if records.latents is None else records.latents.tolist()
    return {j: entry_of(records.latent(j)) for j in sorted({*there[:limit], *(tagged & set(there))})}


def _deck(shown: Sequence[Shown]) -> str:
    """What the page is about, in a sentence."""
    models: dict[str, str] = {}
    for part in shown:
        about: Any = getattr(part.result, "subject", part.result)
        if isinstance(getattr(about, "model", None), str):
            models[about.model] = getattr(about, "note", "")
    named = " and ".join(f"{esc(name)}{f' ({esc(note)})' if note else ''}" for name, note in models.items())
    saes = {sae.digest: sae for part in shown for sae in part.saes}
    if len(saes) == 1:
        (sae,) = saes.values()
        return f"A {esc(sae.words)}, for the activations at <code>{esc(sae.site)}</code> of {named}."
    many = f"{len(saes)} SAEs of " if saes else ""
    return f"{len(shown)} results on {many}{named or 'a model'}."


def _not_run(name: str) -> Section:
    words = {
        "eval": "How faithful the SAE is has not been measured.",
        "latents": "No record of what the latents fire on was made.",
        "trace": "Which latents cause a behaviour has not been traced.",
        "steer": "The model has not been steered.",
    }
    return Section(name.capitalize(), f"{name.capitalize()}: not run", missing(words[name], f"unweave {name}"))


def _making(shown: Sequence[Shown], sections: Sequence[Section]) -> Section:
    """Caveats, times, settings and versions."""
    notes = dict.fromkeys(note for section in sections for note in section.notes)
    body = [f"<p>{esc(note)}</p>" for note in notes]
    runs = [part.run for part in shown]
    times = [(esc(run.path.name), esc(duration(run.seconds))) for run in runs if run.seconds]
    if times:
        total = sum(run.seconds for run in runs)
        body.append(table(("Run", "Time"), [*times, ("<b>together</b>", f"<b>{duration(total)}</b>")], (1,)))
    for run in runs:
        about = {"inputs": run.asked["inputs"], "made with": run.environment}
        settings = _values(run.spec) + "".join(f"<h3>{name}</h3>{_values(v)}" for name, v in about.items() if v)
        body.append(f"<details><summary>Settings: {esc(run.path.name)}</summary>{settings}</details>")
    return Section("Making", "How this was made", "".join(body))


def _values(values: Mapping[str, Any]) -> str:
    lines = [(esc(name), esc(number(value) if isinstance(value, float) else value)) for name, value in flat(values)]
    return table(("Setting", "Value"), lines, ())
