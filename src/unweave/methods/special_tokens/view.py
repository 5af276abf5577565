"""Special tokens as rows, as a section of a page, and as the tables and figures of a run. Needs no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unweave.core.result import Row
from unweave.core.writing import write_file
from unweave.methods.special_tokens import figures
from unweave.methods.special_tokens.result import (
    GROUPS,
    Answer,
    Level,
    SpecialTokenResult,
    Steering,
    SweetSpot,
    TokenMaxima,
)
from unweave.show.page import ALONE, Around, Section, Tile, figure
from unweave.show.pieces import esc, latent_link, number, percent, table, token_chip


def rows(result: SpecialTokenResult) -> list[Row]:
    """Norms, errors of every group of tokens, and what steering did at every alpha."""
    errors, swept = result.errors, result.steering.sweep
    shown: list[Row] = [
        ("model", result.subject.named_model, ""),
        ("conversations", errors.sequences, f"{errors.everything.all.tokens:,} tokens"),
        ("median norm", errors.median_norm, f"at {errors.site_read}, where the SAE reads; first tokens: "
         f"{errors.median_norm_first:.4g}"),
    ]  # fmt: skip
    if errors.median_norm_write is not None:  # a transcoder's other site, which is where a latent is added
        shown.append(("median norm, written", errors.median_norm_write, f"at {errors.site}, where it writes"))
    shown.append(("norm outliers", errors.outliers, f"tokens longer than {errors.max_norm:.4g}"))
    for group in GROUPS:
        whole, rest = errors.everything.of(group), errors.without_outliers.of(group)
        if whole.tokens:
            without = "-" if rest.log2_mse is None else f"{rest.log2_mse:.3f}"
            spread = "-" if rest.unexplained_variance is None else f"{rest.unexplained_variance:.3f}"
            words = f"without outliers {without}, unexplained variance {spread}; {whole.tokens:,} tokens"
            shown.append((f"log2 MSE, {group}", whole.log2_mse, words))
    shown.append(("steered latent", swept.latent, chosen(result)))
    for level in swept.levels:
        ratio = level.perplexity_ratio
        words = f"distinct 3-grams {level.distinct.value:.2f}, perplexity x {ratio.value:.2f}" if ratio else "no text"
        shown.append((f"alpha {level.alpha:g}: words changed", level.words_changed.value, words))
    random = result.steering.control_sweet_spot
    beside = "" if random is None else f"random latents: {_span(random)}; "
    unharmed = f"{beside}where answers change and do not fall apart. Whether any is better was not measured"
    shown.append(("sweet spot", _span(result.steering.sweet_spot), unharmed))
    return [*shown, *(("note", note, "") for note in errors.notes)]


def _span(spot: SweetSpot) -> str:
    return f"alpha {spot.alphas[0]:g} to {spot.alphas[-1]:g}" if spot.alphas else "none"


def chosen(result: SpecialTokenResult) -> str:
    """Why this latent was steered with."""
    token = next((m for m in result.maxima if m.id == result.steering.token), None)
    if token is None:
        return "named"
    value = token.top[0][1]
    return f"largest average maximum on {token.text!r}: {value:.3g} over {token.conversations:,} conversations"


def finding(steered: Steering) -> str:
    """Where the answers change and do not fall apart, in sentences."""
    spot, control = steered.sweet_spot, steered.control_sweet_spot
    rule = (
        f"at least {spot.min_answers_changed:.0%} of the answers change, distinct 3-grams fall by at most "
        f"{spot.max_distinct_loss:g} and perplexity rises at most {spot.max_perplexity_ratio:g} times"
    )
    latent = steered.sweep.latent
    if spot.alphas:
        certain = "and the intervals of both lie within that too" if spot.certain else ""
        span, doubt = f"from {_span(spot)} ({steered.unit})", "though not with their whole intervals"
        words = f"With latent {latent}, {span}, {rule}, {certain or doubt}."
    else:
        words = f"With latent {latent} there is no alpha at which {rule}."
    if control is not None:
        other = f"from {_span(control)}" if control.alphas else "at no alpha"
        words += f" With latents drawn at random, moved by the same lengths, the same holds {other}."
    return f"{words} Whether any answer is better was not measured."


# -- the page ---------------------------------------------------------------------------------------------------------


def section(result: SpecialTokenResult, around: Around = ALONE) -> Section:
    """Errors by group, the latents of each special token, and the answers along alpha."""
    errors, steered = result.errors, result.steering
    lead = (
        f"{errors.sequences:,} held-out conversations of {errors.everything.all.tokens:,} tokens, "
        f"{errors.everything.special.tokens:,} of them special. The median activation is {errors.median_norm:.4g} "
        f"long, a conversation's first {errors.median_norm_first:.4g}; {errors.outliers:,} tokens are longer than "
        f"{errors.max_norm:.4g}, the limit for norm outliers."
    )
    drawn = figures.as_text(
        lambda c: figures.errors(errors, c), f"{around.name}-errors", "Errors of every group of tokens"
    )
    swept = figures.as_text(lambda c: figures.steering(steered, c), f"{around.name}-alpha", "Answers along alpha")
    moved = (
        f"Latent {steered.sweep.latent} ({esc(chosen(result))}) is added at every position of prompt and answer, the "
        f"tokens that the SAE's policy excludes among them; an alpha of 1 moves each by {steered.sweep.unit:.4g}."
    )
    body = [
        f"<p>{esc(lead)}</p>",
        figure(drawn, "The error of each group of tokens, lower is better: with all tokens, and without the few whose "
               "activations are so long that they decide every mean."),
        _errors_table(result),
        "<h3>Latents of special tokens</h3>",
        _maxima_table(result.maxima, around),
        f"<h3>Steering</h3><p>{moved}</p><p>{esc(finding(steered))}</p>",
        f'<div class="uw-wide">{figure(swept, "What changes along alpha, beside latents drawn at random.")}</div>',
        _levels_table(steered.sweep.levels),
        f"<details><summary>Every answer</summary>{_answers_table(steered.sweep.answers)}</details>",
    ]  # fmt: skip
    special, tiles = errors.everything.special.log2_mse, ()
    if special is not None:
        tiles = (Tile(f"{special:.2f}", "log2 MSE, special tokens", "Lower is better."),)
    heading, notes = f"Special tokens: {esc(errors.site)}", (*result.subject.notes, *errors.notes)
    return Section("Special tokens", heading, "".join(body), tiles=tiles, notes=notes)


def _errors_table(result: SpecialTokenResult) -> str:
    lines = []
    for group in GROUPS:
        whole, rest = result.errors.everything.of(group), result.errors.without_outliers.of(group)
        if whole.tokens:
            numbers = (whole.log2_mse, rest.log2_mse, whole.unexplained_variance, rest.unexplained_variance, whole.l0)
            lines.append((esc(figures.NAMES.get(group, group)), f"{whole.tokens:,}", *map(number, numbers)))
    without = "without outliers"
    head = ("Tokens", "Count", "log2 MSE", without, "Unexplained variance", f"{without} ", "L0")
    return table(head, lines, (1, 2, 3, 4, 5, 6), "Errors")


def _maxima_table(maxima: Sequence[TokenMaxima], around: Around) -> str:
    def latents(top: Sequence[tuple[int, float]]) -> str:
        pairs = ((latent_link(j) if j in around.entries else str(j), value) for j, value in top)
        return ", ".join(f"{shown} ({number(value)})" for shown, value in pairs) or "none"

    lines = [
        (token_chip(m.text), f"{m.conversations:,}", latents(m.top), latents(m.top_without_outliers)) for m in maxima
    ]
    head = ("Token", "Conversations", "Latents, with their largest values on average", "Without norm outliers")
    return table(head, lines, (1,))


def _levels_table(levels: Sequence[Level]) -> str:
    lines = [
        (
            f"{level.alpha:g}", number(level.length), percent(level.answers_changed.value),
            percent(level.words_changed.value), number(level.distinct.value),
            number(level.perplexity_ratio.value if level.perplexity_ratio else None), percent(level.empty),
        )
        for level in levels
    ]  # fmt: skip
    head = ("Alpha", "Moved by", "Answers changed", "Words changed", "Distinct 3-grams", "Perplexity, times", "Empty")
    return table(head, lines, tuple(range(7)))


def _answers_table(answers: Sequence[Answer]) -> str:
    lines = [(esc(answer.question), f"{answer.alpha:g}", esc(answer.text)) for answer in answers]
    return table(("Question", "Alpha", "Answer"), lines, (1,))


# -- files ------------------------------------------------------------------------------------------------------------


def write(result: SpecialTokenResult, folder: Path) -> None:
    """Writes errors.csv, maxima.csv, steering.csv and answers.csv; errors and steering as .svg and .png."""
    errors, swept = result.errors, result.steering.sweep
    wholes = {"all": errors.everything, "without outliers": errors.without_outliers}
    by_group = [{"tokens_of": w, "group": g} | asdict(wholes[w].of(g)) for w in wholes for g in GROUPS]
    levels = [(str(swept.latent), swept.levels), ("random", swept.control_levels)]
    tables = {
        "errors": by_group,
        "maxima": [row for token in result.maxima for row in _maxima_rows(token)],
        "steering": [{"latent": n} | _flat(asdict(level)) for n, group in levels for level in group],
        "answers": [asdict(answer) for answer in (*swept.answers, *swept.control_answers)],
    }
    for name, lines in tables.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, dict.fromkeys(column for line in lines for column in line))
        writer.writeheader()
        writer.writerows(lines)
        write_file(folder / f"{name}.csv", text.getvalue())
    drawings: dict[str, figures.Draw] = {
        "errors": lambda colours: figures.errors(errors, colours),
        "steering": lambda colours: figures.steering(result.steering, colours),
    }
    for name, draw in drawings.items():
        write_file(folder / f"{name}.svg", figures.as_text(draw, name, name) + "\n")
        write_file(folder / f"{name}.png", figures.as_picture(draw))


def _maxima_rows(token: TokenMaxima) -> list[dict[str, Any]]:
    tops = {"all": (token.conversations, token.top)}
    tops["without outliers"] = (token.conversations_without_outliers, token.top_without_outliers)
    about = {"id": token.id, "text": token.text}
    return [
        about | {"tokens_of": which, "conversations": n, "rank": rank, "latent": latent, "value": value}
        for which, (n, top) in tops.items()
        for rank, (latent, value) in enumerate(top, 1)
    ]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Intervals as three columns."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        columns = value if isinstance(value, dict) else {"mean": value}
        flat |= {name if part == "mean" else f"{name}_{part}": v for part, v in columns.items()}
    return flat
