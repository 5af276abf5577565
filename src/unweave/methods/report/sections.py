"""The sections of the page, each a function of the data that returns the inside of one <section>."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from unweave.methods.report import figures
from unweave.methods.report.explorer import explorer_html, payload
from unweave.methods.report.numbers import KNOWN, MEASURES, duration, sentence, shown, value_of
from unweave.show.model import Attribution, AttributionRow, LatentEntry, ReportData, SAESummary, Steering
from unweave.show.pieces import card, chips, esc, latent_link, missing, number, percent, table


@dataclass(frozen=True)
class Section:
    """One section: its anchor, its name in the bar, its heading, and the HTML below the heading."""

    anchor: str
    short: str
    heading: str
    body: str


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _wide(*figures_: str) -> str:
    """Return figures beside each other across the page; one alone stays in the text's column."""
    return f'<div class="{"uw-wide " if len(figures_) > 1 else ""}uw-figures">{"".join(figures_)}</div>'


def sae_words(sae: SAESummary) -> str:
    """Return the SAE in a few words: "TopK sparse autoencoder with 4,608 latents, 32 of them per token"."""
    kept = f", {sae.k} of them per token" if sae.k is not None else ""
    return f"{esc(sae.kind)} sparse autoencoder with {sae.latents:,} latents{kept}"


def training(data: ReportData) -> Section:
    """What was trained, on how much, and the loss on the way."""
    parts = []
    sae = data.sae
    if sae is None:
        parts.append(missing("Nothing is known about the training of this SAE.", "unweave train"))
    else:
        site = f" at <code>{esc(data.site)}</code>" if data.site else ""
        times, comma = f"{sae.latents / sae.d_in:.3g}", "," if sae.k is not None else ""
        words = (
            f"<p>The activations{site} of {esc(data.model)} are vectors of {sae.d_in:,} numbers in which many meanings "
            f"overlap. A {sae_words(sae)}{comma} was trained to rebuild them: {times} times as many directions as "
            "numbers, each meant to stand for one thing."
        )
        if sae.tokens_trained is not None:
            words += f" It took {sae.tokens_trained:,} tokens"
            if sae.distinct_tokens is not None:
                words += f", drawn from {sae.distinct_tokens:,} different ones"
            words += f" ({sae.epochs:.3g} passes over the text)." if sae.epochs is not None else "."
        parts.append(words + "</p>")
    if data.training is not None and len(data.training.tokens):
        last = data.training.loss[-1]
        name = esc(data.training.loss_name)
        caption = f"The {name} during training ended at {number(last)} on the training text."
        if data.training.dead_fraction:
            end = data.training.dead_fraction[-1]
            share = "no latent" if end == 0 else f"{percent(end)} of the latents"
            caption += f" Below it, the share of latents that had not fired for a while; at the end {share}."
        parts.append(_wide(_figure(figures.loss_curve(data.training), caption)))
    return Section("training", "Training", "What was trained", "".join(parts))


def evaluation(data: ReportData) -> Section:
    """Every number with its meaning, the losses as bars and the density of the latents."""
    parts = []
    if data.evaluation is None:
        parts.append(missing("How faithful the SAE is has not been measured.", "unweave eval"))
    else:
        parts.append(_lead(data.evaluation))
        drawn = []
        losses = [value_of(data.evaluation, f"ce_{name}") for name in ("clean", "sae", "mean", "zero")]
        if sum(value is not None for value in losses) > 1:
            caption = (
                "The model's loss with the SAE in place, between the untouched model and one whose activations are "
                "replaced with their average or with zeros. The closer to the first bar, the better."
            )
            drawn.append(_figure(figures.cross_entropy_bars(*losses), caption))
        drawn += _density(data)
        if drawn:
            parts.append(_wide(*drawn))
        parts += _measures(data.evaluation, data.sae)
    if data.evaluation is None and data.density is not None:
        parts.append(_wide(*_density(data)))
    return Section("evaluation", "Evaluation", "How faithful it is", "".join(parts))


