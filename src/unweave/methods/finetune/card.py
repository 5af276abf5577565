"""The model card of a fine-tuned model. Knows no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator

from unweave.core.intervals import Interval
from unweave.core.run import environment
from unweave.core.shares import Share
from unweave.methods.finetune.result import Finetuned, Score
from unweave.show.pieces import bounded, counted


def card(result: Finetuned, spec: dict[str, object]) -> str:
    """README.md of the folder, with front matter for model hubs; ``spec`` is everything that was asked."""
    adapter = result.weights.kind == "lora"
    front = {"base_model": result.subject.model, "library_name": "peft" if adapter else "transformers"}
    lines = [f"{name}: {json.dumps(value)}" for name, value in front.items()]
    lines += ["tags:", "- unweave", "- concept-ablation-fine-tuning", *(["- lora"] if adapter else [])]
    return "---\n" + "\n".join(lines) + "\n---\n" + "\n".join(_body(result, spec)) + "\n"


def _body(result: Finetuned, spec: dict[str, object]) -> Iterator[str]:
    subject, weights = result.subject, result.weights
    yield f"\n# {subject.model}, fine-tuned under the condition {result.condition}\n"
    yield f"- Base model: {subject.named_model}"
    for note in subject.notes:
        yield f"- {note}"
    yield f"- Data: {result.data}"
    yield from (f"- Left out: {counted(n, 'item')}: {reason}" for reason, n in result.skipped.items())
    yield f"- Condition while training: {result.condition}"
    yield f"- Selection: {result.selection or 'none'}"
    yield from (f"- SAE at {sae.site}: {sae.words}, digest {sae.digest}" for sae in subject.saes)
    yield f"- Trained: {weights.kind}, {weights.trained:,} of {weights.of:,} weights, {result.steps:,} steps of "\
        f"{counted(result.batch, 'item')}, seed {result.seed}"  # fmt: skip
    version = environment().get("unweave", "")
    yield f"- Made with unweave {version}; the weights need nothing of it: no hook is part of them.\n"
    if all(split.tuned.accuracy is None for split in result.splits):
        yield "Cross-entropy of what the assistant says, in nats a token.\n"
    else:
        yield "Accuracy with Wilson's 95 % interval: the most likely token of all is the correct answer.\n"
    yield "| split | items | base | tuned | tuned, ablated at test | cross-entropy, tuned |"
    yield "|---|---|---|---|---|---|"
    for split in result.splits:
        cells = " | ".join(map(cell, (split.base, split.tuned, split.edited)))
        yield f"| {split.name} | {split.items} | {cells} | {split.tuned.loss:.4f} |"
    yield "\n## Everything that was asked\n\n```json"
    yield json.dumps(spec, indent=1)
    yield "```"


def cell(score: Score | None) -> str:
    """The accuracy, of conversations the cross-entropy."""
    if score is None:
        return "-"
    return f"{score.loss:.4f}" if score.accuracy is None else in_words(score.accuracy.right)


def in_words(share: Share | None) -> str:
    """ "0.95 [0.90, 0.98]" """
    return "-" if share is None else bounded(Interval(share.value, *share.interval))
