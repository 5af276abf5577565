"""A training run as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

import math
from functools import singledispatch
from pathlib import Path
from typing import Any

from unweave.core.result import Row, to_plain
from unweave.core.run import Run
from unweave.inputs.subject import Subject
from unweave.methods.train.result import Checkup, Curve, TrainedSAE, Training
from unweave.show.figures import COLOURS, HEIGHT, as_svg, drawing, finite, thin, tokens_axis
from unweave.show.page import ALONE, Around, Section, beside, figure
from unweave.show.pieces import esc, number, percent, table

_SHOWN = 12
"""SAEs that the terminal shows"""


@singledispatch
def rows(result: Training) -> list[Row]:
    """Tokens, what was left out where it is not 0, and how well each SAE does."""
    counts = result.text.get("counts", {})
    packing, dedup = counts.get("packing", {}), counts.get("dedup", {})
    left_out = {
        "near duplicates left out": dedup.get("dropped", 0),
        "conversations without an answer left out": packing.get("unanswered_conversations", 0),
        "conversations the template refused": packing.get("rejected_conversations", 0),
        "documents cut off": packing.get("truncated_documents", 0),
        "norm outliers left out": result.outliers_dropped,
        "tokens not finite left out": result.nonfinite_dropped,
    }
    lines: list[Row] = [
        ("training tokens", result.tokens, f"{result.distinct_tokens:,} distinct ones"),
        *((name, count, "") for name, count in left_out.items() if count),
    ]
    for sae in result.saes[:_SHOWN]:
        lines.append((sae.label, sae.reference.unexplained_variance, f"unexplained; L0 {sae.reference.l0:.1f}"))
    more = len(result.saes) - _SHOWN
    return [*lines, (f"... and {more} more", "", "in result.json")] if more > 0 else lines


@rows.register
def _(result: Checkup) -> list[Row]:
    cost: dict[str, Any] = to_plain(result.cost) if result.cost is not None else {}
    problems = result.problems or ("none found",)
    return [
        ("model", result.model, ""),
        *((name.replace("_", " "), value, "") for name, value in cost.items()),
        ("disk free gb", result.disk_free_gb, ""),
        *(("problem", problem, "") for problem in problems),
    ]


def section(result: Training, around: Around = ALONE) -> Section:
    """What was trained, on how much, and the loss on the way."""
    first = result.saes[0]
    note = f" ({esc(result.note)})" if result.note else ""
    words = (
        f"<p>Activations of {esc(result.model)}{note} are vectors of {first.d_in:,} numbers in which many meanings "
        "overlap. An SAE is trained to rebuild them from many more directions than numbers, few at a time, each meant "
        f"to stand for one thing. Training took {result.tokens:,} tokens, drawn from {result.distinct_tokens:,} "
        f"different ones ({result.epochs:.3g} passes over the text).</p>"
    )
    head = ("SAE", "Site", "Kind", "Latents", "Times its width", "Unexplained variance", "L0")
    listed = table(head, [_row(sae) for sae in result.saes], (3, 4, 5, 6))
    drawn = [_curve_figure(sae, around.folder) for sae in result.saes[:4]]
    body = words + listed + (beside(*filter(None, drawn)) if any(drawn) else "")
    return Section("Training", "What was trained", body, notes=Subject(result.model, result.note, (), {}).notes)


def _row(sae: TrainedSAE) -> tuple[str, ...]:
    site = str(sae.write) if sae.read == sae.write else f"{sae.read} to {sae.write}"
    kind = sae.kind + (f", k {sae.k}" if sae.k else "")
    times = f"{sae.latents / sae.d_in:.3g}"
    values = (number(sae.reference.unexplained_variance), number(sae.reference.l0))
    return (esc(sae.name or "sae"), esc(site), esc(kind), f"{sae.latents:,}", times, *values)


def _curve_figure(sae: TrainedSAE, folder: Path | None) -> str:
    curve = curve_of(sae, folder)
    if curve is None:
        return ""
    end = curve.dead_fraction[-1]
    share = "no latent" if end == 0 else f"{percent(end)} of the latents"
    caption = (
        f"{esc(sae.label)}: the unexplained variance during training ended at {number(curve.loss[-1])} on the training "
        f"text. Below it, the share of latents that had not fired for a while; at the end {share}."
    )
    return figure(loss_curve(curve), caption)


def curve_of(sae: TrainedSAE, folder: Path | None) -> Curve | None:
    """The course of training in the run's log. Lines that a crash made the run log twice count once; damaged ones are
    passed over."""
    if folder is None:
        return None
    logged = Run.at(folder).events("train")
    own = [e for e in logged if e.get("site") == str(sae.write) and e.get("sae", "") == sae.name]
    values: list[tuple[Any, ...]] = [(e.get("tokens"), e.get("fvu"), e.get("dead")) for e in own]
    by_tokens = {line[0]: line for line in values if all(map(_is_number, line))}
    if not by_tokens:
        return None
    tokens, loss, dead = zip(*(by_tokens[tokens] for tokens in sorted(by_tokens)), strict=True)
    return Curve(tokens, loss, tuple(n / sae.latents for n in dead))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def loss_curve(curve: Curve) -> str:
    """Return the loss against the tokens seen and, below it, the share of dead latents where it was recorded."""
    keep = thin(curve.tokens)
    tokens, loss = [curve.tokens[i] for i in keep], [curve.loss[i] for i in keep]
    later = [value for value in loss[len(loss) // 50 :] if math.isfinite(value)]
    with drawing(HEIGHT) as drawn:
        dead = curve.dead_fraction
        grid = drawn.add_gridspec(2 if dead else 1, 1, height_ratios=[2.6, 1] if dead else [1])
        top = drawn.add_subplot(grid[0])
        top.plot(tokens, loss, color=COLOURS["accent"], linewidth=1.6)
        top.set_ylim(0, 1.08 * max(later, default=1.0) or 1.0)
        top.set_ylabel("Unexplained variance")
        if finite(loss[-1]):
            top.annotate(
                f"{loss[-1]:.3g}", (tokens[-1], loss[-1]), xytext=(-3, 6), textcoords="offset points", ha="right",
                color=COLOURS["accent"], fontweight="bold",
            )  # fmt: skip
        bottom = top
        if dead:
            bottom = drawn.add_subplot(grid[1], sharex=top)
            bottom.fill_between(tokens, [100 * dead[i] for i in keep], color=COLOURS["warm"], alpha=0.35, linewidth=0)
            bottom.plot(tokens, [100 * dead[i] for i in keep], color=COLOURS["warm"], linewidth=1.2)
            bottom.set_ylim(0, max(5.0, 110 * max(dead)))
            bottom.set_ylabel("Dead, %")
            top.tick_params(labelbottom=False)
        tokens_axis(bottom, max(tokens, default=1.0))
        drawn.align_ylabels()
        return as_svg(drawn, "loss", "Unexplained variance against tokens of training")
