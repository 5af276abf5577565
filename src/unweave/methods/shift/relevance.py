"""Is a latent about gender? By what people wrote down, by a rule over its record, or by asking a chat model.

SHIFT ablates the latents of a classifier's circuit that are about something else than the task (Marks et al. 2024,
sec. 4, step 2). The paper's authors looked at contexts and at the tokens that a latent promotes; so do the rule and the
chat model here. None of them sees a label, or anything of the classifier.

Rule: of the latent's strongest contexts (one per document), at least ``context_share`` have a word for gender at the
token on which the latent is strongest; or at least ``promoted_share`` of the tokens that it promotes most are such
words. ``GENDER_WORDS`` are pronouns, titles, kinship and other words for women and men, and common first names. Names
count with a capital only: mark, bill, rose and grace are other words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from unweave.core.errors import UnweaveError
from unweave.core.files import read_toml
from unweave.core.site import Site
from unweave.judge.base import Conversation, Judge
from unweave.judge.form import Answer, Form, Rating, rate
from unweave.latents.annotations import Annotation, name_of
from unweave.latents.records import Context, LatentRecord
from unweave.lm.shown import is_letter
from unweave.methods.shift.result import Verdict
from unweave.methods.shift.spec import RuleOptions

Latent = tuple[Site, int]

SILENT = "never fires in the text looked at"
"""the reason for no verdict on a latent without contexts"""


_WORDS = {
    name: frozenset(text.split()) for name, text in read_toml(Path(__file__).with_name("words.toml"))["gender"].items()
}
PRONOUNS, FIRST_NAMES = _WORDS["pronouns"], _WORDS["first_names"]
GENDER_WORDS = frozenset().union(*_WORDS.values())

_ANSWER = re.compile(r"answer:\s*\[\[\s*(yes|no)\s*\]\]", re.IGNORECASE)
_SHOWN_CONTEXTS = 5
_TASK = (
    "A detector inside a language model reacts to some tokens of a text. You see the texts on which it reacts most, "
    "with the tokens it reacts to between asterisks, and the tokens that it makes the model say. Is the detector about "
    "gender: about words for women or men, pronouns such as she or his, titles, kinship, or female or male first "
    "names? Something that is about people of any gender, or about anything else, is not. Answer with one line of this "
    "form: answer: [[yes]] or answer: [[no]]"
)
_EXAMPLES = (
    ("Text 1: that night *she* went\nText 2: and *her* brother\nText 3: Mrs *Bell* said\nIt promotes: her, she", "yes"),
    ("Text 1: in *April* last year\nText 2: until *March* 3rd\nText 3: on *June* 12\nIt promotes: 2014, 1st", "no"),
    ("Text 1: the *children* were\nText 2: all the *people* who\nText 3: many *users* of\nIt promotes: are, who", "no"),
)  # fmt: skip


def by_annotation(latents: Sequence[Latent], annotations: Mapping[str, Annotation]) -> list[Verdict]:
    """What people wrote: ``relevant`` false means irrelevant; None where they wrote nothing.

    Raises UnweaveError when nothing was written about any of the latents.
    """
    verdicts = []
    for site, latent in latents:
        annotation = annotations.get(name_of(site, latent))
        relevant = None if annotation is None else annotation.relevant
        why = "not annotated" if annotation is None else (annotation.annotation or annotation.notes or "annotated")
        verdicts.append(Verdict(site, latent, None if relevant is None else not relevant, why))
    if latents and all(verdict.irrelevant is None for verdict in verdicts):
        what = f"no annotation says of any of the {len(latents)} latents whether it is relevant"
        remedy = "annotate the latents of this circuit, with relevant true or false"
        raise UnweaveError(what, where="annotations", remedy=remedy)
    return verdicts


def by_rule(
    records: Mapping[Latent, LatentRecord], rule: RuleOptions | None = None, words: Collection[str] = GENDER_WORDS
) -> list[Verdict]:
    """The rule of the module's first lines, for every latent's record."""
    rule = rule or RuleOptions()
    return [_ruled(site, latent, record, rule, words) for (site, latent), record in records.items()]


def _ruled(site: Site, latent: int, record: LatentRecord, rule: RuleOptions, words: Collection[str]) -> Verdict:
    written = [_written_at(context) for context in record.top]
    hits = [word for word in written if _among(word, words)]
    at = [word.lower() for word in written]
    promoted = [_bare(text).lower() for text, _ in record.promoted if _among(_bare(text), words)]
    by_context = bool(at) and len(hits) >= rule.context_share * len(at)
    by_promoted = bool(record.promoted) and len(promoted) >= rule.promoted_share * len(record.promoted)
    reasons = [f"strongest on {_listed(at)}" if at else SILENT]
    if promoted:
        reasons.append(f"promotes {_listed(promoted)}")
    return Verdict(site, latent, by_context or by_promoted, "; ".join(reasons))


def _among(word: str, words: Collection[str]) -> bool:
    """Whether a word as it was written is one of ``words``, which are in lower case; first names need a capital."""
    plain = word.lower()
    return plain in words and (plain not in FIRST_NAMES or word[:1].isupper())


def word_at(context: Context) -> str:
    """The whole word at a context's strongest token, in lower case; the token itself where it is no word."""
    return _written_at(context).lower()


