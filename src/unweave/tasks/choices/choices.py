"""Opens a task of choices by its spec."""

from __future__ import annotations

from unweave.core.errors import UnweaveError
from unweave.tasks.choices.gender import gender_splits
from unweave.tasks.choices.items import Choices
from unweave.tasks.choices.sentences import own_sentences
from unweave.tasks.choices.spec import ChoiceSpec


def open_choices(spec: ChoiceSpec) -> Choices:
    """The items of a task by split; the same in every process for the same spec.

    Raises UnweaveError for a file or dataset that is missing, unreadable or no list of choices.
    """
    if spec.task == "gender":
        people = f"{' '.join(spec.male)} / {' '.join(spec.female)}"
        return Choices(f"gender: {people}, {spec.answers}", gender_splits(spec, own_sentences(spec.seed)))
    raise UnweaveError(f"no task {spec.task!r} yet", remedy="use gender")