def _density(data: ReportData) -> list[str]:
    if data.density is None or not len(data.density.counts):
        return []
    never = f" {data.density.never:,} latents never fired." if data.density.never else " Every latent fired."
    caption = (
        "How often latents fire, each bar a range of frequencies. A healthy SAE has one broad hill; a heap at the "
        f"right end would be latents that are always on and mean little.{never}"
    )
    return [_figure(figures.density(data.density), caption)]


def _lead(values: Mapping[str, object]) -> str:
    tokens = value_of(values, "tokens")
    text = "Measured on text the SAE was not trained on" + ("." if tokens is None else f", {tokens:,.0f} tokens of it.")
    predictions = value_of(values, "predictions")
    if predictions is not None:
        text += f" Losses are means over {predictions:,.0f} next tokens."
    excluded = values.get("excluded")
    if isinstance(excluded, Mapping) and excluded:
        counts = ", ".join(f"{esc(name)} {count:,}" for name, count in excluded.items())
        text += f" Left out of the variance and left unedited in the model: {counts}."
    notes = values.get("notes")
    further = "".join(f"<p>{esc(note)}</p>" for note in notes) if isinstance(notes, list | tuple) else ""
    return f"<p>{text}</p>{further}"


def _measures(values: Mapping[str, object], sae: SAESummary | None) -> list[str]:
    parts = []
    for group in dict.fromkeys(measure.group for measure in MEASURES):
        rows = [
            (esc(measure.name), esc(shown(measure.key, values)), esc(sentence(measure.key, values, sae)))
            for measure in MEASURES
            if measure.group == group and value_of(values, measure.key) is not None
        ]
        if rows:
            listed = table(("Measure", "Value", "What it says"), rows, (1,), group)
            parts.append(f'<div class="uw-measures">{listed}</div>')
    rest = {name: value for name, value in values.items() if name not in KNOWN}
    if rest:
        parts.append(f"<details><summary>Other numbers</summary>{_values(rest)}</details>")
    return parts


def _values(values: Mapping[str, object]) -> str:
    def cell(value: object) -> str:
        if isinstance(value, float):
            return esc(f"{value:.6g}")
        return esc(", ".join(map(str, value)) if isinstance(value, list | tuple) else value)

    return f'<div class="uw-values">{table(("Name", "Value"), [(esc(k), cell(v)) for k, v in values.items()])}</div>'


def latents(data: ReportData) -> Section:
    """The explorer over all latents."""
    heading = "Every latent"
    if data.latents is None:
        body = missing("No record of what the latents fire on was made.", "unweave latents")
        return Section("latents", "Latents", heading, body)
    words = (
        "<p>Each latent is a direction that the SAE found useful. What it means shows in the text it fires on: the "
        "deeper a token's colour, the stronger the latent there, and the underlined token is the one the passage was "
        "chosen for. <i>Raises</i> and <i>lowers</i> name the next tokens that its direction makes more and less "
        "likely. Search for a word, or follow a latent's number from anywhere on this page.</p>"
    )
    if data.recorded is not None and data.recorded > len(data.latents):
        words += (
            f"<p>These are {len(data.latents):,} of {data.recorded:,} latents, the first by number and those that this "
            "page names elsewhere, so that the page stays small. <code>unweave report --latents none</code> shows all "
            "of them, and <code>Records.load(folder).latent(number)</code> any one.</p>"
        )
    explorer = explorer_html(payload(data.latents, _tags(data)))
    return Section("latents", "Latents", heading, f'{words}<div class="uw-wide">{explorer}</div>')


def _tags(data: ReportData) -> dict[str, list[int]]:
    tags: dict[str, list[int]] = {}
    if data.attribution is not None:
        tags[data.attribution.task] = [row.latent for row in strongest(data.attribution)]
    if data.steering is not None:
        tags["steered"] = [data.steering.latent]
    return tags


def strongest(attribution: Attribution) -> list[AttributionRow]:
    """Return the chosen latents, the largest effect (measured, else estimated) first."""

    def size(row: AttributionRow) -> float:
        return abs(next((value for value in (row.measured, row.ig, row.ap) if value is not None), 0.0))

    return sorted((row for row in attribution.rows if row.chosen), key=lambda row: (-size(row), row.latent))


