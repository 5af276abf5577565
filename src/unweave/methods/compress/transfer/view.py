"""The study of SAEs on compressed models as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from unweave.core.intervals import Interval
from unweave.core.result import Row
from unweave.methods.compress.result import Loss
from unweave.methods.compress.transfer import figures
from unweave.methods.compress.transfer.result import ALIKE, ORIGINAL, Overlap, Transfer
from unweave.show.page import ALONE, Around, Section, Tile, beside, figure
from unweave.show.pieces import bounded, esc, number, percent, table

HEAD = ("Site", "SAE", "Model", "Explained variance", "Cosine", "L0", "Loss with it", "Recovered", "KL",
        "Latents: mean r", f"r at least {ALIKE:g}", "Labels: AUROC", "Steering: alike")  # fmt: skip


def rows(result: Transfer) -> list[Row]:
    """What each compression costs, and of every SAE in the compressed model fit and survival."""
    lines: list[Row] = [("model", result.subject.named_model, f"{result.tokens:,} held-out tokens")]
    lines += [(one.words, round(math.exp(min(one.loss.after, 700.0)), 3), damage_words(one.loss))
              for one in result.compressions]  # fmt: skip
    for cell in result.cells:
        if cell.on == "compressed":
            lived = "" if cell.survival is None else f"; latents' mean r {bounded(cell.survival.every.mean, 3)}"
            lines.append((f"{cell.site}, {cell.form}", cell.metrics.explained_variance,
                          f"explained variance; loss {cell.metrics.ce_sae:.3f}{lived}"))  # fmt: skip
    return lines


def damage_words(loss: Loss) -> str:
    """ "perplexity, 24.1 before; +0.12 [+0.10, +0.14] nats" """
    moved = Interval(loss.after - loss.before, loss.low, loss.high)
    return f"perplexity, {math.exp(min(loss.before, 700.0)):.3f} before; {bounded(moved, 3)} nats"


def cells_table(result: Transfer) -> Iterator[tuple[str, ...]]:
    """A line for each form of each SAE in each model."""
    for cell in result.cells:
        m = cell.metrics
        lived = cell.survival.every if cell.survival else None
        yield (
            str(cell.site), cell.form, cell.on, number(m.explained_variance), number(m.cosine), number(m.l0),
            f"{m.ce_sae:.3f}", number(m.recovered_vs_mean), f"{m.kl_sae:.3f}",
            "" if lived is None else bounded(lived.mean, 3), "" if lived is None else percent(lived.alike),
            "" if cell.told is None else bounded(cell.told.auroc),
            "" if cell.steered is None else bounded(cell.steered.alike),
        )  # fmt: skip


def section(result: Transfer, around: Around = ALONE) -> Section:
    """The table, the sweep of sparsity, survival by firing rate, and damage over compressions."""
    del around
    main = result.compressions[0]
    lead = (
        f"{result.subject.named_model}, and the same {main.words}: {damage_words(main.loss)}. Every SAE was "
        "measured in both models on the same tokens. Latents are followed by their activations on "
        f"{result.tokens:,} tokens: r is the correlation with the original SAE's latent of the same number in the "
        "original model. A retrained SAE has latents of its own, so none are followed."
    )
    drawn = [
        figure(figures.sweep(result, "unexplained"), "What pruned SAEs leave unexplained in the compressed model; "
               "crosses: trained anew."),
        figure(figures.sweep(result, "loss"), "The compressed model's loss with the SAE in place, above its own."),
        figure(figures.rates(result), "Mean correlation of the original SAE's latents in the compressed model, by how "
               "often they fire."),
    ]  # fmt: skip
    if len(result.compressions) > 1:
        drawn.append(figure(figures.damage(result), "Damage to latents over what the compression costs the model."))
    lines = [tuple(map(esc, line)) for line in cells_table(result)]
    body = [
        f'<p>{esc(lead)}</p><div class="uw-wide">{table(HEAD, lines, tuple(range(3, len(HEAD))))}</div>',
        *(beside(*drawn[i : i + 2]) for i in range(0, len(drawn), 2)),
        _effects(result), _compressions(result), _overlaps(result), _predictors(result),
    ]  # fmt: skip
    lived = [cell.survival.every for cell in result.cells
             if cell.survival and (cell.form, cell.on) == (ORIGINAL, "compressed")]  # fmt: skip
    values = [one.mean.value for one in lived if one.mean is not None]
    mean = sum(values) / len(values) if values else None
    tiles = (Tile(number(mean, 2), "mean correlation of latents", f"original SAEs, {main.words}; over sites"),)
    note = (f"The model's weights are {result.subject.note}.",) if result.subject.note else ()
    return Section("Compressed models", "SAEs of a compressed model", "".join(body), tiles=tiles, notes=note)


def _effects(result: Transfer) -> str:
    """Labels and steering beside their controls."""
    lines = []
    for cell in result.cells:
        told, steered = cell.told, cell.steered
        if told is not None or steered is not None:
            of_labels = ("", "") if told is None else (f"{bounded(told.change)} of {told.pairs}", number(told.shuffled))
            of_steering = ("", "", "") if steered is None else (
                f"{bounded(steered.size, 3)}, {number(steered.size_before)} before", bounded(steered.alike),
                bounded(steered.random_alike))  # fmt: skip
            lines.append((str(cell.site), cell.form, cell.on, *of_labels, *of_steering))
    head = ("Site", "SAE", "Model", "AUROC, change over pairs", "shuffled labels", "Steering: KL", "alike",
            "random directions")  # fmt: skip
    return _part("Labels and steering", head, lines, 3)


def _compressions(result: Transfer) -> str:
    """Every way to compress; numbers of SAEs are means over sites, with the least and the most."""
    if len(result.compressions) == 1:
        return ""
    lines = []
    for one in result.compressions:
        lived = [site.survival.every for site in one.sites]
        columns = (
            [1 - site.unexplained_variance for site in one.sites],
            [1 - site.unexplained_before for site in one.sites],
            [every.mean.value for every in lived if every.mean is not None],
            [every.alike for every in lived if every.alike is not None],
        )
        lines.append((one.words, damage_words(one.loss), *map(_spread, columns)))
    head = ("Compression", "Model", "Original SAEs explain", "before", "Latents: mean r", f"r at least {ALIKE:g}")
    return _part("Ways to compress (over sites: mean, least to most)", head, lines, 2)


def _spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f} ({min(values):.2f} to {max(values):.2f})" if values else "n/a"


def _overlaps(result: Transfer) -> str:
    """Rank correlation of damage and the shared worst tenth, means over sites, of each pair of compressions."""
    by: dict[tuple[str, str], list[Overlap]] = {}
    for one in result.overlaps:
        by.setdefault((one.one, one.other), []).append(one)
    names = [one.words for one in result.compressions]
    lines = []
    for name in names[:-1]:
        cells = []
        for other in names[1:]:
            some = by.get((name, other), [])
            rank, shared = (sum(values) / max(1, len(some)) for values in
                            ([o.rank_correlation for o in some], [o.shared for o in some]))  # fmt: skip
            cells.append(f"{rank:.2f} ({percent(shared)})" if some else "")
        lines.append((name, *cells))
    heading = "Do they damage the same latents? (rank correlation of damage; shared of the worst tenth, 10 % by chance)"
    return _part(heading, ("", *names[1:]), lines, 1)


def _predictors(result: Transfer) -> str:
    lines = []
    for one in result.predictors:
        weights = "; ".join(f"{name} {weight:+.2f}" for name, weight in one.weights.items())
        other = "; ".join(f"{name}: {rank:.2f}" for name, rank in one.elsewhere.items())
        explained = bounded(Interval(one.explained, one.low, one.high))
        lines.append((str(one.site), f"{one.latents:,}", explained, number(one.rank_correlation), weights, other))
    head = (
        "Site",
        "Latents",
        "R² held out",
        "Rank correlation",
        "Weights, per standard deviation",
        "Damage by others",
    )
    return _part("Which latents will be damaged", head, lines, 1)


def _part(heading: str, head: Sequence[str], lines: Sequence[Sequence[str]], numbers_from: int) -> str:
    """A heading with a table; nothing where it has no lines."""
    if not lines:
        return ""
    cells = [tuple(map(esc, line)) for line in lines]
    shown = table(tuple(map(esc, head)), cells, tuple(range(numbers_from, len(head))))
    return f'<h3>{esc(heading)}</h3><div class="uw-wide">{shown}</div>'
