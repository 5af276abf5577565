"""What explaining would take: the work is done with a judge that answers nothing, and its prompts are counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unweave.judge.base import Conversation, Judge, Reply
from unweave.judge.form import rate
from unweave.latents.explaining import EXPLAIN
from unweave.latents.records import Records
from unweave.methods.explain.examples import Examples
from unweave.methods.explain.explain import explain_and_score, known_cases, rate_relevance
from unweave.methods.explain.forms import DETECTION
from unweave.methods.explain.result import Estimate
from unweave.methods.explain.scores import Labels

_STAND_IN = "words such as these that say what tokens or texts have in common"
_REPLY = {"explain": 40, "detection": 10, "fuzzing": 10, "rubric": 50, "relevance": 10}
"""tokens of a usual reply; of a simulation about four for each of its tokens, where the judge writes it"""
_BYTES = 4
"""of a token; what JSON puts around a message stands for what a template does"""


class _Mute:
    """A judge that answers nothing. ``reads``: the real one scores given text."""

    name, note = "nobody", ""

    def __init__(self, reads: bool) -> None:
        self.reads = reads

    def ask(self, conversations: Sequence[Conversation], until: str = "") -> list[Reply]:
        return [Reply(None, "not asked")] * len(conversations)

    def read(self, conversations: Sequence[Conversation], places: Sequence[Any]) -> list[Reply]:
        return self.ask(conversations)


def estimate(
    records: Records, examples: Sequence[Examples], scores: Sequence[str], *, given: Labels | None = None,
    query: str = "", checked: bool = True, reads: bool = False,
    prices: tuple[float | None, float | None] = (None, None),
) -> Estimate:  # fmt: skip
    """Prompts and tokens of everything that would be asked; see ``Estimate``. ``given``: explanations that are there
    already; ``query``: what the judge is to compare explanations with; ``reads``: it scores given text. Errors as in
    ``explain_and_score``."""
    judge: Judge = _Mute(reads)
    labels = {one.latent: _STAND_IN for one in examples} if given is None else given
    explained = explain_and_score(judge, records, examples, scores, given=labels)
    if given is None:
        explained.add("explained", [one.latent for one in examples], rate(judge, EXPLAIN, examples))
    if query:
        rate_relevance(judge, query, explained)
    n_known, width = 0, 0 if reads else max(len(context.ids) for one in examples for context in one.active)
    if checked:
        cases = [case for case, *_ in known_cases()]
        n_known = len(cases)
        explained.add("check", [None] * n_known, rate(judge, DETECTION, cases))
    prompts = [len(row["prompt"].encode()) // _BYTES for row in explained.answers]
    replies = [_REPLY.get(row["form"].rpartition("-")[0], 4 * width) for row in explained.answers]
    n_about = len(prompts) - n_known  # the check's stand last
    per_latent = (sum(prompts[:n_about]) + sum(replies[:n_about])) // max(1, len(examples))
    total, new = sum(prompts), sum(replies)
    price = None if prices[0] is None or prices[1] is None else (total * prices[0] + new * prices[1]) / 1e6
    return Estimate(len(prompts), total, new, price, per_latent)