def attribution(data: ReportData) -> Section:
    """The latents that cause the task's behaviour: estimates against the measured effect."""
    found, heading = data.attribution, "What causes what"
    if found is None:
        body = missing("Which latents cause a behaviour has not been traced.", "unweave trace")
        return Section("attribution", "Causes", heading, body)
    parts = [
        f"<p>Which latents does the model use for {esc(found.task)}? Over {found.pairs:,} pairs of sentences, each "
        "latent was given the value that it has in the pair's other sentence. The change this makes is its effect, "
        "while all other latents stay as they are, or while all have the values of the other sentence; where latents "
        "act on one another the two differ, and their mean is the fairer share. "
        "Measuring takes runs of the model for every latent, so estimates that need only a few gradients pick the "
        f"candidates, and measurements test the estimates. {esc(found.metric)}</p>"
    ]
    if found.share is not None:
        n = sum(row.chosen for row in found.rows)
        parts.append(f"<p>Moved together, the {n} strongest latents make <b>{found.share:.0%}</b> of the change.</p>")
    if found.example:
        lines = "".join(f"<dt>{esc(label)}</dt><dd>{esc(text)}</dd>" for label, text in found.example)
        parts.append(f'<dl class="uw-pair">{lines}</dl>')
    parts.append(_wide(*_scatters(found)))
    if found.correlations:
        parts.append(_agreement(found))
    if found.finding:
        parts.append(f"<p>{esc(found.finding)}</p>")
    by_index = {entry.index: entry for entry in data.latents or ()}
    chosen = strongest(found)
    rows = [_effect_row(row, by_index.get(row.latent)) for row in chosen]
    ends = ("Mean of both ends", "From the clean end", "From the other end")
    head = ("Latent", "Fires on", *ends, "Integrated gradients", "Attribution patching")
    title = f"The {len(chosen)} strongest by estimate, largest measured effect first"
    parts.append(table(head, rows, (2, 3, 4, 5, 6), title))
    known = [row for row in chosen if row.latent in by_index][:3]
    if known:
        cards = "".join(card(_strongest_text(by_index[row.latent]), _card_heading(row)) for row in known)
        parts.append(f'<div class="uw-wide uw-cards">{cards}</div>')
    return Section("attribution", "Causes", heading, "".join(parts))


def _strongest_text(entry: LatentEntry) -> LatentEntry:
    """Return the latent with only its few strongest contexts, for a card among others."""
    return replace(entry, contexts=[context for context in entry.contexts if context.kind == "top"][:4])


def _card_heading(row: AttributionRow) -> str:
    effect = "" if row.measured is None else f' <span class="uw-badge">effect {number(row.measured)}</span>'
    return f"Latent {latent_link(row.latent)}{effect}"


def _scatters(found: Attribution) -> list[str]:
    drawn = []
    for key, name in (("ig", "Integrated gradients"), ("ap", "Attribution patching")):
        if any(row.measured is not None and getattr(row, key) is not None for row in found.rows):
            caption = f"{name} against the measured effect, one dot per latent; on the dashed line both are equal."
            drawn.append(_figure(figures.attribution_scatter(found, key), caption))
    return drawn


_CORRELATIONS = {
    "ig_spearman": "Integrated gradients, Spearman", "ap_spearman": "Attribution patching, Spearman",
    "exact_spearman": "The clean end alone, Spearman", "ig_pearson": "Integrated gradients, Pearson",
    "ap_pearson": "Attribution patching, Pearson", "exact_pearson": "The clean end alone, Pearson",
}  # fmt: skip


_GROUPS = {"": "Chosen latents", "weaker_": "Without the strongest", "random_": "Random latents"}


