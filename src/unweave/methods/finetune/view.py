"""A fine-tuning as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

from unweave.core.result import Row
from unweave.methods.finetune.card import in_words, right
from unweave.methods.finetune.figures import course, projections
from unweave.methods.finetune.result import Finetuned, Split
from unweave.methods.finetune.select.view import diagnosis_html, edit_rows
from unweave.show.page import ALONE, Around, Section, Tile, beside, figure
from unweave.show.pieces import counted, esc, number, table


def rows(result: Finetuned) -> list[Row]:
    """What was trained under which condition, and the accuracies on every split."""
    weights = result.weights
    begins = "" if weights.begins is None else f"; passes begin at {weights.begins}"
    lines: list[Row] = [
        ("model", result.subject.named_model, result.data),
        ("condition", result.condition, result.selection or "nothing selected"),
        ("trained", f"{weights.trained:,}", f"of {weights.of:,} weights ({weights.kind}){begins}"),
        ("steps", result.steps, f"of {counted(result.batch, 'item')}, seed {result.seed}"),
        *(("left out", n, reason) for reason, n in result.skipped.items()),
    ]
    if result.diagnosis is not None:
        lines += edit_rows(result.diagnosis)
    return [*lines, *map(_row, result.splits), ("saved", str(result.folder), "needs nothing of Unweave")]


def _row(split: Split) -> Row:
    before, now = split.base, split.tuned
    if now.accuracy is None:
        ablated = "" if split.edited is None else f"; ablated at test {split.edited.loss:.4f}"
        return (split.name, f"{now.loss:.4f}", f"nats a token; the base model {before.loss:.4f}{ablated}")
    words = [f"{counted(split.items, 'item')}; the base model {in_words(right(before))}"]
    words += [f"ablated at test {in_words(right(split.edited))}"] if split.edited is not None else []
    words += [f"follows the cue {in_words(now.accuracy.cued)}"] if now.accuracy.cued is not None else []
    return (f"accuracy: {split.name}", in_words(now.accuracy.right), "; ".join(words))


def section(result: Finetuned, around: Around = ALONE) -> Section:
    """The course of training, and every split with and without the condition's edit."""
    weights = result.weights
    text = (
        f"<p>{esc(result.subject.named_model)} learnt from {esc(result.data)} for {counted(result.steps, 'step')} of "
        f"{counted(result.batch, 'item')} (seed {result.seed}) under the condition <b>{esc(result.condition)}</b>; "
        f"selection: {esc(result.selection or 'none')}. {weights.trained:,} of {weights.of:,} weights were trained "
        f"({esc(weights.kind)}). Accuracies are of the model as it is deployed, without any edit, unless a column says "
        "otherwise: the most likely token of all is the correct answer. Intervals are Wilson's, 95 %.</p>"
    )
    figures = []
    if len(result.history) > 1:
        items = "the training items' loss below it" if result.history[0].scores else "the loss"
        figures.append(figure(course(result, around.name), f"Accuracy while the model learns, and {items}."))
        if result.history[0].projections:
            caption = "Mean projection of validation text on the selected directions, less the base model's."
            figures.append(figure(projections(result, around.name), caption))
    lines = []
    for split in result.splits:
        now = split.tuned.accuracy
        shares = (right(split.base), right(split.tuned), right(split.edited), now and now.between, now and now.cued)
        lines.append((esc(split.name), f"{split.items:,}", *map(in_words, shares), number(split.tuned.loss)))
    head = ("Split", "Items", "Base", "Tuned", "Ablated at test", "Of the two answers", "Follows the cue", "Loss")
    shown = f'<div class="uw-wide">{table(head, lines, tuple(range(1, 8)), "Accuracies")}</div>'
    tiles = tuple(
        Tile(number(split.tuned.accuracy.right.value), f"accuracy on {split.name}", f"under {result.condition}")
        for split in result.splits if split.name in ("validation", "ood") and split.tuned.accuracy
    )  # fmt: skip
    tried = diagnosis_html(result.diagnosis) if result.diagnosis is not None else []
    body = "".join([text, beside(*figures) if figures else "", shown, *tried])
    return Section("Fine-tuning", "Fine-tuning under a condition", body, tiles=tiles, notes=result.subject.notes)
