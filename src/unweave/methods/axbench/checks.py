"""Beside the ratings: whether a rater tells known cases apart, how well values detect a concept, and how much a latent
changes the next token's distribution.

Known cases: held-out texts with the concept and without it; the same texts whole and broken; answers of the unedited
model under their own instruction and under another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from unweave.core.progress import task
from unweave.lm.model import LM
from unweave.methods.axbench.compare import Rater
from unweave.methods.axbench.directions import passage_values
from unweave.methods.axbench.forms import Case
from unweave.methods.axbench.generate import Handle, Setting
from unweave.methods.axbench.result import Checked
from unweave.methods.axbench.scores import Array
from unweave.methods.axbench.texts import ConceptTexts
from unweave.methods.axbench.truth import broken
from unweave.sae.edits import together
from unweave.sae.steered import prompt_tokens

_PROMPTS = ("From my experience,", "The most important thing is", "Yesterday I", "It is well known that")
_TOP = 20
_EACH = 12
"""known cases of either kind, per concept"""

Known = Mapping[str, Sequence[tuple[Case, bool]]]


def known_cases(
    concepts: Mapping[str, ConceptTexts], whole: Sequence[str], answers: Sequence[tuple[str, str]]
) -> Known:
    """By rating, cases of which it is known whether they deserve a high one. ``whole`` are fluent texts, ``answers``
    pairs (instruction, the unedited model's answer)."""
    concept = [
        (Case(name, "", text), wanted)
        for name, texts in concepts.items()
        for several, wanted in ((texts.positive, True), (texts.negative, False))
        for text in several[:_EACH]
    ]
    fluency = [(Case("", "", text), True) for text in whole]
    fluency += [(Case("", "", broken(text, i, loop=i % 2 == 1)), False) for i, text in enumerate(whole)]
    answered = [(instruction, text) for instruction, text in dict.fromkeys(answers) if text.strip()]
    others = [*answered[1:], *answered[:1]]
    own = [(Case("", instruction, text), True) for instruction, text in answered]
    swapped = [(Case("", o, text), False) for (i, text), (o, _) in zip(answered, others, strict=True) if i != o]
    return {"concept": concept, "instruction": own + swapped, "fluency": fluency}


def check(rater: Rater, known: Known) -> tuple[Checked, ...]:
    """The rater's AUROC on known cases, rating by rating; cases that it failed on are left out."""
    checks = []
    for name, cases in known.items():
        values, _ = rater.rate([case for case, _ in cases], (name,))
        rated = ~np.isnan(values[:, 0])
        checks.append(
            Checked(name, auroc(values[rated, 0], np.array([w for _, w in cases], dtype=bool)[rated]), int(rated.sum()))
        )
    return tuple(checks)


def auroc(values: Array, wanted: Array) -> float | None:
    """How often a wanted case has the larger value, ties half; None without cases of both kinds."""
    if not wanted.any() or wanted.all():
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(wanted, values))


def detect(setting: Setting, handles: Mapping[str, Sequence[Handle]], most: int) -> dict[str, Array]:
    """By method, how well each pair's values tell held-out texts with its concept from others, AUROC [pairs, 3]: by a
    text's mean, by its largest value (hard negatives among the others), and by that against hard negatives alone."""
    found = {method: np.full((len(setting.pairs), 3), np.nan) for method in handles}
    with task("detection", total=len(setting.concepts), unit="concepts") as shown:
        for name, texts in setting.concepts.items():
            mine = [
                (method, p) for method in handles for p, pair in enumerate(setting.pairs) if pair.label.label == name
            ]
            latents = [(handles[method][p].sae, handles[method][p].latent) for method, p in mine]
            everything = [*texts.positive, *texts.negative, *texts.hard]
            mean, largest = passage_values(setting.lm, latents, everything, most)
            wanted = np.arange(len(everything)) < len(texts.positive)
            hard = wanted | (np.arange(len(everything)) >= len(everything) - len(texts.hard))
            valid = ~np.isnan(mean).any(1)
            for column, (method, p) in enumerate(mine):
                scores = (
                    auroc(mean[valid, column], wanted[valid]),
                    auroc(largest[valid, column], wanted[valid]),
                    auroc(largest[valid & hard, column], wanted[valid & hard]),
                )
                found[method][p] = [np.nan if one is None else one for one in scores]
            shown.advance()
    return found


def confidence_change(lm: LM, handles: Sequence[Handle], factor: float = 1.0) -> Array:
    """By how much steering a latent makes the next token's distribution more confident, in nats [handles].

    Confidence is minus the mean log-probability of the 20 likeliest tokens: the more of the mass the first have, the
    less is left for the others (Wang et al. 2025 select latents by its change). The mean over a few neutral prompts.
    """
    rows = [None, *handles]
    values = np.zeros((len(rows), len(_PROMPTS)))
    for column, prompt in enumerate(_PROMPTS):
        for start in range(0, len(rows), 32):
            part = rows[start : start + 32]
            tokens = prompt_tokens(lm, [prompt] * len(part), chat=False)
            edits = together([() if one is None else one.steered(factor) for one in part])
            with lm.taps(edit=edits):
                logits = lm(tokens, keep_logits=1)
            assert logits is not None
            top = torch.log_softmax(logits[:, -1].float(), -1).topk(min(_TOP, logits.shape[-1]), -1).values
            values[start : start + len(part), column] = -top.mean(-1).cpu().numpy()
    return (values[1:] - values[:1]).mean(1)
