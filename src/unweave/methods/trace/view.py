"""A trace as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

from unweave.attribute.result import incomplete
from unweave.core.result import Row
from unweave.methods.trace.figures import attribution_scatter
from unweave.methods.trace.result import Effect, Estimate, Group, Trace
from unweave.show.model import LatentEntry
from unweave.show.page import ALONE, Around, Section, Tile, beside, figure
from unweave.show.pieces import capital, card, chips, esc, latent_link, number, strongest_contexts, table

NAMES: dict[Estimate, str] = {
    "ig": "Integrated gradients",
    "attribution": "Attribution patching",
    "exact": "The clean end alone",
}
GROUPS: dict[Group, str] = {"chosen": "Chosen latents", "weaker": "Without the strongest", "random": "Random latents"}


def task_words(result: Trace) -> str:
    """ "subject-verb agreement: across pp" """
    return f"subject-verb agreement: {result.task.replace('_', ' ')}"


def rows(result: Trace) -> list[Row]:
    """How much the strongest carry, and whether their order can be believed."""
    totals, top = result.totals, sum(effect.chosen for effect in result.effects)
    right = f"the model is right on {result.right_clean:.0%} (clean) and {result.right_patch:.0%} (patch)"
    head: list[Row] = [
        ("task", task_words(result), ""),
        ("pairs", result.examples, right),
        ("change", totals.change, "of the metric, when the whole site is patched"),
    ]
    if result.problem is not None:
        return [*head, ("strongest together", None, result.problem), ("order, Spearman", None, result.problem)]
    first = result.strongest()[0]
    one_by_one = f"{first.exact:+.3f} from the clean end, {first.exact_patch:+.3f} from the patched one"
    return [
        *head,
        ("strongest together", result.share, f"of the change: the {top} latents with the largest estimate"),
        ("strongest latent", first.latent, one_by_one),
        ("sum of estimates", totals.ig, "integrated gradients of all latents and the error; should be the change"),
        ("error", totals.ig_error, "of that is what the SAE does not explain"),
        ("order, Spearman", result.spearman("ig", "chosen"), "integrated gradients with the mean of both ends"),
        ("... but the strongest", result.spearman("ig", "weaker"), "the same without the strongest latent"),
        ("... random latents", result.spearman("ig", "random"), "the same of latents drawn at random"),
    ]


def metric_words(result: Trace) -> str:
    """The metric in a sentence, with its values at both ends."""
    example, totals = result.example, result.totals
    return (
        f"logit({example.patch_answer.strip()}) - logit({example.clean_answer.strip()}) and the like at the "
        f"last token: {totals.metric_clean:.2f} on the clean sentences, {totals.metric_patched:.2f} with the whole "
        f"site patched. The model prefers the right answer in {result.right_clean:.0%} of the clean and "
        f"{result.right_patch:.0%} of the patch sentences; chance is half"
    )


def finding(result: Trace) -> str:
    """The result in sentences."""
    if result.problem is not None:
        return f"{capital(result.problem)}."
    first, totals = result.strongest()[0], result.totals
    top = sum(effect.chosen for effect in result.effects)
    share = "" if result.share is None else f" ({result.share:.0%} of it)"
    orders = "; ".join(
        f"{name[0].lower()}{name[1:]} {number(result.spearman(key, 'chosen'), 2)}, without that latent "
        f"{number(result.spearman(key, 'weaker'), 2)}"
        for key, name in NAMES.items()
    )
    words = (
        f"Patching the whole site changes the metric by {totals.change:+.2f}. The {top} strongest latents together "
        f"change it by {totals.top_together:+.2f}{share}, latent {first.latent} alone by {first.exact:+.2f} from the "
        f"clean end and {first.exact_patch:+.2f} from the patched one. Agreement in order (Spearman) with the mean "
        f"of both ends: {orders}."
    )
    return words if result.diagnosis is None else f"{words} {result.diagnosis.text}"


def named(result: Trace) -> dict[str, list[int]]:
    """Latents that a list of all latents can be filtered by."""
    return {task_words(result): [effect.latent for effect in result.strongest()]}


def section(result: Trace, around: Around = ALONE) -> Section:
    """The latents that cause the behaviour: estimates against the measured effect."""
    parts = [
        f"<p>Which latents does the model use for {esc(task_words(result))}? Over {result.examples:,} pairs of "
        "sentences, each latent was given the value that it has in the pair's other sentence. The change this makes is "
        "its effect, while all other latents stay as they are, or while all have the values of the other sentence; "
        "where latents act on one another the two differ, and their mean is the fairer share. "
        "Measuring takes runs of the model for every latent, so estimates that need only a few gradients pick the "
        f"candidates, and measurements test the estimates. {esc(metric_words(result))}</p>"
    ]
    chosen = result.strongest()
    if result.share is not None:
        parts.append(
            f"<p>Moved together, the {len(chosen)} strongest latents make <b>{result.share:.0%}</b> of the change.</p>"
        )
    example = result.example
    parts.append(
        f'<dl class="uw-pair"><dt>clean</dt><dd>{esc(f"{example.clean} →{example.clean_answer}")}</dd>'
        f"<dt>patch</dt><dd>{esc(f'{example.patch} →{example.patch_answer}')}</dd></dl>"
    )
    parts.append(beside(*(_scatter(result, estimate) for estimate in ("ig", "attribution"))))
    parts += [_agreement(result)] if result.agreements else []
    parts.append(f"<p>{esc(finding(result))}</p>")
    parts.append(_effects(chosen, around))
    recorded = [effect for effect in chosen if effect.latent in around.entries][:3]
    if recorded:
        cards = "".join(card(strongest_contexts(around.entries[e.latent]), _card_heading(e)) for e in recorded)
        parts.append(f'<div class="uw-wide uw-cards">{cards}</div>')
    warning = incomplete(result.sums)
    notes = (*result.subject.notes, *([f"{capital(warning)}."] if warning else []))
    heading = f"What causes what: {esc(result.site)}"
    return Section("Causes", heading, "".join(parts), tiles=_tiles(result), notes=notes)


def _tiles(result: Trace) -> tuple[Tile, ...]:
    if result.share is None:
        return ()
    words = (
        f"How much of the whole change in {task_words(result)} its {len(result.strongest())} strongest latents make "
        "when they move together"
    )
    order = result.spearman("ig", "weaker")
    if order is not None:  # without the strongest: one latent can make a correlation on its own
        words += f". Integrated gradients order them but the first as measurements do at {number(order)}; 1 is perfect"
    return (Tile(f"{result.share:.0%}", "of the effect found", f"{words}."),)


def _card_heading(effect: Effect) -> str:
    return f'Latent {latent_link(effect.latent)} <span class="uw-badge">effect {number(effect.measured)}</span>'


def _scatter(result: Trace, estimate: Estimate) -> str:
    caption = f"{NAMES[estimate]} against the measured effect, one dot per latent; on the dashed line both are equal."
    return figure(attribution_scatter(result, estimate), caption)


def _agreement(result: Trace) -> str:
    lines = [
        (f"{name}, {kind}", *(number(getattr(result, kind.lower())(estimate, group)) for group in GROUPS))
        for kind in ("Spearman", "Pearson")
        for estimate, name in NAMES.items()
    ]
    order = result.spearman("ig", "chosen")
    words = (
        f"Integrated gradients order the latents as measurements do at {number(order)} (Spearman; 1 is the same order, "
        "0 none). Pearson's correlation asks for the sizes, and one strong latent can make it on its own."
    )
    head = ("Agreement with the measured effect", *GROUPS.values())
    return ("" if order is None else f"<p>{words}</p>") + table(head, lines, (1, 2, 3))


def _effects(chosen: list[Effect], around: Around) -> str:
    ends = ("Mean of both ends", "From the clean end", "From the other end")
    head = ("Latent", "Fires on", *ends, "Integrated gradients", "Attribution patching")
    title = f"The {len(chosen)} strongest by estimate, largest measured effect first"
    lines = [_effect_row(effect, around.entries.get(effect.latent)) for effect in chosen]
    return table(head, lines, (2, 3, 4, 5, 6), title)


def _effect_row(effect: Effect, entry: LatentEntry | None) -> tuple[str, ...]:
    peaks = [(c.tokens[c.peak], 0.0) for c in entry.contexts if c.kind == "top"] if entry is not None else []
    fires = chips(list(dict.fromkeys(peaks))[:4]) if peaks else ""
    values = (effect.measured, effect.exact, effect.exact_patch, effect.ig, effect.attribution)
    return (latent_link(effect.latent), fires, *map(number, values))
