"""Steered text as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from unweave.core.result import Row
from unweave.methods.steer.result import Sample, Steering
from unweave.show.page import ALONE, Around, Section
from unweave.show.pieces import card, chips, esc, latent_link, strongest_contexts


def rows(result: Steering) -> list[Row]:
    """The latent, and every text."""
    label = " ".join(word.strip() for word in result.label[:6])
    return [
        ("latent", result.latent, label),
        *((f"{_strength(sample)}: {sample.prompt}", sample.text, "") for sample in result.samples),
    ]


def _strength(sample: Sample) -> str:
    return "unedited" if sample.strength is None else f"{sample.strength:g}"


def note(result: Steering) -> str:
    """What a strength of 1 means."""
    return (
        f"{result.mode}; strength 1 is the latent's largest activation in {result.read_tokens:,} tokens, "
        f"{result.largest_activation:.1f}"
    )


def named(result: Steering) -> dict[str, list[int]]:
    """Latents that a list of all latents can be filtered by."""
    return {"steered": [result.latent]}


def section(result: Steering, around: Around = ALONE) -> Section:
    """The same prompts at several strengths of one latent."""
    label = f" {chips((token, 0.0) for token in result.label)}" if result.label else ""
    parts = [
        f"<p>Latent {latent_link(result.latent)}{label} was held at a fixed strength while the model wrote; whatever "
        f"the SAE does not explain was kept as it was. {esc(note(result))}</p>"
    ]
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
    return f'<article class="{classes}"><h3>{esc(name)}</h3><p>{_marked(sample.text, label)}</p></article>'


def _marked(text: str, label: Sequence[str]) -> str:
    """The text with the words of the latent's label marked, so that the effect meets the eye."""
    words = sorted({token.strip() for token in label if len(token.strip()) > 2 and token.strip().isalpha()})
    if not words:
        return esc(text)
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})", re.I)
    parts = enumerate(pattern.split(text))  # every second part is a match
    return "".join(f"<mark>{esc(part)}</mark>" if place % 2 else esc(part) for place, part in parts)
