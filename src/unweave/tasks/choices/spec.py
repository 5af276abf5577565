"""Which choices are asked. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Annotated, Literal

from unweave.core.refs import Content
from unweave.core.rules import Rule, at_least, not_empty, only_for, only_where, rule
from unweave.core.spec import Spec

Kind = Literal["pronouns", "sports", "sentiment", "verbs"]
Intended = Literal["first", "second"]
OWN = ("gender", "double")
"""Tasks that are no files."""
KINDS: tuple[Kind, ...] = ("pronouns", "sports", "sentiment", "verbs")
COMBINATIONS: tuple[tuple[Kind, Kind, Intended], ...] = tuple(
    (first, second, intended) for first, second in permutations(KINDS, 2) for intended in ("first", "second")
)
"""The 24 of double multiple choice: first, second, intended."""
MALE = ("doctor", "engineer", "carpenter", "pilot", "plumber", "farmer", "mechanic", "soldier", "banker", "surgeon")
FEMALE = ("nurse", "secretary", "florist", "dancer", "hairdresser", "nanny", "librarian", "maid", "dietitian", "model")
"""More professions than the paper's two, by the gender that they are thought of with."""

_HUB_SENTENCES = Rule(
    "letters for the hub's sentences: what stands before their blank does not decide which pronoun is right",
    lambda value, spec: not (value == "words" and spec.source == "hub" and spec.task == "gender"),
)
_OWN = only_where("task is gender or double", lambda spec: spec.task in OWN, "name one of the two")
_OTHER = Rule("another kind than first", lambda value, spec: spec.task != "double" or value != spec.first)
_WORDS = rule("words", lambda words: all(word.strip() for word in words))
_APART = Rule("none of male", lambda words, spec: not {*words} & {*spec.male})


@dataclass(frozen=True, kw_only=True)
class ChoiceSpec(Spec):
    """A task of choices: own texts, the paper's, or a file."""

    task: Annotated[str, Content("unweave.tasks.choices.rows:content_of", named=True), not_empty()] = "gender"
    """gender, double, a file with the columns prompt, correct and incorrect (.jsonl, .json, .csv, .parquet), or
    hub:org/name of a dataset with these columns."""
    first: Annotated[Kind, only_for("task", "double")] = "pronouns"
    """The kind of the first of two questions."""
    second: Annotated[Kind, only_for("task", "double"), _OTHER] = "sports"
    """The kind of the second."""
    intended: Annotated[Intended, only_for("task", "double")] = "first"
    """Which question is to be answered; the other one is the cue."""
    answers: Annotated[Literal["letters", "words"], _OWN, _HUB_SENTENCES] = "letters"
    """letters: A or B, as in the paper; words: the option itself, for double the first word of the right one, with
    which the prompt's last sentence goes on."""
    source: Annotated[Literal["own", "hub"], _OWN] = "own"
    """own: texts that come with Unweave; hub: the paper's datasets, where the hub can be reached."""
    male: Annotated[tuple[str, ...], only_for("task", "gender"), not_empty(), _WORDS] = MALE[:1]
    """Professions that go with he and him in training."""
    female: Annotated[tuple[str, ...], only_for("task", "gender"), not_empty(), _WORDS, _APART] = FEMALE[:1]
    """Professions that go with she and her in training."""
    train: Annotated[int | None, at_least(2)] = None
    """At most so many items to train on; by default 1,400, and of a file all."""
    evaluation: Annotated[int | None, at_least(2)] = None
    """At most so many items of each other split; by default 300, and of a file all."""
    seed: int = 0
    """Which texts are for training, their order, and the order of the options."""

    @property
    def n_train(self) -> int:
        """How many items to train on, at most."""
        return self.train or 1400

    @property
    def n_evaluation(self) -> int:
        """How many items of each other split, at most."""
        return self.evaluation or 300
