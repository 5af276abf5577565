"""A fine-tuning as rows, and as a section of a page. Needs no torch."""

from __future__ import annotations

from unweave.core.result import Row
from unweave.methods.finetune.card import cell, in_words
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
    answers = split.tuned.accuracy
    words = [counted(split.items, "item"), f"the base model {cell(split.base)}"]
    words += [f"ablated at test {cell(split.edited)}"] if split.edited is not None else []
    words += [f"follows the cue {in_words(answers.cued)}"] if answers is not None and answers.cued is not None else []
    measure = "accuracy" if answers is not None else "nats a token"
    return (f"{measure}: {split.name}", cell(split.tuned), "; ".join(words))


def section(result: Finetuned, around: Around = ALONE) -> Section:
    """The course of training, and every split with and without the condition's edit."""
    weights = result.weights
    answers = any(split.tuned.accuracy for split in result.splits)
    measure = "Accuracies are" if answers else "Losses are, in nats a token,"
    meaning = ": the most likely token of all is the correct answer. Intervals are Wilson's, 95 %." if answers else "."
    text = (
        f"<p>{esc(result.subject.named_model)} learnt from {esc(result.data)} for {counted(result.steps, 'step')} of "
        f"{counted(result.batch, 'item')} (seed {result.seed}) under the condition <b>{esc(result.condition)}</b>; "
        f"selection: {esc(result.selection or 'none')}. {weights.trained:,} of {weights.of:,} weights were trained "
        f"({esc(weights.kind)}). {measure} of the model as it is deployed, without any edit, unless a column says "
        f"otherwise{meaning}</p>"
    )
    figures = []
    if len(result.history) > 1 and result.history[0].scores:
        caption = "Accuracy while the model learns" if answers else "Loss on text held out while the model learns"
        figures.append(figure(course(result, around.name), f"{caption}, and the training items' loss below it."))
        if result.history[0].projections:
            caption = "Mean projection of validation text on the selected directions, less the base model's."
            figures.append(figure(projections(result, around.name), caption))
    lines = [(esc(split.name), f"{split.items:,}", *_cells(split)) for split in result.splits]
    head = ("Split", "Items", "Base", "Tuned", "Ablated at test", "Of the two answers", "Follows the cue", "Loss")
    shown = f'<div class="uw-wide">{table(head, lines, tuple(range(1, 8)), "Splits")}</div>' if lines else ""
    tiles = tuple(
        Tile(number(split.tuned.accuracy.right.value), f"accuracy on {split.name}", f"under {result.condition}")
        for split in result.splits if split.name in ("validation", "ood") and split.tuned.accuracy
    )  # fmt: skip
    tried = diagnosis_html(result.diagnosis) if result.diagnosis is not None else []
    body = "".join([text, beside(*figures) if figures else "", shown, *tried])
    return Section("Fine-tuning", "Fine-tuning under a condition", body, tiles=tiles, notes=result.subject.notes)


def _cells(split: Split) -> tuple[str, ...]:
    now = split.tuned.accuracy
    scores = map(cell, (split.base, split.tuned, split.edited))
    return (*scores, in_words(now and now.between), in_words(now and now.cued), number(split.tuned.loss))
