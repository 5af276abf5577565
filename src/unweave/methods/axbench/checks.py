"""Beside the ratings: whether a rater tells known cases apart, and how well values detect a concept.

Known cases: held-out texts with the concept and without it; the same texts whole and broken; answers of the unedited
model under their own instruction and under another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from unweave.core.progress import task
from unweave.judge.check import Check, auroc, compared, fluency_texts, known_texts
from unweave.methods.axbench.compare import Rater
from unweave.methods.axbench.directions import passage_values
from unweave.methods.axbench.forms import Case
from unweave.methods.axbench.generate import Handle, Setting
from unweave.methods.axbench.scores import Array
from unweave.methods.axbench.texts import ConceptTexts

_EACH = 12
"""known cases of either kind, per concept"""

Known = Mapping[str, Sequence[tuple[Case, bool, str]]]
"""by rating: a case, whether it deserves a high one, and what kind of case it is"""


def known_cases(
    concepts: Mapping[str, ConceptTexts], whole: Sequence[str], answers: Sequence[tuple[str, str]], *, any_concept: bool
) -> Known:
    """Cases of which the right rating is known. ``whole`` are fluent texts, ``answers`` (instruction, the unedited
    model's answer) pairs. ``any_concept``: with the concepts and near misses of ``judge.check``, for a chat model."""
    concept = [
        (Case(name, "", text), right, kind)
        for name, texts in concepts.items()
        for several, right, kind in ((texts.positive, True, "tagged"), (texts.negative, False, "without the tag"))
        for text in several[:_EACH]
    ]
    if any_concept:
        concept += [(Case(one.concept, "", one.text), one.right, one.kind) for one in known_texts()]
    fluency = [(Case("", "", text), right, kind) for text, right, kind in fluency_texts(whole)]
    answered = [(instruction, text) for instruction, text in dict.fromkeys(answers) if text.strip()]
    others = [*answered[1:], *answered[:1]]
    own = [(Case("", instruction, text), True, "own") for instruction, text in answered]
    swapped = [
        (Case("", o, text), False, "another's") for (i, text), (o, _) in zip(answered, others, strict=True) if i != o
    ]
    return {"concept": concept, "instruction": own + swapped, "fluency": fluency}


def check(rater: Rater, known: Known) -> tuple[Check, ...]:
    """Whether a rater is shown to read, rating by rating; as ``judge.check`` does for a chat model's forms."""
    checks = []
    for name, cases in known.items():
        values = rater.rate([case for case, _, _ in cases], (name,))[0][:, 0]
        checks.append(compared(name, rater.name, values, cases, {"no rating": int(np.isnan(values).sum())}))
    return tuple(checks)


def detect(setting: Setting, handles: Mapping[str, Sequence[Handle]], most: int) -> dict[str, Array]:
    """By method, how well each pair's values tell held-out texts with its concept from others, AUROC [pairs, 3]: by a
    text's mean, by its largest value (hard negatives among the others), and by that against hard negatives alone."""
    found = {method: np.full((len(setting.pairs), 3), np.nan) for method in handles}
    total = sum(len(one.heldout) for one in setting.concepts.values())
    with task("detection", total=total, unit="texts") as shown:
        for name, texts in setting.concepts.items():
            mine = [
                (method, p) for method in handles for p, pair in enumerate(setting.pairs) if pair.label.label == name
            ]
            latents = [(handles[method][p].sae, handles[method][p].latent) for method, p in mine]
            everything = texts.heldout
            mean, largest = passage_values(setting.lm, latents, everything, most, shown)
            wanted = np.arange(len(everything)) < len(texts.positive)
            hard = wanted | (np.arange(len(everything)) >= len(everything) - len(texts.hard))
            for column, (method, p) in enumerate(mine):
                values = (mean[:, column], largest[:, column], np.where(hard, largest[:, column], np.nan))
                scores = [auroc(one[wanted], one[~wanted]) for one in values]
                found[method][p] = [np.nan if one is None else one for one in scores]
    return found