def _written_at(context: Context) -> str:
    """As ``word_at``, as it was written."""
    shown = context.shown()
    at = next(place for place, one in enumerate(shown) if one.focus)
    before, whole, behind = ("".join(one.text for one in some) for some in (shown[:at], [shown[at]], shown[at + 1 :]))
    if whole and is_letter(whole[0]):
        whole = "".join(takewhile(is_letter, reversed(before)))[::-1] + whole
    if whole and is_letter(whole[-1]):
        whole += "".join(takewhile(is_letter, behind))
    return _bare(whole) or whole.strip()


def _bare(text: str) -> str:
    return text.strip().strip(".,;:!?\"'()[]*")


def _listed(words: Sequence[str]) -> str:
    counted = Counter(words)
    return ", ".join(f"{word!r}" + (f" x{n}" if n > 1 else "") for word, n in counted.most_common(5))


# -- a chat model -------------------------------------------------------------------------------------------------


def by_chat(records: Mapping[Latent, LatentRecord], judge: Judge) -> list[Verdict]:
    """A chat model's answers; without one the verdict is None, and ``why`` is the reason.

    Latents that never fire are not asked about. Raises UnweaveError when no answer could be used.
    """
    firing = [key for key, record in records.items() if record.top]
    ratings = rate(judge, FORM, [records[key] for key in firing])
    if firing and sum(ratings.failures.values()) == len(firing):
        what = f"none of the judge's {len(firing)} answers could be used: {next(iter(ratings.failures))}"
        raise UnweaveError(what, where=judge.name, remedy="use another judge")
    answers = dict(zip(firing, ratings.rows, strict=True))
    return [_answered(key, answers.get(key)) for key in records]


def _answered(latent: Latent, rating: Rating[LatentRecord] | None) -> Verdict:
    if rating is None:
        return Verdict(*latent, None, SILENT)
    if rating.failure:
        return Verdict(*latent, None, rating.failure)
    strongest = _listed([word_at(context) for context in rating.case.top])
    return Verdict(*latent, rating.words == "yes", f"strongest on {strongest}")


def _parsed(text: str, _record: LatentRecord) -> Answer:
    """Exactly one answer of the form asked for."""
    answers = {answer.lower() for answer in _ANSWER.findall(text)}
    if len(answers) != 1:
        raise ValueError("more than one answer" if answers else "no answer of the form asked for")
    return Answer(words=answers.pop())


def question(record: LatentRecord) -> Conversation:
    """The conversation that asks whether a latent is about gender: the task, three answered examples, the latent."""
    turns = [text for shown, answer in _EXAMPLES for text in (shown, f"answer: [[{answer}]]")]
    turns.append(_shown(record))
    turns[0] = f"{_TASK}\n\n{turns[0]}"
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


FORM = Form("about-gender", 1, question, _parsed)


def _shown(record: LatentRecord) -> str:
    contexts = record.top[:_SHOWN_CONTEXTS]
    lines = [f"Text {i}: {_marked(context, record.maximum)}" for i, context in enumerate(contexts, 1)]
    if record.promoted:
        lines.append("It promotes: " + ", ".join(text.strip() for text, _ in record.promoted))
    return "\n".join(lines)


def _marked(context: Context, maximum: float) -> str:
    """A context's text in one line, with the tokens on which the latent is at least half as strong as ever marked."""
    parts = []
    for text, value, counted, _ in context.shown():
        plain = text.replace("\r", " ").replace("\n", " ")
        body = plain.strip()
        strong = counted and body and value >= 0.5 * maximum and value > 0
        parts.append(plain.replace(body, f"*{body}*") if strong else plain)
    return "".join(parts).strip()
