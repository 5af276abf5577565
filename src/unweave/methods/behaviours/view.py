"""The index of behaviours: one self-contained HTML page with a card for each, which a reader can search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from unweave.show.model import ContextEntry
from unweave.show.pieces import context_html, esc, number, split_blank, threads, token_chip, visible
from unweave.show.theme import asset, palette_css

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_FIRST = 6
"""contexts shown without a click"""
_TAIL = 40
"""tokens of a context shown before the answer"""


@dataclass(frozen=True)
class Latent:
    """One latent of a circuit: ``resid_post.9/12``, its mean effect, and what its record says where there is one."""

    name: str
    effect: float
    promoted: Sequence[tuple[str, float]] = ()
    context: ContextEntry | None = None
    """where it fires most strongly"""


@dataclass(frozen=True)
class Card:
    """One behaviour. ``contexts`` are (tokens, answer, loss), the most typical first; ``facts`` counts the circuit's
    latents, errors and edges; ``svg`` is its drawing and ``folder`` the run that holds it."""

    name: str
    place: int
    answers: Sequence[tuple[str, int]]
    size: int
    documents: int
    coherence: float
    control: float
    spread: float
    contexts: Sequence[tuple[Sequence[str], str, float]]
    latents: Sequence[Latent]
    facts: Mapping[str, int]
    examples: int
    svg: str
    folder: str

    @property
    def label(self) -> str:
        """The commonest answers, e.g. " of"; they say more than a number."""
        return ", ".join(f"“{visible(text.strip(' ') or text)}”" for text, _ in self.answers[:3])


def page(cards: Sequence[Card], about: Mapping[str, Any]) -> str:
    """The index as a complete HTML document: equal data gives an equal string. ``about``: see ``_deck``."""
    styles = palette_css() + asset("pieces.css") + asset("page.css") + _own("behaviours.css")
    return (
        '<!DOCTYPE html>\n<html lang="en" class="uw"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>Behaviours of {esc(about['model'])}</title><style>{styles}</style></head><body>"
        f'<a class="uw-skip" href="#main">Skip to the behaviours</a>{_top(cards, about)}'
        f'<div class="uw-bar"><div>{_tools()}'
        '<button type="button" class="uw-button" id="uw-theme" hidden>Colours: auto</button></div></div>'
        '<main><section><div class="uw-wide uw-behaviours" id="main">'
        f"{''.join(map(_card, cards))}</div></section></main>"
        '<footer class="uw-foot"><p>Made with Unweave. This file is complete in itself and loads nothing.</p></footer>'
        f"<script>{asset('page.js')}{_own('behaviours.js')}</script></body></html>\n"
    )


def _own(name: str) -> str:
    return resources.files("unweave.methods.behaviours").joinpath(name).read_text(encoding="utf-8")


def _tools() -> str:
    choices = {
        "place": "best first",
        "size": "largest first",
        "coherence": "most alike first",
        "nodes": "most nodes first",
    }
    options = "".join(f'<option value="{key}">{esc(text)}</option>' for key, text in choices.items())
    return (
        '<form class="uw-find" id="tools" hidden>'
        '<input id="find" type="search" aria-label="Find behaviours" '
        'placeholder="Find by answer, context or latent: of, united, mlp_add.25/12">'
        f'<select id="order" aria-label="Order">{options}</select><output id="found"></output></form>'
    )


def _top(cards: Sequence[Card], about: Mapping[str, Any]) -> str:
    counts = about["counts"]
    what = (
        f"{esc(about['model'])} read {counts['scanned']:,} tokens and was sure of {counts['sure']:,}; "
        f"{counts['repeated']:,} of these repeat what stood before. Of the others {counts['kept']:,} were grouped into "
        f"{about['clusters']:,} clusters by {esc(about['by'])}. Here are {len(cards)} of them, each with the latents "
        "that cause its predictions."
    )
    read = (
        "A context ends where the model is sure of the next token, which is marked. Contexts are alike to the degree "
        "of their mean cosine with the cluster’s mean, beside which stands what as many contexts drawn at random have. "
    )
    if about["stability"] is not None:
        read += (
            f"Clustered again with another seed, contexts group {_steady(about['stability'])} "
            f"(adjusted Rand index {number(about['stability'], 2)}; 1 is the same, 0 is chance)."
        )
    return (
        f'<header class="uw-top">{threads()}<h1>Behaviours that nobody named</h1>'
        f'<p class="uw-deck">{what}</p><p>{read}</p></header>'
    )


def _steady(index: float) -> str:
    return "much the same" if index > 0.8 else "in part the same" if index > 0.4 else "differently"


def _card(card: Card) -> str:
    latents, errors, edges = (card.facts[name] for name in ("latents", "errors", "edges"))
    facts = (
        f"{card.size:,} contexts from {_several(card.documents, 'document')}; alike {number(card.coherence, 2)}, "
        f"random {number(card.control, 2)} ± {number(card.spread, 1)}; circuit on {card.examples} of them: "
        f"{_several(latents, 'latent')}, {_several(errors, 'error')}, {_several(edges, 'edge')}"
    )
    chips = "".join(f'<span class="uw-times">{token_chip(text)} {count}</span>' for text, count in card.answers)
    lines = [_context(tokens, answer, loss) for tokens, answer, loss in card.contexts]
    more = "".join(lines[_FIRST:])
    words = " ".join(
        [card.name]
        + [text for text, _ in card.answers]
        + ["".join([*tokens, answer]) for tokens, answer, _ in card.contexts]
        + [latent.name for latent in card.latents]
    )
    return (
        f'<article class="uw-card" id="behaviour-{card.place}" data-place="{card.place}" data-size="{card.size}" '
        f'data-coherence="{card.coherence:.4f}" data-nodes="{latents + errors}" data-text="{esc(words)}">'
        f'<header><h2><a href="#behaviour-{card.place}">{card.place + 1}</a>{esc(card.label)}</h2>'
        f'<p class="uw-facts">{esc(facts)}</p></header>'
        f'<dl class="uw-logits"><dt>Answers</dt><dd>{chips}</dd></dl>'
        f'<p class="uw-kind">The most typical contexts</p>{"".join(lines[:_FIRST])}'
        + (f"<details><summary>{len(lines) - _FIRST} more contexts</summary>{more}</details>" if more else "")
        + _latents(card.latents)
        + _circuit(card)
        + "</article>"
    )


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _context(tokens: Sequence[str], answer: str, loss: float) -> str:
    shown = "".join(_text(token) for token in tokens[-_TAIL:])
    blank, text = split_blank(answer)
    before = "…" if len(tokens) > _TAIL else ""
    title = f"{len(tokens)} tokens before it; −log p = {loss:.3f}"
    return (
        f'<p class="uw-context">{before}{esc(shown)}{" " if blank else ""}'
        f'<mark title="{esc(title)}">{esc(text)}</mark></p>'
    )


def _text(token: str) -> str:
    return token if token.strip(" ") == "" else (" " if token.startswith(" ") else "") + split_blank(token)[1]


def _latents(latents: Sequence[Latent]) -> str:
    if not latents:
        return ""
    rows = []
    for latent in latents:
        sign = "uw-more" if latent.effect > 0 else "uw-less"
        said = " ".join(token_chip(text, value) for text, value in latent.promoted)
        if latent.context is not None:
            said += context_html(latent.context, max(latent.context.activations))
        rows.append(
            f'<b>{esc(latent.name)}</b><span class="uw-num {sign}">{number(latent.effect, 2)}</span><div>{said}</div>'
        )
    return (
        f"<details><summary>The {len(latents)} strongest latents: what ablating each costs, in units of the metric"
        f'</summary><div class="uw-latents">{"".join(rows)}</div></details>'
    )


def _circuit(card: Card) -> str:
    if not card.svg:
        return f'<p class="uw-facts">No node is above the threshold. Kept in <code>{esc(card.folder)}</code>.</p>'
    return (
        "<details><summary>The circuit</summary>"
        f'<div class="uw-drawing">{card.svg}</div>'
        f'<p class="uw-facts">Kept in <code>{esc(card.folder)}</code>.</p></details>'
    )
