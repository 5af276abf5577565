"""Behaviours as rows, and as an index with a card for each, which a reader can search. Needs no torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from unweave.attribute.result import incomplete
from unweave.core.result import Row
from unweave.core.writing import write_file
from unweave.methods.behaviours.result import Behaviour, BehavioursResult, Context, StrongLatent, VectorKind
from unweave.show.model import ContextEntry
from unweave.show.page import ALONE, Around, Section, page
from unweave.show.pieces import context_html, counted, esc, number, split_blank, token_chip, visible

INDEX = "index.html"
_FIRST = 6
"""contexts shown without a click"""
_TAIL = 40
"""tokens of a context shown before the answer"""
_BY: dict[VectorKind, str] = {
    "activations": "the activations behind them",
    "latents": "the latents behind them",
    "effects-dense": "the effects of activations on them",
    "effects-latents": "the effects of latents on them",
    "gradients": "their gradients in parameter space",
}
_ORDERS = {"place": "best first", "size": "largest first", "coherence": "most alike first", "nodes": "most nodes first"}


def rows(result: BehavioursResult) -> list[Row]:
    """Each behaviour with its commonest answers and its size; effects that do not add up."""
    return [*listing(result), *(("warning", "", warning) for warning in warnings(result))]


def listing(result: BehavioursResult) -> list[Row]:
    """Each behaviour with its commonest answers and its size."""
    sizes = [result.clusters[behaviour.place].size for behaviour in result.behaviours]
    return [(name(b), label(b), f"{size} contexts") for b, size in zip(result.behaviours, sizes, strict=True)]


def name(behaviour: Behaviour) -> str:
    """ "behaviour 3" """
    return f"behaviour {behaviour.place + 1}"


def label(behaviour: Behaviour) -> str:
    """The commonest answers, e.g. " of"; they say more than a number."""
    return ", ".join(f"“{visible(answer.strip(' ') or answer)}”" for answer, _ in behaviour.answers[:3])


def warnings(result: BehavioursResult) -> list[str]:
    """Circuits whose effects do not add up, though integrated gradients promise it."""
    if result.method != "ig":
        return []
    return [f"{name(b)}: {problem}" for b in result.behaviours if (problem := incomplete(b.sums))]


def save(folder: Path, result: BehavioursResult) -> None:
    """Writes index.html; drawings lie in ``folder``."""
    title = f"Behaviours of {result.subject.model}"
    html = page(title, _deck(result), [section(result, Around(folder))])
    write_file(folder / INDEX, html)


def section(result: BehavioursResult, around: Around = ALONE) -> Section:
    """How contexts were taken and grouped, and a card for each behaviour."""
    read = (
        "A context ends where the model is sure of the next token, which is marked. Contexts are alike to the degree "
        "of their mean cosine with the cluster’s mean, beside which stands what as many contexts drawn at random have. "
    )
    if result.stability is not None:
        read += (
            f"Clustered again with another seed, contexts group {_steady(result.stability)} "
            f"(adjusted Rand index {number(result.stability, 2)}; 1 is the same, 0 is chance)."
        )
    cards = "".join(_card(result, one, around.folder) for one in result.behaviours)
    problems = "".join(f"<p>{esc(warning)}.</p>" for warning in warnings(result))
    body = f'<p>{_deck(result)}</p><p>{read}</p>{problems}{_tools()}<div class="uw-wide uw-behaviours">{cards}</div>'
    styles, scripts = (_own("behaviours.css"),), (_own("behaviours.js"),)
    notes = result.subject.notes
    return Section("Behaviours", "Behaviours that nobody named", body, styles=styles, scripts=scripts, notes=notes)


def _own(file: str) -> str:
    return resources.files("unweave.methods.behaviours").joinpath(file).read_text(encoding="utf-8")


def _tools() -> str:
    options = "".join(f'<option value="{key}">{esc(text)}</option>' for key, text in _ORDERS.items())
    return (
        '<form class="uw-find" data-behaviours hidden>'
        '<input type="search" aria-label="Find behaviours" '
        'placeholder="Find by answer, context or latent: of, united, mlp_add.25/12">'
        f'<select aria-label="Order">{options}</select><output></output></form>'
    )


def _deck(result: BehavioursResult) -> str:
    counts = result.counts
    return (
        f"{esc(result.subject.named_model)} read {counts.scanned:,} tokens and was sure of {counts.sure:,}; "
        f"{counts.repeated:,} of these repeat what stood before. Of the others {counts.kept:,} were grouped into "
        f"{len(result.clusters):,} clusters by {_BY[result.vectors]}. Here are {len(result.behaviours)} of them, each "
        "with the latents that cause its predictions."
    )


def _steady(index: float) -> str:
    return "much the same" if index > 0.8 else "in part the same" if index > 0.4 else "differently"


def _card(result: BehavioursResult, b: Behaviour, folder: Path | None) -> str:
    cluster = result.clusters[b.place]
    facts = (
        f"{cluster.size:,} contexts from {counted(b.documents, 'document')}; alike {number(cluster.coherence, 2)}, "
        f"random {number(cluster.control, 2)} ± {number(cluster.spread, 1)}; circuit on {b.examples} of them: "
        f"{counted(b.latents, 'latent')}, {counted(b.errors, 'error')}, {counted(b.edges, 'edge')}"
    )
    chips = "".join(f'<span class="uw-times">{token_chip(answer)} {count}</span>' for answer, count in b.answers)
    lines = [_context(context) for context in b.contexts]
    hidden = "".join(lines[_FIRST:])
    words = " ".join(
        [name(b)]
        + [answer for answer, _ in b.answers]
        + ["".join([*context.tokens, context.answer]) for context in b.contexts]
        + [latent.name for latent in b.strongest]
    )
    return (
        f'<article class="uw-card" id="behaviour-{b.place}" data-place="{b.place}" data-size="{cluster.size}" '
        f'data-coherence="{cluster.coherence:.4f}" data-nodes="{b.latents + b.errors}" data-text="{esc(words)}">'
        f'<header><h3><a href="#behaviour-{b.place}">{b.place + 1}</a>{esc(label(b))}</h3>'
        f'<p class="uw-facts">{esc(facts)}</p></header>'
        f'<dl class="uw-logits"><dt>Answers</dt><dd>{chips}</dd></dl>'
        f'<p class="uw-kind">The most typical contexts</p>{"".join(lines[:_FIRST])}'
        + (f"<details><summary>{len(lines) - _FIRST} more contexts</summary>{hidden}</details>" if hidden else "")
        + _latents(b.strongest)
        + _circuit(b, folder)
        + "</article>"
    )


def _context(context: Context) -> str:
    shown = "".join(_text(token) for token in context.tokens[-_TAIL:])
    blank, text = split_blank(context.answer)
    before = "…" if len(context.tokens) > _TAIL else ""
    title = f"{len(context.tokens)} tokens before it; −log p = {context.loss:.3f}"
    return (
        f'<p class="uw-context">{before}{esc(shown)}{" " if blank else ""}'
        f'<mark title="{esc(title)}">{esc(text)}</mark></p>'
    )


def _text(token: str) -> str:
    return token if token.strip(" ") == "" else (" " if token.startswith(" ") else "") + split_blank(token)[1]


def _latents(latents: tuple[StrongLatent, ...]) -> str:
    if not latents:
        return ""
    lines = []
    for latent in latents:
        sign = "uw-more" if latent.effect > 0 else "uw-less"
        words = " ".join(token_chip(text, value) for text, value in latent.promoted)
        if latent.firing is not None:
            firing = latent.firing
            entry = ContextEntry("top", firing.tokens, firing.activations, firing.peak)
            words += context_html(entry, max(firing.activations))
        lines.append(
            f'<b>{esc(latent.name)}</b><span class="uw-num {sign}">{number(latent.effect, 2)}</span><div>{words}</div>'
        )
    return (
        f"<details><summary>The {len(latents)} strongest latents: what ablating each costs, in units of the metric"
        f'</summary><div class="uw-latents">{"".join(lines)}</div></details>'
    )


def _circuit(behaviour: Behaviour, folder: Path | None) -> str:
    place = f" Kept in <code>{esc(behaviour.run)}</code>." if behaviour.run else ""
    if not behaviour.latents + behaviour.errors:
        return f'<p class="uw-facts">No node is above the threshold.{place}</p>'
    if folder is None or behaviour.drawing is None or not (folder / behaviour.drawing).is_file():
        return f'<p class="uw-facts">{place}</p>' if place else ""
    svg = (folder / behaviour.drawing).read_text(encoding="utf-8")
    return (
        f'<details><summary>The circuit</summary><div class="uw-drawing">{svg}</div>'
        f'<p class="uw-facts">{place}</p></details>'
    )
