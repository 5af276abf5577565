"""Opens a task of choices by its spec."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from unweave.core.errors import UnweaveError
from unweave.tasks.choices.double import double_splits
from unweave.tasks.choices.gender import gender_splits
from unweave.tasks.choices.items import Choices
from unweave.tasks.choices.questions import own_questions
from unweave.tasks.choices.rows import file_choices, hub_questions, hub_sentences
from unweave.tasks.choices.sentences import own_sentences
from unweave.tasks.choices.spec import OWN, ChoiceSpec


def open_choices(spec: ChoiceSpec) -> Choices:
    """The items of a task by split; the same in every process for the same spec.

    Splits without items are left out. Raises UnweaveError for a file or dataset that is missing, unreadable or no list
    of choices, and where nothing is left to train on.
    """
    choices = _opened(spec)
    filled = {name: items for name, items in choices.splits.items() if items}
    if "train" not in filled:
        what = f"no row is for training; there are splits {', '.join(filled) or 'with nothing in them'}"
        remedy = 'name a split "train", or leave the column split out and give more rows'
        raise UnweaveError(what, where=spec.task, remedy=remedy)
    return replace(choices, splits=filled)


def _opened(spec: ChoiceSpec) -> Choices:
    if spec.task not in OWN:
        return file_choices(spec)
    hub = spec.source == "hub"
    shown = f"{spec.answers}{', the hub' if hub else ''}"
    if spec.task == "gender":
        pool, left_out = hub_sentences(spec.seed) if hub else (own_sentences(spec.seed), {})
        name = f"gender: {', '.join(spec.male)} / {', '.join(spec.female)}, {shown}"
        return Choices(name, gender_splits(spec, pool), left_out)
    most = max(spec.n_train, spec.n_evaluation)
    pools, left = [], Counter[str]()
    for kind in (spec.first, spec.second):
        pool, left_out = hub_questions(kind, spec.seed, most) if hub else (own_questions(kind, spec.seed, most), {})
        pools.append(pool)
        left.update({f"{kind}: {reason}": count for reason, count in left_out.items()})
    name = f"double: {spec.first} | {spec.second}, intended {spec.intended}, {shown}"
    return Choices(name, double_splits(spec, *pools), dict(left))