def _agreement(found: Attribution) -> str:
    given = found.correlations
    rows = [
        (name, *(number(given.get(f"{group}{key}")) for group in _GROUPS))
        for key, name in _CORRELATIONS.items()
        if any(f"{group}{key}" in given for group in _GROUPS)
    ]
    known = {f"{group}{key}" for key in _CORRELATIONS for group in _GROUPS}
    rows += [(esc(key), number(value), "", "") for key, value in given.items() if key not in known]
    order = given.get("ig_spearman")
    words = (
        f"Integrated gradients order the latents as measurements do at {number(order)} (Spearman; 1 is the same order, "
        "0 none). Pearson's correlation asks for the sizes, and one strong latent can make it on its own."
    )
    return ("" if order is None else f"<p>{words}</p>") + table(
        ("Agreement with the measured effect", *_GROUPS.values()), rows, (1, 2, 3)
    )


def _effect_row(row: AttributionRow, entry: LatentEntry | None) -> tuple[str, ...]:
    peaks = [(c.tokens[c.peak], 0.0) for c in entry.contexts if c.kind == "top"] if entry is not None else []
    fires = chips(list(dict.fromkeys(peaks))[:4]) if peaks else ""
    values = (row.measured, row.exact, row.exact_patch, row.ig, row.ap)
    return (latent_link(row.latent), fires, *map(number, values))


def steering(data: ReportData) -> Section:
    """The same prompt at several strengths of one latent."""
    heading = "Turning one latent up"
    steered = data.steering
    if steered is None:
        return Section("steering", "Steering", heading, missing("The model has not been steered.", "unweave steer"))
    samples = "".join(_sample(strength, text, steered) for strength, text in steered.samples)
    label = f" {chips((token, 0.0) for token in steered.label)}" if steered.label else ""
    parts = [
        f"<p>Latent {latent_link(steered.latent)}{label} was held at a fixed strength while the model wrote; whatever "
        f"the SAE does not explain was kept as it was. {esc(steered.note)}</p>",
        f'<p class="uw-prompt">{esc(steered.prompt)}</p>',
        f'<div class="uw-wide uw-samples">{samples}</div>',
    ]
    entry = next((entry for entry in data.latents or () if entry.index == steered.latent), None)
    if entry is not None:
        parts.append(card(_strongest_text(entry), f"Latent {latent_link(entry.index)}"))
    return Section("steering", "Steering", heading, "".join(parts))


def _sample(strength: float | str, text: str, steered: Steering) -> str:
    if isinstance(strength, str):
        classes, name = "uw-sample uw-before", strength[:1].upper() + strength[1:]
    else:
        classes, name = "uw-sample", f"Strength {strength:g}".replace("-", "\u2212")
    return f'<article class="{classes}"><h3>{esc(name)}</h3><p>{_marked(text, steered.label)}</p></article>'


def _marked(text: str, label: Sequence[str]) -> str:
    """Return the text with the words of the latent's label marked, so that the effect meets the eye."""
    words = sorted({token.strip() for token in label if len(token.strip()) > 2 and token.strip().isalpha()})
    if not words:
        return esc(text)
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})", re.I)
    parts = enumerate(pattern.split(text))  # every second part is a match
    return "".join(f"<mark>{esc(part)}</mark>" if place % 2 else esc(part) for place, part in parts)


def making(data: ReportData) -> Section:
    """Caveats, timings, settings and provenance."""
    parts = [f"<p>{esc(note)}</p>" for note in data.notes]
    if data.timings:
        total = sum(seconds for _, seconds in data.timings)
        rows = [(esc(stage), esc(duration(seconds))) for stage, seconds in data.timings]
        parts.append(table(("Step", "Time"), [*rows, ("<b>together</b>", f"<b>{duration(total)}</b>")], (1,)))
    for stage, values in (data.settings or {}).items():
        parts.append(f"<details><summary>Settings: {esc(stage)}</summary>{_values(values)}</details>")
    if data.provenance:
        parts.append(f"<details><summary>Provenance</summary>{_values(data.provenance)}</details>")
    if not parts:
        parts.append('<p class="uw-missing">No settings, times or provenance were handed to this report.</p>')
    return Section("making", "Making", "How this was made", "".join(parts))


SECTIONS = (training, evaluation, latents, attribution, steering, making)
