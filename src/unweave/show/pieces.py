"""Small pieces of HTML: escaped text, highlighted tokens, cards and tables.

All take plain values and return a string; the classes they use are styled by ``pieces.css`` under a ``.uw`` root.
``explorer.js`` draws the same markup in the browser, so both change together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape

from unweave.core.intervals import Interval
from unweave.show.model import ContextEntry, LatentEntry, Number
from unweave.show.theme import HEAT_LEVELS, asset, palette_css

KINDS = {"top": "Where it fires most strongly", "quantile": "Across its range", "random": "Random contexts"}
"""The headings of the groups of contexts, in the order shown."""

_SIGNS = {code: chr(0x2400 + code) for code in range(32)} | {0x0A: "↵", 0x09: "⇥", 0x7F: "␡"}
_SIGNS |= dict.fromkeys(range(0xD800, 0xE000), "�")
_INVISIBLE = (*range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF)
_SIGNS |= {code: f"[U+{code:04X}]" for code in _INVISIBLE}


def clean(text: str) -> str:
    """Return ``text`` with lone surrogates, which no UTF-8 file can hold, as the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def esc(text: object) -> str:
    """Return ``text`` safe inside an element or a quoted attribute."""
    return escape(clean(str(text)), quote=True)


def visible(token: str) -> str:
    """Return the token as plain text in which a newline, a tab, blanks alone and control characters can be seen."""
    if not token:
        return "∅"
    return "␣" * len(token) if token.strip(" ") == "" else token.translate(_SIGNS)


def number(value: Number, digits: int = 3) -> str:
    """Return ``value`` to ``digits`` significant digits with thousands separated; "n/a" for None and NaN."""
    if value is None or not math.isfinite(value):
        return "n/a"
    if float(value).is_integer() and abs(value) >= 10 ** (digits - 1):
        return f"{int(value):,}"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        return f"{value:.{max(digits - 1, 0)}e}"
    return f"{value:,.{max(digits - 1 - size, 0)}f}".replace("-", "\u2212")


def bounded(mean: Interval | None, digits: int = 2) -> str:
    """Return e.g. "0.83 [0.80, 0.86]" with ``digits`` decimals; the mean alone if it has no bounds, "n/a" for None."""
    if mean is None:
        return "n/a"
    bounds = "" if mean.low is None or mean.high is None else f" [{mean.low:.{digits}f}, {mean.high:.{digits}f}]"
    return f"{mean.value:.{digits}f}{bounds}"


def percent(fraction: Number, digits: int = 2) -> str:
    """Return a fraction as a percentage to ``digits`` significant digits, e.g. 0.0042 as "0.42 %"."""
    if fraction is None or not math.isfinite(fraction):
        return "n/a"
    if 0.1 <= abs(fraction) < 1:
        # near 100 % the distance to 100 is what matters: never round it away
        tries = (f"{fraction * 100:.{places}f}" for places in range(1, 5))
        text = next((text for text in tries if not text.lstrip("-").startswith("100")), "99.9999")
        return text.removesuffix(".0").replace("-", "\u2212") + "\u202f%"
    return number(fraction * 100, digits).removesuffix(".0") + "\u202f%"


def capital(text: str) -> str:
    """The text with its first letter as a capital."""
    return f"{text[:1].upper()}{text[1:]}"


def counted(n: int, noun: str) -> str:
    """ "1 node", "1,200 nodes" """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def split_blank(token: str) -> tuple[bool, str]:
    """Return whether the token is a word after one blank, and what ``visible`` makes of it without that blank."""
    blank = token.startswith(" ") and token.strip(" ") != ""
    return blank, visible(token[1:] if blank else token)


def token_chip(token: str, value: float | None = None) -> str:
    """Return one token alone, e.g. in a list of promoted tokens; a leading blank is drawn as a faint dot."""
    blank, shown = split_blank(token)
    text = ('<span class="uw-blank">·</span>' if blank else "") + esc(shown)
    title = esc(repr(clean(token)) + ("" if value is None else f"  {value:+.3g}"))
    return f'<span class="uw-chip" title="{title}">{text}</span>'


def chips(pairs: Iterable[tuple[str, float]]) -> str:
    """Return the tokens of (token, value) pairs in a row."""
    return "".join(token_chip(token, value) for token, value in pairs) or '<span class="uw-none">none</span>'


def level(activation: float, scale: float) -> int:
    """Return the highlight step 0..HEAT_LEVELS of an activation whose largest is ``scale``; it is 0 only at zero."""
    if not (activation > 0 and scale > 0):
        return 0
    return max(1, min(HEAT_LEVELS, round(activation / scale * HEAT_LEVELS)))


def context_html(context: ContextEntry, scale: float) -> str:
    """Return the context as a line of tokens, each highlighted by its activation over ``scale``, the latent's largest.

    A leading blank stays outside the highlight, so that a colour never hangs at the end of a wrapped line.
    """
    spans = []
    for position, (token, activation) in enumerate(zip(context.tokens, context.activations, strict=True)):
        step = level(activation, scale)
        names = [f"uw-a{step}"] if step else [] if token.strip() else ["uw-blank"]
        names += ["uw-peak"] if position == context.peak else []
        classes = f' class="{" ".join(names)}"' if names else ""
        title = f' title="{esc(repr(clean(token)))}  {activation:.3g}"' if step else ""
        blank, text = split_blank(token)
        shown = f"<span{classes}{title}>{esc(text)}</span>" if names else esc(text)
        spans.append((" " if blank and position else "") + shown)
    return f'<p class="uw-context">{"".join(spans)}</p>'


