"""Steered text as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from unweave.core.result import Row
from unweave.methods.steer.result import Sample, Steering
from unweave.show.page import ALONE, Around, Section
from unweave.show.pieces import card, chips, esc, latent_link, strongest_contexts

_DONE = {
    "clamp": "held at a fixed strength",
    "add": "pushed by a fixed amount",
    "multiply": "multiplied",
    "project": "projected out",
    "cap": "kept from rising above a bound",
    "min-clamp": "kept from falling below a bound",
}


def rows(result: Steering) -> list[Row]:
    """The latent, and every text."""
    label = " ".join(word.strip() for word in result.label[:6])
    several = [("changed together", _named(result), "")] if len(result.edits) > 1 else []
    return [
        ("latent", result.latent, label),
        *several,
        *(("never edited", name, why) for name, why in _idle(result)),
        *((f"{_strength(sample)}: {sample.prompt}", sample.text, "") for sample in result.samples),
    ]


def _strength(sample: Sample) -> str:
    return "unedited" if sample.strength is None else f"{sample.strength:g}"


def _idle(result: Steering) -> list[tuple[str, str]]:
    """The latents that were not edited anywhere, and why."""
    return [(edit.name, f"{edit.when} held at no token") for edit in result.edits if edit.held is False]


def note(result: Steering) -> str:
    """What a strength of 1 means."""
    persist = "" if result.persist else "; edits do not persist"
    if len(result.edits) > 1 or any(edit.where != "policy" or edit.when for edit in result.edits):
        return f"at strength 1: {_named(result)}{persist}"
    if result.mode in ("multiply", "project"):
        return f"{result.mode}; the strength is the factor{persist}"
    return (
        f"{result.mode}; strength 1 is the latent's largest activation in {result.read_tokens:,} tokens, "
        f"{result.largest_activation:.1f}{persist}"
    )


def _named(result: Steering) -> str:
    """Every edit in words: "clamp resid_post.9/12 to 3.1 (answer)"."""
    words = []
    for edit in result.edits:
        place = "" if edit.where == "policy" else f" on {edit.where}"
        condition = "" if edit.when is None else f" while {edit.when}"
        words.append(f"{edit.mode} {edit.name} {edit.amount:.3g}{place}{condition}")
    return "; ".join(words)


def named(result: Steering) -> dict[str, list[int]]:
    """Latents that a list of all latents can be filtered by."""
    return {"steered": [result.latent]}


def section(result: Steering, around: Around = ALONE) -> Section:
    """The same prompts at several strengths of one latent."""
    label = f" {chips((token, 0.0) for token in result.label)}" if result.label else ""
    parts = [
        f"<p>Latent {latent_link(result.latent)}{label} was {_DONE[result.mode]} while the model wrote; whatever "
        f"the SAE does not explain was kept as it was. {esc(note(result))}</p>"
    ]
    parts += [f"<p>{esc(name)} was not edited anywhere: {esc(why)}.</p>" for name, why in _idle(result)]
    for prompt in dict.fromkeys(sample.prompt for sample in result.samples):
        samples = "".join(_sample(sample, result.label) for sample in result.samples if sample.prompt == prompt)
        parts.append(f'<p class="uw-prompt">{esc(prompt)}</p><div class="uw-wide uw-samples">{samples}</div>')
    entry = around.entries.get(result.latent)
    if entry is not None:
        parts.append(card(strongest_contexts(entry), f"Latent {latent_link(entry.index)}"))
    return Section("Steering", "Turning one latent up", "".join(parts), notes=result.subject.notes)


def _sample(sample: Sample, label: Sequence[str]) -> str:
    if sample.strength is None:
        classes, name = "uw-sample uw-before", "Unedited"
    else:
        classes, name = "uw-sample", f"Strength {sample.strength:g}".replace("-", "\u2212")
    numbers = "" if sample.kl is None or sample.strength is None else f"<p><small>{esc(_numbers(sample))}</small></p>"
    return f'<article class="{classes}"><h3>{esc(name)}</h3><p>{_marked(sample.text, label)}</p>{numbers}</article>'


def _numbers(sample: Sample) -> str:
    """How far a text is from the unedited model, in words."""
    strange = "" if sample.perplexity is None else f", perplexity {sample.perplexity:.3g} under the unedited model"
    return f"KL {sample.kl:.2f} nats a token{strange}"


def _marked(text: str, label: Sequence[str]) -> str:
    """The text with the words of the latent's label marked, so that the effect meets the eye."""
    words = sorted({token.strip() for token in label if len(token.strip()) > 2 and token.strip().isalpha()})
    if not words:
        return esc(text)
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})", re.I)
    parts = enumerate(pattern.split(text))  # every second part is a match
    return "".join(f"<mark>{esc(part)}</mark>" if place % 2 else esc(part) for place, part in parts)