def contexts_html(entry: LatentEntry) -> str:
    """Return the contexts under a heading per kind."""
    kinds = list(KINDS) + sorted({context.kind for context in entry.contexts} - set(KINDS))
    parts = []
    for kind in kinds:
        group = [context for context in entry.contexts if context.kind == kind]
        if not group:
            continue
        lines = "".join(_labelled(context, entry.max_activation) for context in group)
        parts.append(f'<h4 class="uw-kind">{esc(KINDS.get(kind, kind.capitalize()))}</h4>{lines}')
    return "".join(parts)


def _labelled(context: ContextEntry, scale: float) -> str:
    label = f'<span class="uw-label">{esc(context.label)}</span>' if context.label else ""
    return f'<div class="uw-row">{label}{context_html(context, scale)}</div>'


def rate_text(rate: float) -> str:
    """Return the firing rate in words: "0.42 % of tokens, one in 238"."""
    if not rate > 0:
        return "never fires"
    return f"fires on {percent(rate)} of tokens" + (f", one in {round(1 / rate):,}" if rate < 0.5 else "")


def latent_link(index: int) -> str:
    """Return a link that opens the latent in the page's explorer."""
    return f'<a class="uw-latent" href="#latent-{index}">{index}</a>'


def card(entry: LatentEntry, heading: str | None = None) -> str:
    """Return one latent as a card without its style sheet; ``heading`` is HTML in place of "Latent N"."""
    if entry.max_activation > 0:
        facts = f"{rate_text(entry.firing_rate)}; strongest activation {number(entry.max_activation)}"
    else:
        facts = "never fired on the text that was read"
    note = f'<p class="uw-note">{esc(entry.note)}</p>' if entry.note else ""
    return (
        f'<article class="uw-card"><header><h3>{heading or f"Latent {entry.index}"}</h3>'
        f'<p class="uw-facts">{esc(facts)}</p></header>{note}{logits_html(entry)}{contexts_html(entry)}</article>'
    )


def logits_html(entry: LatentEntry) -> str:
    """Return the tokens that the latent raises and lowers most; nothing where none is known."""
    rows = [("Raises", entry.promoted), ("Lowers", entry.suppressed)]
    logits = "".join(f"<dt>{name}</dt><dd>{chips(pairs)}</dd>" for name, pairs in rows if pairs)
    return f'<dl class="uw-logits">{logits}</dl>' if logits else ""


def latent_html(entry: LatentEntry) -> str:
    """Return one latent as a card that brings its own style, fit for a notebook's ``_repr_html_``."""
    return f'<div class="uw uw-embed"><style>{palette_css()}{asset("pieces.css")}</style>{card(entry)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = (), name: str = "") -> str:
    """Return a table; cells are HTML, headings text, ``numeric`` the columns set flush right, ``name`` its caption."""
    kind = ["uw-num" if column in numeric else "" for column in range(len(head))]
    attribute = [f' class="{name_}"' if name_ else "" for name_ in kind]
    top = "".join(f'<th scope="col"{a}>{esc(text)}</th>' for text, a in zip(head, attribute, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{a} data-head="{esc(text)}">{cell}</td>' for cell, text, a in zip(row, head, attribute, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    caption = f"<caption>{esc(name)}</caption>" if name else ""
    return f'<div class="uw-scroll"><table>{caption}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def missing(what: str, command: str) -> str:
    """Return the note that stands where a step was not run."""
    return f'<p class="uw-missing">{esc(what)} This step was not run; <code>{esc(command)}</code> runs it.</p>'


def threads(strands: int = 7, width: int = 704, height: int = 92) -> str:
    """Return the ornament at the head of the page: strands that are woven at the left and lie apart at the right."""
    paths = []
    for strand in range(strands):
        level = (strand + 0.5) / strands * height
        points = []
        for step in range(89):
            t = step / 88
            calm = 1 / (1 + math.exp(-16 * (t - 0.52)))
            wave = math.sin(2 * math.pi * (7 * t + strand * 0.5 + strand / strands * 0.35))
            woven = height / 2 + (level - height / 2) * 0.55 + wave * height * 0.17
            points.append(f"{t * width:.1f} {woven * (1 - calm) + level * calm:.1f}")
        paths.append(f'<path d="M{" L".join(points)}" opacity="{0.35 + 0.65 * (strand % 3 == 1):.2f}"/>')
    return (
        f'<svg class="uw-threads" viewBox="0 0 {width} {height}" aria-hidden="true" fill="none" stroke="currentColor" '
        f'stroke-width="1.6" stroke-linejoin="round">{"".join(paths)}</svg>'
    )


def duration(seconds: float) -> str:
    """Return a time as "4.2 s", "3 min 20 s" or "1 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def strongest_contexts(entry: LatentEntry) -> LatentEntry:
    """The latent with only its few strongest contexts, for a card among others."""
    return replace(entry, contexts=[context for context in entry.contexts if context.kind == "top"][:4])
